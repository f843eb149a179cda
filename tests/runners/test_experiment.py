"""Experiments: a mistake in a YAML is one line, and the design expands to the cells it promises."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners import experiment as experiments
from runners import sweep as sweeps
from runners.config import CONF, UserError
from runners.experiment import Claim, Design, best_lr, load, read, value
from runners.store import Store
from tests.runners.conftest import PLAN, InProcess, MakeExperiment, result_of, sweep_of

GOOD = """
question: Q?
source: none
cost: seconds
arms:
  none: [optimizer=adam]
  warm: [optimizer=adam, warmup=untuned_linear]
reference: warm
overrides: [steps=10]
tasks:
  digits_resnet: {lrs: [0.01, 0.03], tuning_seeds: 1, pilot_seeds: 2, test_seeds: 2, control_seeds: 2}
claims:
  c: {hypothesis: H, kind: sensitivity, arm: none}
"""
BAD = [
    # what is changed, and what the line must say
    ("question: Q?", "", "question: field required"),
    ("question: Q?", 'question: ""', "question: "),
    ("question: Q?", "questoin: Q?", "unknown key 'questoin'; did you mean 'question'?"),
    ("reference: warm", "", "reference: field required"),
    ("reference: warm", "reference: wram", "no arm is called 'wram'; did you mean 'warm'?"),
    ("reference: warm", "reference: null", "tasks.digits_resnet: without a reference there are tuning_seeds and test_"),
    ("arm: none}", "arm: nnoe}", "claim c: no arm is called 'nnoe'; did you mean 'none'?"),
    (", arm: none}", "}", "claim c: no arm is called None"),
    (
        "kind: sensitivity",
        "kind: sensitivty",
        "claims.c: kind: input should be 'equivalence', 'sensitivity' or 'control'",
    ),
    ("kind: sensitivity", "knd: sensitivity", "claims.c: unknown key 'knd'; did you mean 'kind'?"),
    ("lrs: [0.01, 0.03]", "lrs: [0.03, 0.01]", "tasks.digits_resnet: lrs must increase"),
    ("lrs: [0.01, 0.03]", "lrs: [0.01, 0.01]", "tasks.digits_resnet: lrs must increase"),
    ("lrs: [0.01, 0.03]", "lrs: []", "tasks.digits_resnet: lrs: "),
    ("lrs: [0.01, 0.03]", "lrs: [0, 0.03]", "tasks.digits_resnet: lrs.0: input should be greater than 0 (got 0)"),
    ("lrs: [0.01, 0.03]", "lr: [0.01, 0.03]", "tasks.digits_resnet: unknown key 'lr'; did you mean 'lrs'?"),
    (
        "tuning_seeds: 1",
        "tuning_seeds: 0",
        "tasks.digits_resnet: tuning_seeds: input should be greater than or equal to 1",
    ),
    ("pilot_seeds: 2, ", "", "tasks.digits_resnet: a test needs a margin: pilot_seeds must be at least 2"),
    ("test_seeds: 2", "test_seeds: 0", "claim c: a claim needs test_seeds in every task"),
    ("test_seeds: 2", "test_seeds: 1000", "tasks.digits_resnet: test_seeds: input should be less than 1000"),
    ("control_seeds: 2}", "control_seeds: 0}\nscreeing: true", "unknown key 'screeing'; did you mean 'screening'?"),
    ("cost: seconds", "cost: [", "not YAML: "),
    ("cost: seconds", "cost: seconds\ncost: more", "not YAML: "),
    ("cost: seconds", "cost: ${cots}", "Interpolation key 'cots' not found"),
    (GOOD, "", "question: field required"),
    (GOOD, "- a\n- b", "not a mapping of keys"),
    (GOOD, "just words", "unknown key 'just words'"),
    ("{hypothesis: H, kind: sensitivity, arm: none}", "[1, 2]", "claims.c: not a mapping of keys"),
]


def written(folder: Path, text: str) -> Path:
    path = folder / "example.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("old", "new", "says"), BAD, ids=[f"{i}-{says[:30]}" for i, (_, _, says) in enumerate(BAD)])
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, GOOD.replace(old, new)))
    message = str(caught.value)
    assert message.startswith("experiment example: ") and says in message and "\n" not in message


COMPOSED = [
    ("none: [optimizer=adam]", "none: [optimizer=adamm]", "arm none, task digits_resnet: optimizer: 'adamm'"),
    ("none: [optimizer=adam]", "none: [optimizer.betta2=.9]", "unknown key 'optimizer.betta2'; did you mean 'beta2'?"),
    ("none: [optimizer=adam]", "none: [optimizer=radam, warmup=linear]", "radam has its own warmup"),
    ("none: [optimizer=adam]", "none: [optimizer=adam, lr=.1]", "'lr=.1' would change nothing: the sweep sets it"),
    ("[steps=10]", "[steps=10, device=cuda]", "'device=cuda' would change nothing"),
    ("[steps=10]", "[steps=10, task=pydocs_lstm]", "'task=pydocs_lstm' would change nothing"),
    ("[steps=10]", "[steps=ten]", "steps: input should be a valid integer"),
    ("digits_resnet:", "digits_renset:", "task: 'digits_renset' is not known; did you mean 'digits_resnet'?"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says"), COMPOSED, ids=[new for _, new, _ in COMPOSED])
def test_a_mistake_in_an_override_is_one_line_too(tmp_path: Path, old: str, new: str, says: str) -> None:
    experiment = read(written(tmp_path, GOOD.replace(old, new)))
    with pytest.raises(UserError) as caught:
        Design(experiment)
    message = str(caught.value)
    assert message.startswith("experiment example, arm ") and says in message and "\n" not in message


def test_an_experiment_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^no experiment is called 'smok'; did you mean 'smoke'\?$"):
        load("smok")


def test_a_file_of_another_folder_is_an_experiment_too(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text((CONF / "experiment" / "smoke.yaml").read_text())
    own, smoke = load(str(tmp_path / "own.yaml")), load("smoke")
    assert own.name == "own" and dataclasses.replace(own, name="smoke") == smoke


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "smok"], "did you mean 'smoke'?"),
        (["run", "smoke", "--workers", "0"], "workers must be at least 1"),
        (["run", "smoke", "--store", "FILE/store"], "cannot write to the store"),
        (["run", "smoke", "--results", "FILE/results"], "cannot write to the results folder"),
        (["plan", "smoke", "--device", "cuda:77"], "device 'cuda:77' is not there"),
        (["restore", "smoke", "--results", "NOWHERE"], "nothing to restore"),
    ],
)
def test_the_sweep_command_says_it_in_one_line_and_trains_nothing(
    words: list[str], says: str, tmp_path: Path, in_process: type[InProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    words = [w.replace("FILE", str(tmp_path / "file")).replace("NOWHERE", str(tmp_path / "no")) for w in words]
    words += [] if "--store" in words else ["--store", str(tmp_path / "store")]
    with pytest.raises(SystemExit) as caught:
        sweeps.main(words)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not in_process.started


# -- the design ----------------------------------------------------------------------------------------------


def finished(loss: float, status: str = "done") -> dict[str, Any]:
    return {**result_of("x", loss).summary, "status": status}


def test_stages_appear_when_tuning_is_finished_each_with_seeds_of_its_own(tiny_experiment: MakeExperiment) -> None:
    claims = dict.fromkeys("cd", Claim(hypothesis="h", kind="sensitivity", arm="none"))
    design = Design(tiny_experiment(plan={**PLAN, "high_lr": 0.3}, claims=claims))
    before = list(design.cells(lambda cell: None))
    assert {c.stage for c in before} == {"tuning"} and len(before) == design.size()["tiny"]["tuning"] == 6
    # The reference is best at .03, RAdam at .003.
    best = {"none": 0.03, "warm": 0.03, "radam": 0.003}
    after = list(design.cells(lambda cell: finished(0.1 if cell.lr == best[cell.arm] else 0.2)))
    cells = {(c.stage, c.arm, c.lr, c.seed) for c in after}
    assert len(cells) == len(after)  # no cell twice, though two claims probe the same arm
    expected = {("tuning", arm, lr, 1000) for arm in best for lr in (0.003, 0.03)}
    expected |= {("pilot", "warm", lr, seed) for lr in (0.03, 0.03 * math.sqrt(2)) for seed in (2000, 2001)}
    expected |= {("test", arm, 0.03, seed) for arm in best for seed in (3000, 3001)}
    expected |= {("high", arm, 0.3, seed) for arm in ("warm", "none") for seed in (3000, 3001)}
    expected |= {("own", "radam", 0.003, 3000)} | {("control", "warm", 0.03, seed) for seed in (4000, 4001)}
    assert cells == expected
    assert all((c.run.lr, c.run.seed, c.run.steps) == (c.lr, c.seed, 10) for c in after)

    def without(arm: str) -> set[tuple[str, str, float, int]]:
        known = design.cells(
            lambda cell: None if cell.arm == arm else finished(0.1 if cell.lr == best[cell.arm] else 0.2)
        )
        return {(c.stage, c.arm, c.lr, c.seed) for c in known}

    # Only its own stage waits for an arm that is not tuned yet; every later one waits for the reference.
    assert without("radam") == cells - {("own", "radam", 0.003, 3000)}
    assert without("warm") == {cell for cell in cells if cell[0] == "tuning"}
    for stage, count in design.size()["tiny"].items():
        found = sum(c.stage == stage for c in after)
        assert found <= count if stage == "own" else found == count


def test_without_a_reference_every_arm_is_tested_at_its_own_best_multiple(tmp_path: Path) -> None:
    text = GOOD.replace("reference: warm", "reference: null").partition("claims:")[0]
    text = text.replace("none: [optimizer=adam]", "sgd: [optimizer=sgd]").replace("[0.01, 0.03]", "[0.1, 1.0, 3.0]")
    text = text.replace("pilot_seeds: 2, test_seeds: 2, control_seeds: 2", "test_seeds: 2")
    design = Design(read(written(tmp_path, text)))
    rates = {"sgd": (0.01, 0.1, 0.3), "warm": (0.0001, 0.001, 0.003)}  # published: .1 and .001
    assert design.rates("digits_resnet") == rates
    assert {(c.stage, c.arm, c.lr) for c in design.cells(lambda cell: None)} == {
        ("tuning", arm, lr) for arm, lrs in rates.items() for lr in lrs
    }
    half = list(design.cells(lambda cell: finished(0.1) if cell.arm == "sgd" else None))
    assert {(c.stage, c.arm, c.lr) for c in half if c.stage != "tuning"} == {("test", "sgd", 0.01)}  # waits for none
    best = {"sgd": 0.3, "warm": 0.0001}
    cells = list(design.cells(lambda cell: finished(0.1 if cell.lr == best[cell.arm] else 0.2)))
    after = [(c.stage, c.arm, c.lr, c.seed, c.run.lr) for c in cells if c.stage != "tuning"]
    assert sorted(after) == sorted(("test", arm, lr, seed, lr) for arm, lr in best.items() for seed in (3000, 3001))
    assert len(cells) == sum(design.size()["digits_resnet"].values())
    assert design.experiment.grid("digits_resnet") == "×0.1 ×1 ×3"


def test_without_a_reference_there_are_no_claims(tmp_path: Path) -> None:
    text = GOOD.replace("reference: warm", "reference: null")
    text = text.replace("pilot_seeds: 2, test_seeds: 2, control_seeds: 2", "test_seeds: 2")
    with pytest.raises(UserError, match="claims: a claim compares with a reference arm: name one"):
        read(written(tmp_path, text))


def test_a_plan_may_name_its_task(tmp_path: Path) -> None:
    text = GOOD.replace("digits_resnet: {", "low_beta2: {task: digits_resnet, overrides: [optimizer.beta2=0.9], ")
    run = Design(read(written(tmp_path, text))).base["warm", "low_beta2"]
    assert type(run.task).__name__ == "DigitsResNet" and run.optimizer.second_moment_beta == 0.9


def test_a_diverged_run_counts_as_the_worst_and_nothing_is_worse() -> None:
    assert value(finished(0.25), "test") == 0.25
    assert value(finished(7.0), "test") == 1.0
    assert value(finished(0.25, "diverged"), "test") == 1.0
    assert value(finished(math.nan), "test") == 1.0
    high = {**finished(0.05), "higher_is_better": True, "worst": 0.1}
    assert value(high, "test") == 0.1


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from([0.01, 0.1]), st.sampled_from([0.2, 0.4, 0.5, 3.0])), min_size=1, max_size=9),
    st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_best_lr_has_the_best_mean_and_of_equals_is_the_smallest(
    drawn: list[tuple[float, float]], higher: bool, random: Any
) -> None:
    results = [
        (lr, {**finished(loss), "higher_is_better": higher, "worst": 0.0 if higher else 1.0}) for lr, loss in drawn
    ]
    chosen = best_lr(results)
    sign = 1 if higher else -1

    def mean(lr: float) -> float:
        values = [min(loss, 1.0) if not higher else loss for one, loss in drawn if one == lr]
        return sign * sum(values) / len(values)

    lrs = sorted({lr for lr, _ in drawn})
    assert all(mean(chosen) >= mean(lr) - 1e-12 for lr in lrs)
    assert all(mean(lr) < mean(chosen) + 1e-12 for lr in lrs if lr < chosen)
    random.shuffle(results)
    assert best_lr(results) == pytest.approx(chosen)


def test_arms_may_change_the_task(tiny_experiment: MakeExperiment, store: Store) -> None:
    # The data, and so the fingerprint in the id, of one arm is another's then.
    arms = {"warm": ("optimizer=adam",), "salted": ("optimizer=adam", "task.salt=1")}
    sweep = sweep_of(tiny_experiment(arms, claims={}), store)
    warm, salted = sweep.fingerprints["warm", "tiny"], sweep.fingerprints["salted", "tiny"]
    assert warm != salted
    for cell, run_id in sweep.cells():
        assert run_id == cell.run.id(salted if cell.arm == "salted" else warm)


def test_every_stage_has_seeds_that_cannot_meet() -> None:
    starts = sorted(set(experiments.SEEDS.values()))
    assert all(b - a >= 1000 for a, b in itertools.pairwise(starts))
