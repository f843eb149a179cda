"""Verdicts on hand-made tables where the answer is known."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.report import summary, verdict_markdown, write
from analysis.tables import Results, load
from analysis.verdicts import ALL, in_words, lr_summary, margin, verdicts
from runners.config import UserError
from runners.experiment import Claim, Experiment, TaskPlan

SEEDS = 6
LR = 0.01
Cells = list[dict[str, Any]]
NOISE = np.array([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0])
"""Mean 0, sd 1.414."""

EQUIVALENT = Claim(hypothesis="a is like ref", kind="equivalence", arm="a")
SENSITIVE = Claim(hypothesis="the assay can tell", kind="sensitivity", arm="none")
CONTROL = Claim(hypothesis="ref is like itself", kind="control")


def experiment(
    claims: dict[str, Claim], tasks: tuple[str, ...] = ("t",), compares: tuple[Any, ...] = (), **plan: Any
) -> Experiment:
    values: dict[str, Any] = {
        "lrs": (LR, 0.1), "tuning_seeds": 1, "pilot_seeds": 2, "test_seeds": SEEDS, "control_seeds": SEEDS, **plan,
    }  # fmt: skip
    return Experiment(
        name="e", question="Q?", source="s", cost="c", arms={"a": (), "ref": (), "none": ()}, reference="ref",
        tasks=dict.fromkeys(tasks, TaskPlan(**values)), claims=claims, compares=compares,
    )  # fmt: skip


def cells(stage: str, arm: str, test: Any, lr: float = LR, task: str = "t", first: int = 3000, **more: Any) -> Cells:
    return [
        {
            "stage": stage, "task": task, "arm": arm, "lr": lr, "seed": first + i, "status": "done",
            "diverged_at": math.nan, "metric": "loss", "higher_is_better": False, "worst": 2.0, "validation": v,
            "test": v, "steps": 40, "beta2": 0.9, "seconds": 1.0, "device": "cpu", "device_name": "x", "torch": "2.11",
            "execution": "flat", "precision": "float32",
            "run": f"{stage}{task}{arm}{lr:g}{i}", **more,
        }
        for i, v in enumerate(np.atleast_1d(test))
    ]  # fmt: skip


def pilot(task: str = "t", change: float = 0.1, noise: float = 0.001) -> Cells:
    """Gives a margin of ``change``."""
    two = np.array([-noise, noise])
    return cells("pilot", "ref", 0.5 + two, task=task, first=2000) + cells(
        "pilot", "ref", 0.5 + change + two, lr=LR * math.sqrt(2), task=task, first=2000
    )


def arms(a: float = 0.0, sd: float = 0.01, task: str = "t", none: float = 0.5) -> Cells:
    """Test runs: arm a differs from the reference by ``a`` and noise, none by ``none``."""
    reference = 0.5 + 0.01 * np.array([3.0, 1, 4, 1, 5, 9])
    return (
        cells("test", "ref", reference, task=task)
        + cells("test", "a", reference + a + sd / NOISE.std(ddof=1) * NOISE, task=task)
        + cells("test", "none", reference + none + 0.001 * NOISE, task=task)
        + cells("control", "ref", reference + 0.001 * NOISE, task=task, first=4000)
    )


def of(rows: Cells, claims: dict[str, Claim], tasks: tuple[str, ...] = ("t",), **plan: Any) -> Results:
    # Through text, as the committed table is.
    table = pd.read_csv(io.StringIO(pd.DataFrame(rows).to_csv(index=False, float_format="%.9g")))
    return Results("e", experiment(claims, tasks, **plan), Path("/nowhere"), table)


def judged(rows: Cells, *claims: Claim, **more: Any) -> pd.DataFrame:
    return verdicts(of(rows, {c.kind: c for c in claims}, **more))


def overall(table: pd.DataFrame, kind: str) -> str:
    return str(table[(table.kind == kind) & (table.task == ALL)].verdict.iloc[0])


def test_the_margin_is_the_change_in_the_pilot() -> None:
    found = margin(of(pilot(change=0.1, noise=0.03) + arms(), {}), "t")
    assert found.value == pytest.approx(0.1)
    assert found.sd == pytest.approx(math.sqrt(2) * 0.03 * math.sqrt(2))  # sd of (-.03, .03) is .03 sqrt 2


@pytest.mark.parametrize(
    ("a", "sd", "verdict"),
    [
        (0.0, 0.01, "supported"), (0.05, 0.01, "supported"), (-0.05, 0.01, "supported"),
        (0.3, 0.01, "refuted"), (-0.3, 0.01, "refuted"), (0.1, 0.01, "inconclusive"), (0.0, 0.3, "inconclusive"),
    ],
)  # fmt: skip
def test_equivalence(a: float, sd: float, verdict: str) -> None:
    table = judged(pilot() + arms(a, sd), EQUIVALENT)
    row = table[table.task == "t"].iloc[0]
    half = stats.t.ppf(0.95, SEEDS - 1) * sd / math.sqrt(SEEDS)
    assert [row.low, row.high] == pytest.approx([a - half, a + half], abs=1e-7)
    assert (row.difference, row.margin, row.n, row.lr) == (pytest.approx(a, abs=1e-8), pytest.approx(0.1), SEEDS, LR)
    assert row.verdict == overall(table, "equivalence") == verdict
    assert 0 <= row.planned_power <= 1 and row.arm_mean - row.reference_mean == pytest.approx(a, abs=1e-8)


def test_pairs_are_by_seed_whatever_the_order_of_the_table() -> None:
    rows = pilot() + arms(0.02, 0.01)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    pd.testing.assert_frame_equal(judged(rows, EQUIVALENT), judged(shuffled, EQUIVALENT))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("device", "cuda"),
        ("device_name", "y"),
        ("torch", "2.12"),
        ("execution", "compiled"),
        ("precision", "bfloat16"),
        ("steps", 41),
    ],
)
def test_runs_that_differ_in_how_they_were_made_are_not_compared(column: str, value: Any) -> None:
    rows = pilot() + arms()
    next(r for r in rows if r["arm"] == "a")[column] = value
    table = judged(rows, EQUIVALENT)
    row = table[table.task == "t"].iloc[0]
    assert (row.verdict, row.reason) == ("not comparable", f"runs differ in {column}")
    assert overall(table, "equivalence") == "not comparable"


@pytest.mark.parametrize(
    ("execution", "precision", "compares", "differing"),
    [
        ("compiled", "float32", ("execution",), ""),
        ("compiled", "bfloat16", ("execution", "precision"), ""),
        ("compiled", "bfloat16", ("execution",), "precision"),
        ("flat", "bfloat16", ("execution",), "precision"),
    ],
)
def test_arms_may_differ_in_what_the_experiment_compares(
    execution: str, precision: str, compares: tuple[str, ...], differing: str
) -> None:
    rows = pilot() + arms()
    for row in rows:
        if row["arm"] == "a":
            row.update(execution=execution, precision=precision)
    row = judged(rows, EQUIVALENT, compares=compares).iloc[0]
    expected = ("not comparable", f"runs differ in {differing}") if differing else ("supported", "")
    assert (row.verdict, row.reason or "") == expected


@pytest.mark.parametrize(("arm", "stage"), [("a", "test"), ("ref", "test"), ("ref", "pilot")])
def test_and_not_within_an_arm_or_between_reference_and_pilot(arm: str, stage: str) -> None:
    rows = pilot() + arms()
    for row in rows:
        if row["arm"] == "a":
            row["execution"] = "compiled"
    next(row for row in rows if (row["arm"], row["stage"]) == (arm, stage))["execution"] = "eager"
    row = judged(rows, EQUIVALENT, compares=("execution",)).iloc[0]
    assert (row.verdict, row.reason) == ("not comparable", "runs differ in execution")


def test_a_margin_of_zero_decides_nothing() -> None:
    table = judged(pilot(change=0.0) + arms(), EQUIVALENT)
    row = table[table.task == "t"].iloc[0]
    assert (row.verdict, row.reason) == ("inconclusive", "the pilot gave a margin of 0")
    assert overall(table, "equivalence") == "inconclusive"


def test_diverged_runs_count_at_the_worst() -> None:
    rows = pilot() + arms()
    for row in [r for r in rows if r["arm"] == "a" and r["stage"] == "test"]:
        row.update(status="diverged", diverged_at=7, test=2.0, validation=2.0)
    table = judged(rows, EQUIVALENT)
    row = table[table.task == "t"].iloc[0]
    assert (row.verdict, row.arm_diverged, row.reference_diverged, row.arm_mean) == ("refuted", SEEDS, 0, 2.0)


def test_the_control_compares_the_reference_with_itself() -> None:
    table = judged(pilot() + arms(), CONTROL)
    assert overall(table, "control") == "supported" and table.arm.iloc[0] == "ref"
    rows = pilot() + arms()
    for row in [r for r in rows if r["stage"] == "control"]:
        row["test"] += 0.5
    assert overall(judged(rows, CONTROL), "control") == "refuted"


def test_an_insensitive_assay_supports_nothing() -> None:
    rows = pilot() + arms(none=0.0)
    table = judged(rows, EQUIVALENT, SENSITIVE, CONTROL)
    assert overall(table, "sensitivity") == "inconclusive"
    assert overall(table, "equivalence") == "inconclusive"
    reason = table[(table.kind == "equivalence") & (table.task == ALL)].reason.iloc[0]
    assert reason == "no task could tell no warmup from warmup"
    assert table[(table.kind == "equivalence") & (table.task == "t")].verdict.iloc[0] == "supported"
    assert overall(table, "control") == "supported"
    # What it refutes is refuted all the same.
    refuted = judged(pilot() + arms(a=0.5, none=0.0), EQUIVALENT, SENSITIVE)
    assert overall(refuted, "equivalence") == "refuted"


def test_a_sensitive_assay_supports() -> None:
    table = judged(pilot() + arms(none=0.5), EQUIVALENT, SENSITIVE)
    assert overall(table, "sensitivity") == "supported" and overall(table, "equivalence") == "supported"


@pytest.mark.parametrize(("none", "words"), [(0.5, "told apart"), (-0.5, "told apart (the arm is better)")])
def test_a_report_says_when_no_warmup_is_better(none: float, words: str) -> None:
    found = of(pilot() + arms(none=none), {"tells": SENSITIVE})
    table = verdicts(found)
    assert in_words(table.iloc[0]) == words and in_words(table.iloc[1]) == "supported"
    assert f"By task: t {words}." in summary(found, table) and f"| {words} " in verdict_markdown(table)


def test_a_report_says_that_an_optimum_may_lie_beyond_the_grid() -> None:
    found = of(pilot() + arms(), {"like": EQUIVALENT})
    assert "lies at an edge of the grid on t:" in summary(found, verdicts(found))
    found = of(pilot() + arms(), {"like": EQUIVALENT}, lrs=(LR / 3, LR, 0.1))
    assert "edge" not in summary(found, verdicts(found))


def test_sensitivity_at_the_high_lr_is_enough() -> None:
    high = [c for arm, v in (("ref", 0.6), ("none", 1.9)) for c in cells("high", arm, v + 0.001 * NOISE, lr=0.1)]
    rows = pilot() + arms(none=0.0) + high
    table = judged(rows, EQUIVALENT, SENSITIVE, high_lr=0.1)
    own = table[(table.kind == "sensitivity") & (table.task == "t")]
    assert list(zip(own["at"], own.lr, own.verdict, strict=True)) == [
        ("primary", LR, "supported"),
        ("high", 0.1, "refuted"),
    ]
    assert overall(table, "sensitivity") == "supported" and overall(table, "equivalence") == "supported"
    # Where the high lr is the primary one, its runs are the test runs.
    assert list(judged(pilot() + arms(), SENSITIVE, high_lr=LR)["at"]) == ["primary", ""]


@pytest.mark.parametrize(("other", "verdict"), [(0.0, "supported"), (0.1, "inconclusive"), (0.3, "refuted")])
def test_over_tasks_every_one_must_hold(other: float, verdict: str) -> None:
    rows = pilot() + arms() + pilot("u") + arms(other, task="u")
    assert overall(judged(rows, EQUIVALENT, tasks=("t", "u")), "equivalence") == verdict


def test_a_margin_from_another_machine_is_no_margin() -> None:
    table = judged([{**row, "device_name": "y"} for row in pilot()] + arms(), EQUIVALENT)
    assert table[table.task == "t"].verdict.iloc[0] == "not comparable"


def test_sensitivity_needs_one_task() -> None:
    rows = pilot() + arms(none=0.0) + pilot("u") + arms(none=0.5, task="u")
    table = judged(rows, EQUIVALENT, SENSITIVE, tasks=("t", "u"))
    assert overall(table, "sensitivity") == "supported"
    assert "told apart on u" in table[(table.kind == "sensitivity") & (table.task == ALL)].reason.iloc[0]


@pytest.mark.parametrize(("stage", "arm"), [("test", "a"), ("test", "ref"), ("pilot", "ref"), ("control", "ref")])
def test_missing_runs_name_the_command(stage: str, arm: str) -> None:
    rows = pilot() + arms()
    rows.remove(next(r for r in rows if (r["stage"], r["arm"]) == (stage, arm)))
    claim = CONTROL if stage == "control" else EQUIVALENT
    with pytest.raises(UserError, match=r"missing: make sweep EXPERIMENT=e$"):
        judged(rows, claim)


def test_missing_high_runs_name_the_command() -> None:
    with pytest.raises(UserError, match=r"missing: make sweep EXPERIMENT=e$"):
        judged(pilot() + arms(), SENSITIVE, high_lr=0.1)


def test_without_claims_there_is_no_verdict() -> None:
    assert judged(pilot() + arms()).empty


def test_the_lr_curve_in_numbers() -> None:
    rows: Cells = []
    for lr, (a, ref) in {0.001: (0.9, 0.8), 0.01: (0.5, 0.4), 0.1: (2.0, 0.6)}.items():
        rows += cells("tuning", "a", [a, a], lr=lr, first=1000, status="diverged" if a == 2.0 else "done")
        rows += cells("tuning", "ref", [ref, ref], lr=lr, first=1000)
    table = lr_summary(of(rows, {})).set_index("arm")
    a, ref = table.loc["a"], table.loc["ref"]
    assert (a.best_lr, ref.best_lr, a.at_edge, a.seeds) == (0.01, 0.01, False, 2)
    assert (a.largest_stable_lr, ref.largest_stable_lr) == (0.01, 0.1)
    assert (a.share_diverged, ref.share_diverged) == (pytest.approx(1 / 3), 0.0)
    assert a.sensitivity == pytest.approx((0.4 + 0 + 1.5) / 3)
    assert ref.sensitivity == pytest.approx((0.4 + 0 + 0.2) / 3)


def test_one_lr_is_no_curve(tmp_path: Path) -> None:
    found = of([c for arm in ("a", "ref") for c in cells("tuning", arm, 0.5, first=1000)] + pilot() + arms(), {})
    assert lr_summary(found).empty
    write(Results("e", found.experiment, tmp_path, found.runs))
    assert "lr curve" not in (tmp_path / "report.md").read_text()


def test_the_report_tells_all_of_it(tmp_path: Path) -> None:
    rows = pilot() + arms(none=0.0)
    rows += [
        c for arm in ("a", "ref", "none") for lr in (LR, 0.1) for c in cells("tuning", arm, 0.5 + lr, lr=lr, first=1000)
    ]
    found = of(rows, {"like": EQUIVALENT, "tells": SENSITIVE})
    found = Results("e", found.experiment, tmp_path, found.runs)
    console = write(found)
    text = (tmp_path / "report.md").read_text()
    assert "a is like ref: inconclusive** (no task could tell" in text and "a is like ref: inconclusive**" in console
    assert {p.name for p in tmp_path.iterdir()} == {"report.md", "verdicts.csv", "lr_curves.csv"}
    assert list(pd.read_csv(tmp_path / "verdicts.csv").verdict) == list(verdicts(found).verdict)
    assert write(found) == console and (tmp_path / "report.md").read_text() == text
    further = Results("e", dataclasses.replace(found.experiment, next="smoke"), tmp_path, found.runs)
    assert write(further).splitlines()[-1].startswith("the same with more: make sweep EXPERIMENT=smoke (")


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_results_that_are_not_there_name_the_command(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTUNED_RESULTS", str(tmp_path))
    if content is not None:
        (tmp_path / "smoke").mkdir()
        (tmp_path / "smoke" / "runs.csv").write_text(content)
    with pytest.raises(UserError, match=r"make sweep EXPERIMENT=smoke$"):
        load("smoke")
