"""Write an experiment's verdicts and report: ``python -m analysis.report EXPERIMENT``.

results/<experiment>/verdicts.csv   the verdict table
results/<experiment>/lr_curves.csv  the whole lr curve of every arm in numbers
results/<experiment>/report.md      both in words, with the figures
"""

import argparse
import sys
from typing import Any

import pandas as pd

from analysis import published, ranking
from analysis.sanity import BESIDE_PLAIN
from analysis.tables import Results, load
from analysis.verdicts import ALL, in_words, lr_summary, margin, verdicts
from runners.config import UserError
from runners.experiment import Experiment
from runners.experiment import load as load_experiment
from runners.store import write_whole


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("experiment")
    words = parser.parse_args(argv)
    try:
        found = load(words.experiment)
        print(write(found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def write(found: Results) -> str:
    """Write verdicts, lr curves and report; the summary for the console."""
    table, curves = verdicts(found), lr_summary(found)
    ranked = ranking.ranking(found) if found.experiment.reference is None else pd.DataFrame()
    for name, frame in (("verdicts", table), ("lr_curves", curves), ("ranking", ranked)):
        if len(frame):
            write_whole(found.folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.6g"))
    write_whole(found.folder / "report.md", report(found, table, curves))
    shown = verdict_markdown(table) + "\n\n" if len(table) else ""
    return f"{shown}{summary(found, table)}\nreport: {found.folder / 'report.md'}{_further(found.experiment)}"


def _further(experiment: Experiment) -> str:
    if experiment.next is None:
        return ""
    return f"\nthe same with more: make sweep EXPERIMENT={experiment.next} ({load_experiment(experiment.next).cost})"


def report(found: Results, table: pd.DataFrame, curves: pd.DataFrame) -> str:
    """The report in Markdown: a function of the tables, so the same tables give the same text."""
    experiment = found.experiment
    parts = [
        f"# {experiment.question}",
        f"Experiment `{found.name}` · source: {experiment.source}",
        summary(found, table),
    ]
    if len(table):
        parts += ["## Verdicts", verdict_markdown(table), _how_to_read(found)]
    if experiment.reference is None:
        ranked = _table(ranking.readable(ranking.ranking(found)))
        parts += ["## Side by side", ranked, _RANKING_NOTE, ranking.limits(found)]
    parts += ["## How it was measured", _measured(found), _table(_tasks(found))]
    if len(table):
        parts += ["### Margins", _table(_margins(found)), _MARGIN_NOTE]
    if len(curves):
        parts += ["## The whole lr curve", _table(_readable(curves)), _CURVE_NOTE]
    own = _own_lr(found)
    if len(own):
        parts += ["## Each arm at its own best lr", _table(own), _OWN_NOTE]
    parts += published.sections(found)
    if (found.folder / BESIDE_PLAIN).exists():
        parts += ["## Beside plain torch loops", f"See [{BESIDE_PLAIN}]({BESIDE_PLAIN})."]
    if not len(table) and experiment.reference is not None:
        parts += ["## Every cell", _table(_cells(found))]
    if images := sorted((found.folder / "figures").glob("*.png")):
        parts += ["## Figures", *(f"![{p.stem.replace('_', ' ')}](figures/{p.name})" for p in images)]
    return "\n\n".join(parts) + "\n"


def summary(found: Results, table: pd.DataFrame) -> str:
    """The answer in a few plain sentences."""
    experiment = found.experiment
    lines: list[str] = []
    for name, claim in experiment.claims.items():
        verdict = table[(table.claim == name) & (table.task == ALL)].iloc[0]
        reason = f" ({verdict.reason})" if isinstance(verdict.reason, str) and verdict.reason else ""
        by_task = table[(table.claim == name) & (table.task != ALL)]
        tasks = ", ".join(
            f"{r.task} {'at the high lr ' if r['at'] == 'high' else ''}{in_words(r)}" for _, r in by_task.iterrows()
        )
        lines.append(f"- **{claim.hypothesis}: {verdict.verdict}**{reason}. By task: {tasks}.")
    at_edge = [task for task in experiment.tasks if experiment.claims and _at_edge(found, task)]
    if at_edge:
        lines.append(
            f"\nThe reference's best lr lies at an edge of the grid on {', '.join(at_edge)}: its optimum may lie "
            "beyond it."
        )
    if experiment.screening:
        undecided = (
            " It can show a large difference; any verdict close to its margin may turn with more seeds, of which the "
            "margin itself has but a few; and where it says inconclusive, it had too few to tell, not a reason to "
            "believe either answer."
        )
        claims = undecided if experiment.claims else " It makes no claim."
        lines.append(f"\nThis is a **screening**: few seeds and short runs.{claims}")
    diverged = int((found.runs.drop_duplicates("run").status == "diverged").sum())
    lines.append(f"\n{found.runs.run.nunique()} runs, {diverged} of them diverged (counted at the task's worst value).")
    return "\n".join(lines).strip()


def _at_edge(found: Results, task: str) -> bool:
    lrs = found.experiment.tasks[task].lrs
    return len(lrs) > 1 and found.primary_lr(task) in (min(lrs), max(lrs))


def verdict_markdown(table: pd.DataFrame) -> str:
    """The verdict table for people."""
    rows: list[dict[str, Any]] = []
    for _, row in table.iterrows():
        overall = row.task == ALL
        rows.append(
            {
                "claim": row.claim,
                "task": row.task + (" (high lr)" if row["at"] == "high" else ""),
                "lr": "" if overall else f"{row.lr:g}",
                "n": "" if overall else f"{row.n:.0f}",
                "metric": "" if overall else row.metric,
                "reference": "" if overall else f"{row.reference_mean:.4g}",
                "arm": "" if overall else f"{row.arm_mean:.4g}",
                "difference [90 %]": "" if overall or pd.isna(row.get("low"))
                else f"{row.difference:+.2g} [{row.low:+.2g}, {row.high:+.2g}]",
                "margin": "" if overall else f"±{row.margin:.2g}",
                "planned power": "" if overall or pd.isna(row.get("planned_power")) else f"{row.planned_power:.0%}",
                "verdict": f"**{row.verdict}**" if overall else in_words(row),
            }
        )  # fmt: skip
    return _table(pd.DataFrame(rows))


def _how_to_read(found: Results) -> str:
    return (
        f"Difference = arm − `{found.experiment.reference}`, paired by seed, both at the reference's best lr. "
        "*supported*: the 90 % interval lies within ± the margin (two one-sided tests at 5 %); *refuted*: wholly "
        "outside; *inconclusive*: neither. For the sensitivity claim the question is reversed: *told apart* means "
        "that the interval lies wholly outside the margin, so the task can tell. A claim over all tasks must hold "
        "on each (sensitivity: on one). Planned power: the chance, computed from the pilot alone, that this many "
        "seeds support an exact equivalence."
    )


_MARGIN_NOTE = (
    "The margin is the change of the reference arm's metric from its best lr to √2 times it, in pilot runs whose "
    "seeds are used for nothing else. sd: expected standard deviation of a paired difference, from the pilot."
)
_CURVE_NOTE = (
    "From the tuning runs (validation split). Sensitivity: mean loss of the metric over the grid against its best "
    "(Wortsman et al. 2023). Largest stable lr: no seed diverged or ended at the task's worst value. An optimum at "
    "an edge of the grid may lie beyond it."
)
_RANKING_NOTE = (
    "Test metric: mean ± sd over the test seeds at the rate that was best on validation data (edge: of the grid). "
    "Sensitivity: how much the grid loses on average to its own best, as a share of what lies between the worst value "
    "and the best optimizer's, averaged over the tasks. Step: the time of a whole training step, measured side "
    "by side, by task in the order of the columns."
)
_OWN_NOTE = (
    "Secondary. Tuning each arm alone can remove the very effect under test, so no claim rests on this table: it "
    "shows the test metric of each arm at its own best lr of the tuning runs."
)


def _measured(found: Results) -> str:
    runs = found.runs.drop_duplicates("run")
    seconds = runs.seconds.sum()
    spent = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
    machine = "; ".join(sorted({f"{r.device_name} ({r.device}), torch {r.torch}" for r in runs.itertuples()}))
    arms = "; ".join(f"`{arm}`: {' '.join(words)}" for arm, words in found.experiment.arms.items())
    shared = [("all", found.experiment.overrides), *((t, p.overrides) for t, p in found.experiment.tasks.items())]
    arms += "".join(f"; {whose}: {' '.join(words)}" for whose, words in shared if words)
    how = ", ".join([*sorted(runs.execution.unique()), *sorted(runs.precision.unique())])
    return f"On {machine}; execution {how}; {spent} of training added up over all workers.\n\nArms: {arms}."


def _tasks(found: Results) -> pd.DataFrame:
    rows = []
    for task in found.experiment.tasks:
        runs = found.runs[found.runs.task == task]
        stages = runs.groupby("stage", sort=False).seed.nunique()
        tested = runs[runs.stage == "test"]
        rows.append(
            {
                "task": task,
                "metric": runs.metric.iloc[0],
                "better": "higher" if runs.higher_is_better.iloc[0] else "lower",
                "worst": f"{runs.worst.iloc[0]:.3g}",
                "steps": runs.steps.iloc[0],
                "β2 (where there is one)": ", ".join(f"{b:g}" for b in sorted(runs.beta2.dropna().unique())),
                "lrs": found.experiment.grid(task),
                "primary lr": f"{tested.lr.iloc[0]:g}" if tested.lr.nunique() == 1 else "",
                "precision": ", ".join(sorted(runs.precision.unique())),
                "seeds": ", ".join(f"{n} {stage}" for stage, n in stages.items()),
            }
        )
    return pd.DataFrame(rows)


def _margins(found: Results) -> pd.DataFrame:
    rows = []
    for task in found.experiment.tasks:
        limits = margin(found, task)
        rows.append({"task": task, "margin": f"±{limits.value:.3g}", "sd": f"{limits.sd:.3g}"})
    return pd.DataFrame(rows)


def _readable(curves: pd.DataFrame) -> pd.DataFrame:
    diverged = (curves.share_diverged * curves.runs).round().astype(int)
    return pd.DataFrame(
        {
            "task": curves.task,
            "arm": curves.arm,
            "best lr": [
                f"{lr:g}{' (edge)' if edge else ''}" for lr, edge in zip(curves.best_lr, curves.at_edge, strict=True)
            ],
            "validation there": curves.best_validation.map("{:.4g}".format),
            "sensitivity": curves.sensitivity.map("{:.3g}".format),
            "largest stable lr": curves.largest_stable_lr.map("{:g}".format),
            "diverged [95 %]": [
                f"{n} of {r.runs} [{r.share_diverged_low:.0%}, {r.share_diverged_high:.0%}]"
                for n, r in zip(diverged, curves.itertuples(), strict=True)
            ],
            "seeds": curves.seeds,
        }
    )


def _own_lr(found: Results) -> pd.DataFrame:
    rows = []
    for task, plan in found.experiment.tasks.items():
        if not plan.own_seeds:
            continue
        runs = found.runs[found.runs.task == task]
        for arm in found.experiment.arms:
            own = runs[(runs.arm == arm) & (runs.stage == "own")]
            own = own if len(own) else runs[(runs.arm == arm) & (runs.stage == "test")].head(plan.own_seeds)
            if len(own):
                rows.append(
                    {"task": task, "arm": arm, "own best lr": f"{own.lr.iloc[0]:g}", "n": len(own),
                     "test": f"{own.test.mean():.4g}", "sd": f"{own.test.std():.2g}"}
                )  # fmt: skip
    return pd.DataFrame(rows)


def _cells(found: Results) -> pd.DataFrame:
    grouped = found.runs.groupby(["task", "arm", "lr"], sort=False)
    cells = grouped.agg(
        mean=("validation", "mean"),
        low=("validation", "min"),
        high=("validation", "max"),
        n=("seed", "nunique"),
        diverged=("status", lambda status: int((status == "diverged").sum())),
    ).reset_index()
    for column in ("mean", "low", "high"):
        cells[column] = cells[column].map("{:.4g}".format)
    cells["lr"] = cells.lr.map("{:g}".format)
    return cells


def _table(frame: pd.DataFrame) -> str:
    return frame.to_markdown(index=False, disable_numparse=True)


if __name__ == "__main__":
    main()
