"""Claims against data: what an experiment's YAML claims, tested on its test runs.

For each claim and task the arm is compared with the reference arm on paired seeds at the primary lr (the
reference's best on tuning seeds), and the 90 % interval of the difference is held against the margin, the
change of the metric from that lr to sqrt(2) times it in a pilot whose seeds are used for nothing else.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import (
    largest_stable_lr,
    over_tasks,
    paired_equivalence,
    planned_power,
    sensitivity,
    share_diverged,
)
from analysis.tables import Results
from runners.config import UserError
from runners.experiment import Claim

COMPARABLE = ("device", "device_name", "torch", "execution", "precision", "steps")
"""What must agree between the runs that a verdict pairs, and the pilot that gave its margin. What an experiment
declares to compare may differ between the arms, and must agree within each."""
ALL = "all tasks"


@dataclass(frozen=True)
class Margin:
    """A task's margin and what the pilot said about noise.

    Attributes:
        value: |mean metric at lr - mean metric at sqrt(2) lr|, in units of the metric.
        sd: expected standard deviation of a paired difference: sqrt(2) times that of a run over seeds, pooled
            over both pilot lrs, which supposes that pairing gains nothing.
    """

    value: float
    sd: float


def margin(results: Results, task: str) -> Margin:
    """The margin of a task, from its pilot runs.

    Raises:
        UserError: if pilot runs are missing.
    """
    runs = results.runs
    pilot = runs[(runs.task == task) & (runs.stage == "pilot")]
    by_lr = [group.test.to_numpy(float) for _, group in pilot.groupby("lr")]
    wanted = results.experiment.tasks[task].pilot_seeds
    if len(by_lr) != 2 or any(len(values) != wanted for values in by_lr):
        raise UserError(f"pilot runs of {task} are missing: make sweep EXPERIMENT={results.name}")
    low, high = by_lr
    pooled = math.sqrt((low.var(ddof=1) + high.var(ddof=1)) / 2)
    return Margin(abs(float(high.mean() - low.mean())), math.sqrt(2) * pooled)


def verdicts(results: Results) -> pd.DataFrame:
    """One row a claim, task and lr, and one a claim over all tasks (task ``all tasks``).

    Raises:
        UserError: if runs that a claim needs are missing, naming the command that makes them.
    """
    rows: list[dict[str, Any]] = []
    for name, claim in results.experiment.claims.items():
        own = [row for task in results.experiment.tasks for row in _rows(results, name, claim, task)]
        rows += own
        rows.append(_over_all(name, claim, own))
    table = pd.DataFrame(rows)
    return _with_assay(table) if len(table) else table


def _rows(results: Results, name: str, claim: Claim, task: str) -> list[dict[str, Any]]:
    runs, reference = results.runs, results.experiment.reference
    assert reference is not None  # an experiment without one has no claims
    of_task = runs[runs.task == task]
    limits = margin(results, task)
    test, plan = of_task[of_task.stage == "test"], results.experiment.tasks[task]
    pairs: list[tuple[str, pd.DataFrame, pd.DataFrame]] = []
    if claim.kind == "control":
        control = of_task[of_task.stage == "control"]
        count = min(plan.control_seeds, plan.test_seeds)
        pairs.append(("primary", _seeds(results, control, reference, task, count),
                      _seeds(results, test, reference, task, count)))  # fmt: skip
    else:
        assert claim.arm is not None
        arms = [_seeds(results, test, arm, task, plan.test_seeds) for arm in (claim.arm, reference)]
        pairs.append(("primary", arms[0], arms[1]))
        if claim.kind == "sensitivity" and plan.high_lr not in (None, results.primary_lr(task)):
            high = of_task[of_task.stage == "high"]
            arms = [_seeds(results, high, arm, task, plan.test_seeds) for arm in (claim.arm, reference)]
            pairs.append(("high", arms[0], arms[1]))
    pilot = of_task[of_task.stage == "pilot"]
    compares = results.experiment.compares
    return [_row(name, claim, task, at, arm, ref, pilot, limits, compares) for at, arm, ref in pairs]


def _seeds(results: Results, runs: pd.DataFrame, arm: str, task: str, count: int) -> pd.DataFrame:
    """The first ``count`` seeds of an arm in order: the order is the pairing."""
    found = runs[runs.arm == arm].sort_values("seed").head(count)
    if len(found) < count:
        raise UserError(
            f"{count - len(found)} runs of arm {arm} on {task} are missing: make sweep EXPERIMENT={results.name}"
        )
    return found


def _row(
    name: str,
    claim: Claim,
    task: str,
    at: str,
    arm: pd.DataFrame,
    reference: pd.DataFrame,
    pilot: pd.DataFrame,
    limits: Margin,
    compares: tuple[str, ...],
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "claim": name,
        "kind": claim.kind,
        "arm": claim.arm or reference.arm.iloc[0],
        "task": task,
        "at": at,
        "lr": float(reference.lr.iloc[0]),
        "n": len(arm),
        "metric": reference.metric.iloc[0],
        "reference_mean": reference.test.mean(),
        "arm_mean": arm.test.mean(),
        "reference_diverged": int((reference.status == "diverged").sum()),
        "arm_diverged": int((arm.status == "diverged").sum()),
        "margin": limits.value,
        "sd_pilot": limits.sd,
    }
    of_reference = pd.concat([reference, pilot])
    whole = pd.concat([arm, of_reference])
    differing = [
        column
        for column in COMPARABLE
        if any(part[column].nunique() > 1 for part in ((arm, of_reference) if column in compares else (whole,)))
    ]
    if differing:
        return {**row, "verdict": "not comparable", "reason": f"runs differ in {', '.join(differing)}"}
    if limits.value == 0:
        return {**row, "verdict": "inconclusive", "reason": "the pilot gave a margin of 0"}
    test = paired_equivalence(arm.test.to_numpy(float), reference.test.to_numpy(float), limits.value)
    power = planned_power(len(arm), limits.value, limits.sd) if limits.sd > 0 and len(arm) > 1 else np.nan
    better = (test.mean_difference > 0) == bool(reference.higher_is_better.iloc[0])
    return {
        **row,
        "difference": test.mean_difference,
        "low": test.low,
        "high": test.high,
        "half_width": test.half_width,
        "sd": test.sd,
        "planned_power": power,
        "p_tost": test.p_tost,
        "verdict": test.verdict,
        "reason": "the arm is better" if test.verdict == "refuted" and better else test.reason,
    }


def in_words(row: "pd.Series[Any]") -> str:
    """A row's verdict as people read it: to a sensitivity claim a refuted equivalence is the welcome answer."""
    word = str(row.verdict)
    if row.task == ALL:
        return word
    if row.kind == "sensitivity":
        word = {"refuted": "told apart", "supported": "found equivalent"}.get(word, word)
    return f"{word} ({row.reason})" if row.verdict == "refuted" and row.reason else word


def _over_all(name: str, claim: Claim, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim over all tasks. An equivalence or control must hold on every task (intersection-union); the
    sensitivity of the assay needs one task on which the arms come out as different."""
    found = [row["verdict"] for row in rows]
    row = {"claim": name, "kind": claim.kind, "arm": rows[0]["arm"], "task": ALL, "at": "", "reason": ""}
    if claim.kind == "sensitivity":
        told = sorted({r["task"] for r in rows if r["verdict"] == "refuted"})
        verdict = "supported" if told else "not comparable" if "not comparable" in found else "inconclusive"
        reason = f"told apart on {', '.join(told)}" if told else "no task told the arms apart"
        return {**row, "verdict": verdict, "reason": reason}
    if "not comparable" in found:
        return {**row, "verdict": "not comparable"}
    return {**row, "verdict": over_tasks(found)}


def _with_assay(table: pd.DataFrame) -> pd.DataFrame:
    """An equivalence that an insensitive assay found is no evidence: over all tasks it is inconclusive then."""
    overall = table.task == ALL
    assays = table[overall & (table.kind == "sensitivity")]
    if len(assays) and not (assays.verdict == "supported").any():
        empty = overall & (table.kind == "equivalence") & (table.verdict == "supported")
        table.loc[empty, ["verdict", "reason"]] = ["inconclusive", "no task could tell no warmup from warmup"]
    return table


def lr_summary(results: Results) -> pd.DataFrame:
    """The whole lr curve of each task and arm, from tuning runs: best lr and value, sensitivity to the lr, share
    diverged with its 95 % interval, largest stable lr; and whether the best lr lies at an edge of the grid. A grid
    of one lr has no curve, so no row."""
    rows = []
    tuning = results.runs[results.runs.stage == "tuning"]
    for (task, arm), group in tuning.groupby(["task", "arm"], sort=False):
        higher, worst = bool(group.higher_is_better.iloc[0]), float(group.worst.iloc[0])
        mean = group.groupby("lr").validation.mean()
        if len(mean) == 1:
            continue
        best = mean.idxmax() if higher else mean.idxmin()
        failed = (group.status == "diverged") | (group.validation == worst)
        stable = ~failed.groupby(group.lr).any()
        share = share_diverged((group.status == "diverged").to_numpy())
        rows.append(
            {
                "task": task,
                "arm": arm,
                "best_lr": best,
                "at_edge": best in (mean.index.min(), mean.index.max()),
                "best_validation": mean.max() if higher else mean.min(),
                "sensitivity": sensitivity(mean.to_numpy(), worst, higher),
                "largest_stable_lr": largest_stable_lr(mean.index.to_numpy(), stable.to_numpy()),
                "share_diverged": share.share,
                "share_diverged_low": share.low,
                "share_diverged_high": share.high,
                "runs": len(group),
                "seeds": group.seed.nunique(),
            }
        )
    return pd.DataFrame(rows)
