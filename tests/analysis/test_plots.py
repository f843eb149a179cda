import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import plots
from analysis.figures import save
from runners.experiment import Claim, Experiment, TaskPlan

LRS = (0.01, 0.1)
WORST = {"images": 0.1, "words": 5.0}
DIVERGED = ("images", "none", 0.1, 1001)
STEPS = 100


def value(task: str, arm: int, lr: float, seed: int) -> float:
    """Any number that differs between all cells; .01 is the better lr of either task."""
    offset = 0.01 * arm + 0.001 * (seed % 10) + lr
    return 0.9 - offset if task == "images" else 1.5 + offset


def tables(experiment: Experiment) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, curves = [], []
    for task, plan in experiment.tasks.items():
        for i, arm in enumerate(experiment.arms):
            cells = [("tuning", lr, 1000 + s) for lr in plan.lrs for s in range(plan.tuning_seeds)]
            cells += [("test", 0.01, 3000 + s) for s in range(plan.test_seeds)]
            if plan.high_lr and arm in (experiment.reference, "none"):
                cells += [("high", plan.high_lr, 3000 + s) for s in range(plan.test_seeds)]
            if arm == experiment.reference:
                cells += [("control", 0.01, 4000 + s) for s in range(plan.control_seeds)]
            for stage, lr, seed in cells:
                diverged = (task, arm, lr, seed) == DIVERGED or (stage == "high" and arm == "none" and seed == 3000)
                metric = WORST[task] if diverged else value(task, i, lr, seed)
                run = f"{task}-{arm}-{lr}-{seed}"
                rows.append(
                    {
                        "stage": stage, "task": task, "arm": arm, "lr": lr, "seed": seed,
                        "status": "diverged" if diverged else "done", "diverged_at": 31 if diverged else math.nan,
                        "metric": "accuracy" if task == "images" else "loss", "higher_is_better": task == "images",
                        "worst": WORST[task], "validation": metric, "test": metric, "steps": STEPS, "beta2": 0.9,
                        "run": run,
                    }
                )  # fmt: skip
                t = np.arange(1, (31 if diverged else STEPS) + 1)
                loss = np.where(t == 31, np.inf, 1e3) if diverged else 2.0 + t / STEPS + seed % 10
                curves.append(pd.DataFrame({"run": run, "step": t, "loss": loss.astype(np.float32)}))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def experiment(name: str, arms: tuple[str, ...], claims: dict[str, Claim], **plan: float) -> Experiment:
    tasks = {task: TaskPlan(lrs=LRS, tuning_seeds=2, **plan) for task in WORST}  # type: ignore[arg-type]
    return Experiment(
        name=name, question="?", source="none", cost="none", arms=dict.fromkeys(arms, ()),
        reference="untuned_linear", tasks=tasks, claims=claims,
    )  # fmt: skip


CLAIMED = experiment(
    "claimed",
    ("none", "untuned_linear", "radam"),
    {
        "alike": Claim("RAdam ends where Adam with untuned warmup does", "equivalence", "radam"),
        "assay": Claim("no warmup can be told from warmup", "sensitivity", "none"),
        "control": Claim("the reference is equivalent to itself", "control"),
    },
    pilot_seeds=2, test_seeds=3, control_seeds=2, high_lr=0.1,
)  # fmt: skip
LENGTHS = experiment("lengths", ("none", "linear_5", "linear_50", "untuned_linear", "radam"), {})
RUNS, CURVES = tables(CLAIMED)
LENGTH_RUNS, LENGTH_CURVES = tables(LENGTHS)


def verdicts() -> pd.DataFrame:
    rows = []
    for claim, kind, arm in (
        ("alike", "equivalence", "radam"),
        ("assay", "sensitivity", "none"),
        ("control", "control", ""),
    ):
        for task in WORST:
            numbers = {"difference": 0.02, "low": 0.01, "high": 0.03, "margin": 0.1, "verdict": "supported"}
            if kind == "sensitivity":
                numbers = {"difference": 3, "low": 2, "high": 4, "margin": 0.1, "verdict": "refuted"}
            rows.append({"claim": claim, "kind": kind, "arm": arm, "task": task, "at": "primary", "lr": 0.01,
                         "n": 3, "metric": "m", "reason": "", **numbers})  # fmt: skip
        rows.append({"claim": claim, "kind": kind, "arm": arm, "task": "all tasks", "at": "", "verdict": "supported"})
    table = pd.DataFrame(rows)
    first = table.index[(table.claim == "control") & (table.task == "images")]
    table.loc[first, ["difference", "low", "high"]] = math.nan
    table.loc[first, "verdict"] = "not comparable"
    table.loc[first, "reason"] = "runs differ in device"
    return table


DRAWN: dict[str, Callable[[pd.DataFrame], plots.Drawn]] = {
    "lr_curves": lambda runs: plots.lr_curves(runs, CLAIMED),
    "training_curves": lambda runs: plots.training_curves(runs, CURVES, CLAIMED),
    "final_metrics": lambda runs: plots.final_metrics(runs, CLAIMED),
    "length_heatmap": lambda runs: plots.length_heatmap(runs, LENGTHS),
    "length_curves": lambda runs: plots.length_curves(runs, LENGTHS),
    "length_training": lambda runs: plots.length_training(runs, LENGTH_CURVES, LENGTHS),
}


def runs_of(name: str) -> pd.DataFrame:
    return LENGTH_RUNS if name.startswith("length") else RUNS


@pytest.mark.parametrize("name", DRAWN)
def test_figure_is_saved_and_leaves_its_tables_alone(name: str, tmp_path: Path) -> None:
    runs = runs_of(name)
    before, losses = runs.copy(), CURVES.copy()
    figure, table = DRAWN[name](runs)
    saved = save(figure, table, tmp_path, name)
    assert saved.png.stat().st_size > 10_000
    pd.testing.assert_frame_equal(runs, before)
    pd.testing.assert_frame_equal(CURVES, losses)


@pytest.mark.parametrize("name", DRAWN)
def test_missing_cell_names_the_command(name: str) -> None:
    runs = runs_of(name)
    stage = "test" if name in ("training_curves", "final_metrics") else "tuning"
    gone = runs[(runs.stage == stage) & (runs.arm == "radam") & (runs.task == "words")].index[0]
    command = f"make sweep EXPERIMENT={'lengths' if name.startswith('length') else 'claimed'}"
    with pytest.raises(
        ValueError, match=rf"{stage} run of radam on words at lr 0.01, seed .000, is missing: {command}"
    ):
        DRAWN[name](runs.drop(gone))
    nan = runs.copy()
    nan.loc[gone, ["validation", "test"]] = math.nan
    with pytest.raises(ValueError, match="is missing"):
        DRAWN[name](nan)


def test_cells_that_do_not_belong_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the tuning run of other on images at lr 0.01, seed 1000, is not in its design"
    ):
        plots.lr_curves(pd.concat([RUNS, RUNS.head(1).assign(arm="other")]), CLAIMED)
    with pytest.raises(ValueError, match="is there twice"):
        plots.lr_curves(pd.concat([RUNS, RUNS.head(1)]), CLAIMED)
    with pytest.raises(ValueError, match="no arm linear_<tau>"):
        plots.length_heatmap(RUNS, CLAIMED)


def test_a_whole_stage_that_is_missing_names_the_command() -> None:
    with pytest.raises(
        ValueError, match="the test run of none on images, seed 3000, is missing, and 8 more: make sweep"
    ):
        plots.final_metrics(RUNS[RUNS.stage != "test"], CLAIMED)


def test_lr_curves_numbers() -> None:
    _, table = plots.lr_curves(RUNS, CLAIMED)
    assert len(table) == 2 * 3 * 2 * 2
    cell = table[(table.task == "words") & (table.arm == "radam") & (table.lr == 0.1)]
    assert list(cell.value) == pytest.approx([1.62, 1.621])
    assert list(cell["mean"]) == pytest.approx([1.6205] * 2)
    lost = table[(table.task == "images") & (table.arm == "none") & (table.lr == 0.1)]
    assert list(lost.value) == pytest.approx([0.8, 0.1])  # the diverged run is at the worst value
    assert list(lost["mean"]) == pytest.approx([0.45] * 2)
    assert set(table.primary_lr) == {0.01}


def test_primary_lr_before_there_are_test_runs_is_the_best_of_the_reference() -> None:
    _, table = plots.lr_curves(RUNS[RUNS.stage == "tuning"], CLAIMED)
    assert set(table.primary_lr) == {0.01}


def test_final_metrics_numbers() -> None:
    _, table = plots.final_metrics(RUNS, CLAIMED)
    assert table.groupby("stage").size().to_dict() == {"test": 2 * 3 * 3, "control": 2 * 2, "high": 2 * 2 * 3}
    high = table[(table.stage == "high") & (table.arm == "none") & (table.task == "words")]
    assert list(high.value) == pytest.approx([5.0, 1.601, 1.602])
    assert list(high["mean"]) == pytest.approx([(5 + 1.601 + 1.602) / 3] * 3)
    again = table[(table.stage == "control") & (table.task == "images")]
    assert list(again["mean"]) == pytest.approx([0.8795] * 2)


@pytest.mark.parametrize(("words", "shaded"), [(("warmup=untuned_exponential",), True), (("warmup=linear",), False)])
def test_the_untuned_warmup_is_shaded_where_an_arm_has_one(words: tuple[str, ...], shaded: bool) -> None:
    arms = {**CLAIMED.arms, "untuned_linear": words}
    figure, _ = plots.training_curves(RUNS, CURVES, dataclasses.replace(CLAIMED, arms=arms))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("untuned linear warmup" in labels) == shaded


def test_training_curves_numbers() -> None:
    figure, table = plots.training_curves(RUNS, CURVES, CLAIMED)
    assert len(figure.axes) == 4
    row = table[(table.task == "words") & (table.stage == "test") & (table.arm == "radam") & (table.step == 50)]
    # The mean of the last 2 steps of a line that rises by .01 a step, plus the seed.
    assert row[["seed_3000", "seed_3001", "seed_3002"]].to_numpy() == pytest.approx(np.array([[2.495, 3.495, 4.495]]))
    assert row["median"].item() == pytest.approx(3.495)
    high = table[(table.stage == "high") & (table.arm == "none") & (table.task == "words")].set_index("step")
    assert high.loc[30, "seed_3000"] == pytest.approx(1000)
    assert high.loc[31:, "seed_3000"].isna().all()
    assert high.loc[50, "median"] == pytest.approx(4.495)  # of 3.495, 4.495 and a run that counts as infinitely high
    assert list(high.loc[[30, 31], "diverged"]) == [0, 1]


def test_gap_in_the_curves_names_the_command() -> None:
    gap = CURVES[(CURVES.run == "words-radam-0.01-3001") & (CURVES.step == 40)].index
    with pytest.raises(ValueError, match=r"training loss of radam on words has gaps .* make sweep EXPERIMENT=claimed"):
        plots.training_curves(RUNS, CURVES.drop(gap), CLAIMED)


def test_tables_of_curves_stay_small(tmp_path: Path) -> None:
    many = experiment("many", ("none", "untuned_linear", "radam", "untuned_exponential"), {},
                      pilot_seeds=2, test_seeds=60)  # fmt: skip
    assert plots._points([RUNS]) == 200
    cells = pd.DataFrame({"arm": list(many.arms) * 60, "lr": 0.01})
    assert plots._points([cells] * 4) * (4 * 240 + 4 * 16) < 100_000


def test_differences(tmp_path: Path) -> None:
    figure, table = plots.differences(verdicts(), RUNS, CLAIMED)
    own = table[table.claim == "alike"].set_index("task")
    assert own.loc["images", ["relative", "relative_low", "relative_high"]].tolist() == pytest.approx([0.2, 0.1, 0.3])
    # A loss that is higher is worse: to the left.
    assert own.loc["words", ["relative", "relative_low", "relative_high"]].tolist() == pytest.approx([-0.2, -0.3, -0.1])
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"supported over all tasks", "supported on at least one task", "told apart"} <= texts
    assert {"not comparable", "runs differ in device"} <= texts
    assert save(figure, table, tmp_path, "differences").png.exists()


def test_missing_verdict_names_the_command() -> None:
    table = verdicts()
    with pytest.raises(ValueError, match="no verdict on control for words: make sweep EXPERIMENT=claimed"):
        plots.differences(table[(table.claim != "control") | (table.task != "words")], RUNS, CLAIMED)


def test_length_tables() -> None:
    _, table = plots.length_heatmap(LENGTH_RUNS, LENGTHS)
    lengths = table.drop_duplicates("arm").set_index("arm").tau
    assert lengths.dropna().to_dict() == {"linear_5": 5, "linear_50": 50, "untuned_linear": 20}
    cell = table[(table.task == "images") & (table.arm == "none")].set_index("lr")
    assert cell.loc[0.1, "mean"] == pytest.approx(0.45)
    assert list(cell.diverged) == [0, 1]
    assert list(cell.seeds) == [2, 2]
    _, seeds = plots.length_curves(LENGTH_RUNS, LENGTHS)
    assert len(seeds) == 2 * 5 * 2 * 2
    assert seeds[seeds.status == "diverged"].value.tolist() == [0.1]
    _, early = plots.length_training(LENGTH_RUNS, LENGTH_CURVES, LENGTHS)
    assert early.step.max() == 50  # the longest warmup
