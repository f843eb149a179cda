"""Optimizers side by side, each at the rate that was best for it: experiments without a reference arm."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import t as student

from analysis.statistics import sensitivity
from analysis.style import BLUE, GREY, ORANGE, PURPLE, VERMILION, panels
from analysis.tables import Results
from runners.config import UserError

LIKE = "adam"
"""The arm that step times are given in multiples of, where there is one."""


def ranking(found: Results) -> pd.DataFrame:
    """One row a task and arm, tasks in the experiment's order, the best arm over all tasks first.

    Columns: task, arm; lr, multiple (of the published rate), at_edge (of the grid): the rate of the tests, chosen on
    validation data with tuning seeds; validation (there); sensitivity: how much the grid loses on average to its own
    best (statistics.sensitivity), as a share of what lies between the task's worst value and the best arm's; test
    (mean over the test seeds), sd, low and high (over the seeds), n; rank (of ``test`` on its task) and mean_rank
    (over the tasks); diverged and tried (runs, of tuning and test); step_ms: milliseconds of a training step,
    measured side by side (runners.timing), and step_ratio: that over the arm ``adam``'s.

    Raises:
        UserError: if a run of the design is missing, naming the command that makes it.
    """
    rows = [_row(found, task, arm) for task in found.experiment.tasks for arm in found.experiment.arms]
    table = pd.DataFrame(rows).merge(found.step_times[["task", "arm", "step_ms"]], how="left")
    sign = table.pop("higher").map({True: -1.0, False: 1.0})
    best = (sign * table.validation).groupby(table.task).transform("min")
    table["sensitivity"] /= sign * table.pop("worst") - best
    table["rank"] = (sign * table.test).groupby(table.task).rank()
    table["mean_rank"] = table.groupby("arm")["rank"].transform("mean")
    like = table[table.arm == LIKE].set_index("task").step_ms
    table["step_ratio"] = table.step_ms / table.task.map(like)
    place = {task: i for i, task in enumerate(found.experiment.tasks)}
    order = pd.DataFrame({"task": table.task.map(place), "rank": table.mean_rank, "arm": table.arm})
    return table.loc[order.sort_values(["task", "rank", "arm"]).index].reset_index(drop=True)


def _row(found: Results, task: str, arm: str) -> dict[str, Any]:
    plan = found.experiment.tasks[task]
    runs = found.runs[(found.runs.task == task) & (found.runs.arm == arm)]
    tuning, test = runs[runs.stage == "tuning"], runs[runs.stage == "test"]
    lacking = len(plan.lrs) * plan.tuning_seeds - len(tuning), plan.test_seeds - len(test)
    if any(lacking):
        raise UserError(f"{sum(lacking)} runs of {arm} on {task} are missing: make sweep EXPERIMENT={found.name}")
    higher, worst = bool(runs.higher_is_better.iloc[0]), float(runs.worst.iloc[0])
    mean = tuning.groupby("lr").validation.mean()  # in order of lr, as plan.lrs
    lr = float(test.lr.iloc[0])
    at = int(np.argmin(np.abs(mean.index.to_numpy() / lr - 1)))
    return {
        "task": task,
        "arm": arm,
        "metric": runs.metric.iloc[0],
        "higher": higher,
        "worst": worst,
        "lr": lr,
        "multiple": plan.lrs[at],
        "at_edge": at in (0, len(mean) - 1),
        "validation": mean.iloc[at],
        "sensitivity": sensitivity(mean.to_numpy(), worst, higher),
        "test": test.test.mean(),
        "sd": test.test.std(),
        "low": test.test.min(),
        "high": test.test.max(),
        "n": len(test),
        "diverged": int((runs.status == "diverged").sum()),
        "tried": len(runs),
    }


def figure(found: Results) -> tuple[Figure, pd.DataFrame]:
    """The ranking as a picture: a line an arm, the best mean rank on top; and the table plotted.

    First a panel a task with the test metric (dots are seeds; diamonds their mean, hollow where the best rate was at
    an edge of the grid); then, for all tasks, the sensitivity to the rate, the share of diverged runs and the time
    of a step.
    """
    table = ranking(found)
    tasks = list(found.experiment.tasks)
    arms = list(table[table.task == tasks[0]].arm)
    y = {arm: i for i, arm in enumerate(arms)}
    colours = dict(zip(tasks, (BLUE, VERMILION, ORANGE, PURPLE, GREY), strict=False))
    drawn, axes = panels(len(tasks) + 3, 1, (1.95, 1.2 + 0.2 * len(arms)), share_y=True)
    for task, ax in zip(tasks, axes, strict=False):
        of_task = table[table.task == task].set_index("arm")
        tests = found.runs[(found.runs.task == task) & (found.runs.stage == "test")]
        colour = colours[task]
        ax.plot(tests.test, tests.arm.map(y), "o", color=colour, markersize=3, alpha=0.45, markeredgewidth=0)
        for edge, face in ((True, "white"), (False, colour)):
            part = of_task[of_task.at_edge == edge]
            ax.plot(part.test, part.index.map(y), "|", color=colour, markersize=9, markeredgewidth=1.6)
            ax.plot(part.test, part.index.map(y), "D", color=colour, markerfacecolor=face, markersize=4)
        better = "higher" if tests.higher_is_better.iloc[0] else "lower"
        ax.set(title=task.replace("_", " "), xlabel=f"test {of_task.metric.iloc[0]}\n({better} is better)")
    for ax, column, label in zip(
        axes[len(tasks) :], ("sensitivity", "share_diverged", "step_ratio"),
        ("sensitivity to\nthe rate (share)", "share of runs\ndiverged", f"time of a step\n/ {LIKE}'s"), strict=True,
    ):  # fmt: skip
        values = table.diverged / table.tried if column == "share_diverged" else table[column]
        middle = (len(tasks) - 1) / 2
        for shift, task in zip(0.2 * (np.arange(len(tasks)) - middle), tasks, strict=True):
            own = table.task == task
            ax.plot(values[own], table.arm[own].map(y) + shift, "o", color=colours[task], markersize=3.5)
        ax.set_xlabel(label)
        ax.set_xlim(0, 1.08 * float(values.max()) or 1)
    _lines(axes, arms)
    handles = [Line2D([], [], color=colours[task], marker="o", linestyle="", label=task.replace("_", " "))
               for task in tasks]  # fmt: skip
    handles += [
        Line2D([], [], color=GREY, marker="D", linestyle="", label="mean of the test seeds"),
        Line2D([], [], color=GREY, marker="D", markerfacecolor="white", linestyle="", label="best rate at an edge"),
    ]
    drawn.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return drawn, table


def _lines(axes: list[Axes], arms: list[str]) -> None:
    for ax in axes:
        ax.grid(visible=False, axis="y")
        for i in range(0, len(arms), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)


LIMITS = (
    "Every optimizer has the same number of rates and the same span around the rate its authors publish, chosen on "
    "validation data with other seeds than those of the test. So this shows what an optimizer gives out of the box "
    "and after {trials} trials, on {tasks} small task{s} and short runs. It cannot rank neighbours: with {n} seeds "
    "the mean of an arm is known to about ±{half:.2g} of its sd, neighbours change places with the seeds, and one "
    "grid step is a factor of {step:g}, within which the best rate of one may be hit and of another missed. A best "
    "rate at an edge of the grid may lie beyond it. It says nothing about long training, other sizes, tuned "
    "momenta, warmups or weight decay."
)


def limits(found: Results) -> str:
    """What the ranking can and cannot say at its size, in words."""
    plan = next(iter(found.experiment.tasks.values()))
    half = float(student.ppf(0.975, plan.test_seeds - 1)) / math.sqrt(plan.test_seeds)
    tasks = len(found.experiment.tasks)
    return LIMITS.format(
        n=plan.test_seeds, half=half, step=plan.lrs[1] / plan.lrs[0] if len(plan.lrs) > 1 else 1,
        trials=len(plan.lrs) * plan.tuning_seeds, tasks=tasks, s="s" if tasks > 1 else "",
    )  # fmt: skip


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The ranking for people: a line an arm, the best mean rank first."""
    rows: list[dict[str, str]] = []
    for arm, own in table.groupby("arm", sort=False):
        row = {"optimizer": str(arm), "mean rank": f"{own.mean_rank.iloc[0]:.1f}"}
        for one in own.itertuples():
            edge = ", edge" if one.at_edge else ""
            row[f"{one.task}: test {one.metric}"] = f"{one.test:.4g} ± {one.sd:.2g} (lr {one.lr:g}{edge})"
        row["lr sensitivity (share)"] = f"{own.sensitivity.mean():.2f}"
        row["diverged"] = f"{own.diverged.sum()}/{own.tried.sum()}"
        row[f"step / {LIKE}'s"] = " ".join(f"{ratio:.2f}" for ratio in own.step_ratio)
        rows.append(row)
    return pd.DataFrame(rows)
