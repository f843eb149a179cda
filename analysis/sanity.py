"""Runs of this project beside plain torch loops of the same settings: do they end alike?

Reads what a sweep and ``python -m runners.plain`` wrote for one experiment; nothing here trains.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from analysis.style import BLUE, VERMILION, panels
from analysis.tables import Results
from runners.config import UserError
from runners.experiment import SEEDS
from runners.store import write_whole

EXPERIMENT = "sanity"
CONFIDENCE = 0.95
BESIDE_PLAIN = "plain_loops.md"
HERE, PLAIN = "this project", "plain torch loop"
LOOKS: dict[str, dict[str, Any]] = {
    HERE: {"color": BLUE, "linestyle": "-"},
    PLAIN: {"color": VERMILION, "linestyle": "--"},
}


@dataclass(frozen=True)
class Pair:
    """What a task has of both: a row a run (``test``, ``seconds``, ``seed``, ``device_name``, ``torch``), and
    the training loss as means of a few steps (``seed``, ``step``, ``loss``)."""

    task: str
    here: pd.DataFrame
    plain: pd.DataFrame
    here_curves: pd.DataFrame
    plain_curves: pd.DataFrame


def pairs(found: Results) -> list[Pair]:
    """All runs of the experiment, task by task, and their counterparts.

    Raises:
        UserError: if one is missing, or is of other settings than its run: with the command that trains it.
    """
    every = []
    for task, plan in found.experiment.tasks.items():
        here = found.runs[(found.runs.task == task) & (found.runs.stage == "tuning")]
        seeds = set(range(SEEDS["tuning"], SEEDS["tuning"] + plan.tuning_seeds))
        again = f"make sweep EXPERIMENT={found.name}"
        _complete(len(seeds), len(seeds & set(here.seed)), f"runs of {task}", again)
        again = f"python -m runners.plain {found.name} --tasks {task}"
        try:
            plain, curves = (pd.read_csv(found.folder / f"plain_{part}{task}.csv") for part in ("", "curves_"))
        except FileNotFoundError:
            raise UserError(f"the plain loops of {task} are missing: {again}") from None
        plain = plain[plain.run.isin(here.run)]  # a row of other settings has another id
        _complete(len(here), len(plain), f"plain loops of {task}", again)
        own = found.curves[found.curves.run.isin(here.run)].merge(here[["run", "seed"]], on="run")
        ends = np.sort(curves.step.unique())
        own = own.assign(step=ends[np.searchsorted(ends, own.step)])  # averaged over the same steps
        own = own.groupby(["seed", "step"])["loss"].mean().reset_index()
        every.append(Pair(task, here, plain, own, curves[curves.seed.isin(plain.seed)]))
    return every


def _complete(wanted: int, there: int, what: str, command: str) -> None:
    if there < wanted:
        raise UserError(f"{wanted - there} of {wanted} {what} are missing: {command}")


def comparison(found: Results) -> pd.DataFrame:
    """A row a task: mean and sd of the test metric of both, their difference with Welch's interval, and the seconds.

    ``low`` and ``high`` bound the 95 % interval of ``difference`` (here - plain; Welch's t, as the two have seeds of
    their own), ``half_width`` is half of it, ``within`` whether it contains 0. ``worst`` is the metric's value for a
    model that has learnt nothing. ``ratio`` is that of the mean seconds, NaN if the two are not from one device.
    """
    rows = []
    for pair in pairs(found):
        a, b, first = pair.here.test, pair.plain.test, pair.here.iloc[0]
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
        alike = set(pair.here.device_name) == set(pair.plain.device_name)
        seconds, plain_seconds = float(pair.here.seconds.mean()), float(pair.plain.seconds.mean())
        rows.append(
            {
                "task": pair.task, "steps": first.steps, "epochs": pair.plain.epochs.iloc[0],
                "metric": first.metric, "higher_is_better": first.higher_is_better, "worst": first.worst,
                "mean": a.mean(), "sd": a.std(), "n": len(a),
                "plain_mean": b.mean(), "plain_sd": b.std(), "plain_n": len(b),
                "difference": a.mean() - b.mean(), "low": interval.low, "high": interval.high,
                "half_width": (interval.high - interval.low) / 2, "within": bool(interval.low <= 0 <= interval.high),
                "seconds": seconds, "plain_seconds": plain_seconds,
                "ratio": seconds / plain_seconds if alike else np.nan,
                "device_name": ", ".join(sorted({*pair.here.device_name, *pair.plain.device_name})),
                "torch": ", ".join(sorted({*pair.here.torch, *pair.plain.torch})),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The comparison for people."""
    rows: list[dict[str, str]] = []
    for _, row in table.iterrows():
        ratio = "" if np.isnan(row.ratio) else f" = {row.ratio:.2f}"
        rows.append(
            {
                "task": row.task,
                "epochs": f"{row.epochs:.3g} ({row.steps} steps)",
                "test metric": f"{row.metric} ({'higher' if row.higher_is_better else 'lower'} is better)",
                "no learning": f"{row.worst:.3g}",
                "here": f"{row['mean']:.4g} ± {row.sd:.2g} ({row.n})",
                "plain loop": f"{row.plain_mean:.4g} ± {row.plain_sd:.2g} ({row.plain_n})",
                "difference [95 %]": f"{row.difference:+.2g} [{row.low:+.2g}, {row.high:+.2g}]",
                "half-width": f"±{row.half_width:.2g}",
                "within seed noise": "yes" if row.within else "**no**",
                "seconds, here / plain": f"{row.seconds:.0f} / {row.plain_seconds:.0f}{ratio}",
            }
        )
    return pd.DataFrame(rows)


NOTE = """The plain loops (`runners/plain.py`) are torch.optim.AdamW, LambdaLR, DataLoader and torchvision's transforms,
written out for each task; of this project they use the model and the raw data alone. Both sides have the same settings,
and seeds of their own. Mean ± sd (number of seeds) of the test metric of the last weights; difference = here − plain,
with Welch's 95 % interval. *Within seed noise*: the interval contains 0. That is as sharp as it is narrow: a difference
smaller than about the half-width would go unseen; and where three tasks agree exactly, at least one comes out a **no**
in one study of seven. *No learning*: what a model scores that has learnt nothing. Seconds are those of training one
run, without its evaluation, on one thread; here they include the measuring of norms, and whatever else the machine was
doing slows either side."""


def text(table: pd.DataFrame) -> str:
    """The comparison in Markdown."""
    outside = list(table.task[~table.within])
    if outside:
        answer = f"No: on {' and '.join(outside)} they end apart by more than the noise of seeds explains."
    else:
        answer = (
            f"Within the noise of seeds, yes, on each of {len(table)} task{'s'[: len(table) - 1]}. "
            "How large a difference might still hide in it, the half-width tells."
        )
    machine = f"On {'; '.join(sorted(set(table.device_name)))}, torch {'; '.join(sorted(set(table.torch)))}."
    shown = readable(table).to_markdown(index=False, disable_numparse=True)
    parts = ["# Do runs of this project end where a plain torch loop ends?", answer, shown, NOTE, machine]
    return "\n\n".join([*parts, "![training loss of both](figures/plain_loops.png)"]) + "\n"


def write(found: Results) -> pd.DataFrame:
    """Write results/<experiment>/plain_loops.csv and .md; the comparison."""
    table = comparison(found)
    write_whole(found.folder / "plain_loops.csv", table.to_csv(index=False, float_format="%.6g"))
    write_whole(found.folder / BESIDE_PLAIN, text(table))
    return table


def figure(found: Results) -> tuple[Figure, pd.DataFrame]:
    """The training loss against the step, a panel a task: thin lines are seeds, thick ones their mean; and the
    numbers plotted (task, loop, seed, step, loss, mean)."""
    every = pairs(found)
    drawn, axes = panels(len(every), 1, (3.4, 2.6))
    tables = []
    for pair, ax in zip(every, axes, strict=True):
        for loop, curves in ((HERE, pair.here_curves), (PLAIN, pair.plain_curves)):
            curves = curves.assign(mean=curves.groupby("step").loss.transform("mean"))
            for _, seed in curves.groupby("seed"):
                ax.plot(seed.step, seed.loss, **LOOKS[loop], linewidth=0.5, alpha=0.5)
            mean = curves.drop_duplicates("step").sort_values("step")
            ax.plot(mean.step, mean["mean"], **LOOKS[loop], linewidth=1.8)
            tables.append(curves.assign(task=pair.task, loop=loop)[["task", "loop", "seed", "step", "loss", "mean"]])
        ax.set(title=pair.task.replace("_", " "), xlabel="step")
    axes[0].set_ylabel("training loss (nats)\nmean of 20 steps")
    handles = [
        *(Line2D([], [], **look, linewidth=1.8, label=f"{loop}, mean") for loop, look in LOOKS.items()),
        *(Line2D([], [], **look, linewidth=0.5, label=f"{loop}, seeds") for loop, look in LOOKS.items()),
    ]
    drawn.legend(handles=handles, loc="outside upper center", ncols=4)
    return drawn, pd.concat(tables, ignore_index=True)
