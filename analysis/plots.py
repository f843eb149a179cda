"""The figures of an experiment: functions from its tables to a figure and the numbers it shows.

Each takes ``runs`` (runs.csv; see runners.collect.row), ``curves`` (curves.parquet) or the verdicts, and the
experiment, which says what cells there must be; and returns the figure and the table of what is plotted, for
``figures.save``. A diverged run is drawn and counted at its task's worst value. A cell that is missing, not a
number, or not of the design is a ValueError that names the command which mends it. Nothing here trains.
"""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain, pairwise, product
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pandas as pd
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from analysis.style import ARMS, BLACK, GREEN, GREY, PURPLE, VERMILION, looks, panels
from analysis.verdicts import in_words
from runners.experiment import SEEDS, Experiment, Stage

Drawn: TypeAlias = tuple[Figure, pd.DataFrame]
Key = TypeVar("Key", bound=Hashable)

MARKERS = dict(zip(ARMS, "soh^vDp*", strict=True))
"""One marker for each arm of ``style.ARMS``; a cross is a diverged run, of whatever arm."""
NAMES = {"none": "no warmup", "radam": "RAdam", "sgd": "SGD", "adamw": "AdamW", "adan": "Adan"}
VERDICTS = {
    "supported": (GREEN, "o"),
    "refuted": (VERMILION, "D"),
    "inconclusive": (GREY, "s"),
    "not comparable": (PURPLE, ""),
}
BAND = "#ECECEC"
PLAIN = FuncFormatter(lambda x, _: f"{x:g}".replace("-", "\u2212"))
VALUES = 90_000
"""About how many losses the table of a figure of training curves holds: it stays below 1 MB."""


def lr_curves(runs: pd.DataFrame, experiment: Experiment) -> Drawn:
    """The validation metric against the learning rate (tuning runs), a panel a task.

    Dots are seeds, lines their mean, crosses diverged runs, which count as the worst value (dashed). The dotted
    line marks the primary lr. Arms are moved sideways a little, in the figure and not in the table.
    Table: task, arm, lr, seed, status, metric, value, mean (over the seeds), worst, primary_lr.
    """
    figure, axes = _grid(_wrapped(experiment.tasks, ["tuning"]), size=(3.4, 2.8))
    arm_looks, tables = _looks(experiment.arms), []
    for (task, _), ax in axes.items():
        cells = _cells(runs, experiment, "tuning", task, "validation")
        cells["mean"] = cells.groupby(["arm", "lr"]).value.transform("mean")
        primary = _primary(runs, experiment, task)
        lrs = experiment.tasks[task].lrs
        # Of the way between two rates, but little of the whole axis, or lines between two rates would not be compared
        # where they are.
        width = min(0.16 * math.log(_step(lrs)), 0.04 * math.log(max(lrs) / min(lrs)))
        for arm, shift in zip(experiment.arms, _dodge(len(experiment.arms), width), strict=True):
            part = cells[cells.arm == arm].sort_values(["lr", "seed"])
            x = part.lr * math.exp(shift)
            _seeds(ax, x, part, arm_looks[arm])
            look = {**arm_looks[arm], "marker": "", "zorder": _above(arm_looks[arm])}
            ax.plot(x.groupby(part.lr).first(), part.groupby("lr")["mean"].first(), **look)
        _worst(ax, cells)
        ax.axvline(primary, color=BLACK, linestyle=":", linewidth=1, zorder=1)
        ax.set(title=_label(task), ylabel=_metric(cells, "validation", "\n"), xscale="log", xlabel="learning rate")
        _lr_ticks(ax, lrs)
        tables.append(cells.assign(primary_lr=primary))
    table = pd.concat(tables)
    extra = [Line2D([], [], color=BLACK, linestyle=":", linewidth=1, label="primary lr")]
    _legend(figure, [*_handles(arm_looks), *_diverged_handle(table), *extra])
    columns = ["task", "arm", "lr", "seed", "status", "metric", "value", "mean", "worst", "primary_lr"]
    return figure, table[columns].reset_index(drop=True)


def training_curves(runs: pd.DataFrame, curves: pd.DataFrame, experiment: Experiment) -> Drawn:
    """Training loss against the step, of the test runs at the primary lr and, in a row below, at the high lr.

    Thin lines are seeds, the thick one their median, in which a diverged run counts as infinitely high; the
    crosses on top say where runs diverged. What is drawn, and stored, is the mean of the last 2 % of the budget
    (of what there is, at the start), at evenly spaced steps. Shaded, where an arm has an untuned warmup: that of the
    linear one, 2 / (1 - beta2).
    Table: task, stage, lr, arm, step, median, diverged (seeds, up to that step), and one column a seed.
    """
    figure, axes = _grid(_wrapped(experiment.tasks, _stages(runs, experiment)), size=(3.4, 2.6))
    arm_looks, tables = _looks(experiment.arms), []
    every = {key: _cells(runs, experiment, key[1], key[0], "test") for key in axes}
    points = _points(every.values())
    lengths = {key: _untuned_length(cells) for key, cells in every.items()} if _is_untuned(experiment) else {}
    for (task, stage), ax in axes.items():
        cells = every[task, stage]
        lr, steps, length = cells.lr.iloc[0], int(cells.steps.max()), lengths.get((task, stage))
        if length is not None:
            ax.axvspan(0, min(length, steps), color=BAND, linewidth=0, zorder=0)
        at = np.unique(np.linspace(1, steps, points).round()).astype(int)
        drawn = _losses(ax, cells, curves, experiment, {a: arm_looks[a] for a in cells.arm.unique()}, at)
        tables.append(drawn.assign(task=task, stage=stage, lr=lr))
        kind = "primary" if stage == "test" else stage
        ax.set(title=f"{_label(task)}, {kind} lr {lr:g}", xlim=(0, steps), xlabel="step")
        ax.set_ylabel(_loss_label(steps))
    table = pd.concat(tables)
    handles: list[Line2D | Patch] = [*_handles(arm_looks, markers=False)]
    handles += _diverged_handle(pd.concat(every.values()), counted=False)
    if any(length is not None for length in lengths.values()):
        handles.append(Patch(color=BAND, label="untuned linear warmup"))
    _legend(figure, handles)
    return figure, _first(table, ["task", "stage", "lr", "arm", "step", "median", "diverged"])


def final_metrics(runs: pd.DataFrame, experiment: Experiment) -> Drawn:
    """The test metric of every test run: the raw data of the claims; the high lr, if there is one, below.

    A dot is a seed, a cross a diverged run at the worst value, a bar the mean of an arm; grey lines join the
    runs of a seed. ``again`` is the reference arm on the control seeds (the A/A comparison), which pair with
    nothing. Table: task, stage, lr, arm, seed, status, metric, value, mean, worst.
    """
    figure, axes = _grid(_wrapped(experiment.tasks, _stages(runs, experiment)), size=(3.4, 2.7))
    arm_looks, tables = _looks(experiment.arms), []
    for (task, stage), ax in axes.items():
        cells = _cells(runs, experiment, stage, task, "test")
        shown = [(arm, cells[cells.arm == arm]) for arm in experiment.arms if (cells.arm == arm).any()]
        seeds = sorted(cells.seed.unique())
        spread = dict(zip(seeds, _dodge(len(seeds), 0.45), strict=True))
        for seed, pair in cells.groupby("seed"):
            value = pair.set_index("arm").value
            ax.plot(
                [i + spread[seed] for i in range(len(shown))],
                [value[arm] for arm, _ in shown],
                color="#C8C8C8",
                linewidth=0.5,
                zorder=1,
            )
        names = [_label(arm) for arm, _ in shown]
        if stage == "test" and experiment.tasks[task].control_seeds:
            assert experiment.reference is not None
            control = _cells(runs, experiment, "control", task, "test")
            shown.append((experiment.reference, control))
            names.append(f"{_label(experiment.reference)} again")
        for i, (arm, part) in enumerate(shown):
            part = part.sort_values("seed")
            x = pd.Series(i + np.array(_dodge(len(part), 0.45)), index=part.index)
            _seeds(ax, x, part, {**arm_looks[arm], "marker": "o"})  # as the legend says: places tell arms apart
            mean = part.value.mean()
            ax.plot([i - 0.36, i + 0.36], [mean, mean], color=arm_looks[arm]["color"], linewidth=2)
            tables.append(part.assign(mean=mean))
        if _at_worst(cells).any():
            _worst(ax, cells, label="right")
        kind = "primary" if stage == "test" else stage
        ax.set(title=f"{_label(task)}, {kind} lr {cells.lr.iloc[0]:g}", ylabel=_metric(cells, "test", "\n"))
        ax.set_xticks(range(len(shown)), [name.replace(" ", "\n") for name in names], size=7)
        ax.set_xlim(-0.55, len(shown) - 0.45)
        ax.grid(visible=False, axis="x")
    table = pd.concat(tables)
    one = Line2D([], [], color=GREY, linestyle="", marker="o", alpha=0.6, label="one seed")
    bar = Line2D([], [], color=GREY, linewidth=2, label="mean")
    joined = Line2D([], [], color="#C8C8C8", linewidth=0.8, label="same seed")
    _legend(figure, [one, bar, joined, *_diverged_handle(table)])
    columns = ["task", "stage", "lr", "arm", "seed", "status", "metric", "value", "mean", "worst"]
    return figure, table[columns].reset_index(drop=True)


def differences(verdicts: pd.DataFrame, runs: pd.DataFrame, experiment: Experiment) -> Drawn:
    """Every claim on every task: the mean paired difference and its 90 % interval against the margin.

    Drawn in margins, so that tasks share an axis, with the sign turned so that the arm is better to the right;
    the axis is linear up to 2 margins and logarithmic beyond. To the right of it the numbers in units of the
    metric (arm - reference) and the verdict. A row that has no interval says why. ``runs`` gives the direction
    of the metric. Table: the verdicts, and relative, relative_low, relative_high.
    """
    wanted = {(claim, task) for claim in experiment.claims for task in experiment.tasks}
    missing = sorted(wanted - set(zip(verdicts.claim, verdicts.task, strict=True)))
    if missing:
        what = "{} for {}".format(*missing[0])
        raise ValueError(f"{experiment.name} has no verdict on {what}: {_command(experiment)}")
    better = runs.groupby("task").higher_is_better.first()
    table = verdicts.copy()
    direction = table.task.map(lambda t: 1.0 if bool(better.get(t, True)) else -1.0)
    scaled = direction / table.margin.where(table.margin > 0)
    table["relative"] = table.difference * scaled
    ends = pd.concat([table.low * scaled, table.high * scaled], axis=1)
    table["relative_low"], table["relative_high"] = ends.min(axis=1), ends.max(axis=1)

    # A line of the figure is a row of the table, or a piece of a heading with the verdict over all tasks.
    lines: list[tuple[str, pd.Series[Any] | None, str]] = []
    for name, claim in experiment.claims.items():
        own = table[table.claim == name]
        combined = own[~own.task.isin(list(experiment.tasks))].verdict
        scope = "on at least one task" if claim.kind == "sensitivity" else "over all tasks"
        for i, part in enumerate(textwrap.wrap(claim.hypothesis, 74)):
            lines.append((part, None, f"{combined.iloc[0]} {scope}" if len(combined) and i == 0 else ""))
        for _, tested in own[own.task.isin(list(experiment.tasks))].iterrows():
            lines.append((f"{_label(tested.task)}, {tested['at']} lr {tested.lr:g}", tested, ""))
    figure, (ax,) = panels(size=(10.4, 0.85 + 0.23 * len(lines)))
    ax.axvspan(-1, 1, color=BAND, linewidth=0, zorder=0)
    ax.axvline(0, color=GREY, linewidth=0.7, zorder=1)
    ax.spines.left.set_visible(False)  # the headings reach across it

    def write(text: str, y: float, offset: float, x: int = 1, **look: Any) -> None:
        ax.annotate(text, (x, y), (offset, 0), ax.get_yaxis_transform(), "offset points", va="center", size=8, **look)

    left = -8 - 4.3 * max(len(text) for text, row, _ in lines if row is not None)
    for i, (text, row, overall) in enumerate(lines):
        if row is None:
            ax.axhspan(i - 0.5, i + 0.5, color="white", linewidth=0, zorder=1.5)
            write(text, i, left, x=0, weight="bold")
            if overall:
                colour = next(colour for verdict, (colour, _) in VERDICTS.items() if overall.startswith(verdict))
                write(overall, i, 10, weight="bold", color=colour)
            continue
        # Where no warmup is to be told apart from warmup, that it is refuted to be the same is the welcome answer.
        turned = {"refuted": "supported", "supported": "refuted"} if row.kind == "sensitivity" else {}
        colour, marker = VERDICTS[turned.get(row.verdict, row.verdict)]
        ax.plot([row.relative_low, row.relative_high], [i, i], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot([row.relative], [i], color=colour, marker=marker, markersize=4.5)
        write(in_words(row), i, 10, color=colour)
        write(_numbers(row), i, 150)
    write("verdict", -1, 10, color="#606060")
    write("arm \u2212 reference [90 % interval], margin, pairs", -1, 150, color="#606060")
    ticks = [(i, text) for i, (text, row, _) in enumerate(lines) if row is not None]
    ax.set_yticks([i for i, _ in ticks], [text for _, text in ticks])
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("arm worse $\\leftarrow$ difference / margin $\\rightarrow$ arm better")
    extent = float(np.nanmax([1.3, *table[["relative", "relative_low", "relative_high"]].abs().to_numpy().flat]))
    if extent > 2:
        ax.set_xscale("symlog", linthresh=2, linscale=1.5)
        ax.set_xlabel(f"{ax.get_xlabel()} (logarithmic beyond \u00b12)")
        beyond = [10**k for k in range(1, 9) if 10**k <= extent * 1.5] or [5 if extent > 4 else 3]
        ax.set_xticks([*(-b for b in reversed(beyond)), -1, 0, 1, *beyond])
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(-extent * 1.5, extent * 1.5)
    ax.xaxis.set_major_formatter(PLAIN)
    return figure, table


def length_heatmap(runs: pd.DataFrame, experiment: Experiment) -> Drawn:
    """The mean validation metric over learning rate and warmup length (tuning runs), a panel a task.

    Columns: no warmup, the linear warmups by length in steps, the untuned one framed at 2 / (1 - beta2), and,
    set apart, the arms that have no such length. Brighter is better. Diverged runs count as the worst value, and
    a cell that has some says how many. Table: task, arm, tau, lr, metric, mean, diverged, seeds.
    """
    rows = [[task] for task in experiment.tasks]
    lengthy = len(experiment.arms)
    tall = max(len(plan.lrs) for plan in experiment.tasks.values())
    figure, axes = _grid(rows, size=(1.6 + 0.62 * lengthy, 0.9 + 0.42 * tall))
    tables = []
    for task, ax in axes.items():
        cells = _with_lengths(_cells(runs, experiment, "tuning", task, "validation"), experiment)
        table = (
            cells.assign(diverged=cells.status == "diverged")
            .groupby(["task", "arm", "lr", "metric", "tau"], sort=False, dropna=False)
            .agg(mean=("value", "mean"), diverged=("diverged", "sum"), seeds=("seed", "size"))
            .reset_index()
        )
        higher = bool(cells.higher_is_better.iloc[0])
        order = _by_length(table)
        lrs = experiment.tasks[task].lrs
        gap = sum(not math.isnan(tau) for _, tau in order) + any(arm == "none" for arm, _ in order)
        place = {arm: i + 0.25 * (i >= gap) for i, (arm, _) in enumerate(order)}
        colour = colormaps["viridis" if higher else "viridis_r"]
        scale = colors.Normalize(table["mean"].min(), table["mean"].max())
        columns = [table[c] for c in ("arm", "lr", "mean", "diverged", "seeds")]
        for arm, lr, mean, diverged, seeds in zip(*columns, strict=True):
            x, y = place[arm], int(np.argmin(np.abs(np.array(lrs) - lr)))
            shade = colour(scale(mean))
            ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=0.5))
            text = f"{mean:#.3g}" + (f"\n{diverged}/{seeds} div." if diverged else "")
            dark = np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.45
            ink = "white" if dark else BLACK
            ax.text(x, y, text, ha="center", va="center", size=7, color=ink, linespacing=1.05)
        if "untuned_linear" in place:
            frame = (place["untuned_linear"] - 0.5, -0.5)
            ax.add_patch(Rectangle(frame, 1, len(lrs), fill=False, edgecolor=VERMILION, linewidth=2, zorder=3))
        ticks = [f"{tau:g}" if not math.isnan(tau) else _label(arm).replace(" ", "\n") for arm, tau in order]
        ticks = [f"{t}\nuntuned" if arm == "untuned_linear" else t for (arm, _), t in zip(order, ticks, strict=True)]
        ax.set_xticks([place[arm] for arm, _ in order], ticks)
        ax.set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        ax.set(xlim=(-0.5, max(place.values()) + 0.5), ylim=(-0.5, len(lrs) - 0.5))
        ax.set(title=f"{_label(task)}: mean {_metric(cells, 'validation')}", ylabel="learning rate")
        ax.set_xlabel("length of the linear warmup $\\tau$ (steps)")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        tables.append(table)
    order_of_columns = ["task", "arm", "tau", "lr", "metric", "mean", "diverged", "seeds"]
    return figure, pd.concat(tables, ignore_index=True)[order_of_columns]


def length_curves(runs: pd.DataFrame, experiment: Experiment) -> Drawn:
    """The validation metric against the length of a linear warmup, a row a task and a panel a learning rate.

    The design of RAdam's Figure 7. Dots are seeds, crosses diverged runs at the worst value, the line the mean
    of the linear warmups, on which the untuned length 2 / (1 - beta2) is marked; horizontal lines are the means
    of the arms without such a length, with their seeds at the sides (no warmup left, the others right).
    Table: task, arm, tau, lr, seed, status, metric, value, mean, worst.
    """
    rows = [[(task, lr) for lr in plan.lrs] for task, plan in experiment.tasks.items()]
    figure, axes = _grid(rows, size=(2.2, 2.3), narrow=True)
    linear: dict[str, Any] = {"color": ARMS["linear"][0], "linestyle": "-", "marker": MARKERS["linear"]}
    tables = []
    arm_looks: dict[str, dict[str, Any]] = {}
    for task, plan in experiment.tasks.items():
        cells = _with_lengths(_cells(runs, experiment, "tuning", task, "validation"), experiment)
        cells["mean"] = cells.groupby(["arm", "lr"]).value.transform("mean")
        order = _by_length(cells)
        taus = [tau for _, tau in order if not math.isnan(tau)]
        flat = [arm for arm, tau in order if math.isnan(tau)]
        arm_looks = _looks([*flat, "untuned_linear"])
        row_axes = [axes[task, lr] for lr in plan.lrs]
        for i, (lr, ax) in enumerate(zip(plan.lrs, row_axes, strict=True)):
            if i:  # before anything is drawn: sharing takes over the limits as they are
                ax.sharey(row_axes[0])
                ax.tick_params(labelleft=False)
            here = cells[np.isclose(cells.lr, lr)]
            timed = here[here.tau.notna()].sort_values(["tau", "seed"])
            mean = timed.groupby("tau")["mean"].first()
            right = max(taus)
            for arm in flat:
                part = here[here.arm == arm]
                look = arm_looks[arm]
                ax.axhline(part["mean"].iloc[0], color=look["color"], linestyle=look["linestyle"], linewidth=1.2)
                right *= 1 if arm == "none" else 1.7
                edge = min(taus) / 1.7 if arm == "none" else right
                _seeds(ax, pd.Series(edge, index=part.index), part, look)
            _seeds(ax, timed.tau, timed, linear)
            ax.plot(mean.index, mean, color=linear["color"])
            untuned = timed[timed.arm == "untuned_linear"]
            if len(untuned):
                look = arm_looks["untuned_linear"]
                ax.axvline(untuned.tau.iloc[0], color=look["color"], linestyle=":", linewidth=1, zorder=1)
                ax.plot(untuned.tau.iloc[0], untuned["mean"].iloc[0], **{**look, "markersize": 7, "zorder": 4})
            if _at_worst(cells).any():
                _worst(ax, cells, label="" if i else "left")
            ax.set(title=f"{_label(task)}, lr {lr:g}", xscale="log", xlabel="warmup length $\\tau$ (steps)")
            ax.xaxis.set_major_locator(FixedLocator(_apart(taus, 1.6)))
            ax.xaxis.set_minor_locator(FixedLocator(taus))
            ax.xaxis.set_major_formatter(PLAIN)
            ax.xaxis.set_minor_formatter(NullFormatter())
            if not i:
                ax.set_ylabel(_metric(cells, "validation", "\n"))
        tables.append(cells)
    table = pd.concat(tables)
    untuned_look = arm_looks.pop("untuned_linear")
    handles = [Line2D([], [], **linear, label="linear warmup"), *_handles(arm_looks)]
    if "untuned_linear" in experiment.arms:
        handles.insert(1, Line2D([], [], **untuned_look | {"linestyle": ":"}, label="untuned length"))
    _legend(figure, [*handles, *_diverged_handle(table)])
    columns = ["task", "arm", "tau", "lr", "seed", "status", "metric", "value", "mean", "worst"]
    return figure, table[columns].reset_index(drop=True)


def length_training(runs: pd.DataFrame, curves: pd.DataFrame, experiment: Experiment) -> Drawn:
    """The early training loss for every warmup length, a row a task and a panel a learning rate (tuning runs).

    Up to twice the untuned length, or the longest one if that is more. Lines as in ``training_curves``; a darker
    one has a longer warmup. Table: task, lr, arm, tau, step, median, diverged, and one column a seed.
    """
    rows = [[(task, lr) for lr in plan.lrs] for task, plan in experiment.tasks.items()]
    figure, axes = _grid(rows, size=(2.2, 2.3), narrow=True)
    every = {
        task: _with_lengths(_cells(runs, experiment, "tuning", task, "validation"), experiment)
        for task in experiment.tasks
    }
    points = _points(every.values())
    tables = []
    handles: dict[str, Line2D] = {}
    for task, cells in every.items():
        order = _by_length(cells)
        fixed = [arm for arm, _ in order if not _is_linear(arm)]
        ramp = colormaps["YlOrBr"](np.linspace(0.35, 0.95, max(1, len(order) - len(fixed))))
        arm_looks = _looks(fixed) | {
            arm: {"color": colors.to_hex(c), "linestyle": "-"}
            for arm, c in zip([arm for arm, _ in order if _is_linear(arm)], ramp, strict=False)
        }
        length = _untuned_length(cells)
        steps = int(cells.steps.max())
        end = int(min(steps, max(cells.tau.max(), 2 * (length or 0))))
        at = np.unique(np.linspace(1, end, points).round()).astype(int)
        tau = dict(order)
        for lr in experiment.tasks[task].lrs:
            ax = axes[task, lr]
            if length is not None and "untuned_linear" in tau:
                ax.axvline(length, color=ARMS["untuned_linear"][0], linestyle=":", linewidth=1, zorder=1)
            here = cells[np.isclose(cells.lr, lr)]
            drawn = _losses(ax, here, curves, experiment, {arm: arm_looks[arm] for arm, _ in order}, at)
            tables.append(drawn.assign(task=task, lr=lr, tau=drawn.arm.map(tau)))
            ax.set(title=f"{_label(task)}, lr {lr:g}", xlim=(0, end), xlabel="step")
            if lr == experiment.tasks[task].lrs[0]:
                ax.set_ylabel(_loss_label(steps))
        for arm, _ in order:
            label = f"$\\tau$ = {tau[arm]:g}" if _is_linear(arm) else _label(arm)
            handles.setdefault(arm, Line2D([], [], **{**arm_looks[arm], "marker": ""}, label=label))
    _legend(figure, [*handles.values(), *_diverged_handle(pd.concat(every.values()), counted=False)])
    return figure, _first(pd.concat(tables), ["task", "lr", "arm", "tau", "step", "median", "diverged"])


def varies_length(experiment: Experiment) -> bool:
    """Whether an experiment is about the length of a warmup: it has arms called linear_<tau>."""
    return any(_is_linear(arm) for arm in experiment.arms)


# -- cells ------------------------------------------------------------------------------------------------------


def _cells(runs: pd.DataFrame, experiment: Experiment, stage: Stage, task: str, value: str) -> pd.DataFrame:
    """The rows of a task's stage, exactly those of the design; column ``value`` is the metric of record."""
    plan, reference = experiment.tasks[task], experiment.reference
    rows = runs[(runs.stage == stage) & (runs.task == task)]
    given = [float(lr) for lr in rows.lr.unique()]
    # Only what tuning found depends on the data: the primary lr, which is then the only one of its stage.
    lrs = list(plan.lrs) if stage == "tuning" else [plan.high_lr] if stage == "high" else given or [math.nan]
    probed = [c.arm for c in experiment.claims.values() if c.kind == "sensitivity" and c.arm]
    high = list(dict.fromkeys([reference, *probed]))
    arms = high if stage == "high" else [reference] if stage == "control" else list(experiment.arms)
    count = {"tuning": plan.tuning_seeds, "control": plan.control_seeds}.get(stage, plan.test_seeds)
    seeds = range(SEEDS[stage], SEEDS[stage] + count)
    wanted = {(arm, f"{lr:.8g}", seed) for arm, lr, seed in product(arms, lrs, seeds)}
    known = rows[np.isfinite(rows[value].to_numpy(dtype=float))]
    found = Counter((arm, f"{lr:.8g}", seed) for arm, lr, seed in zip(known.arm, known.lr, known.seed, strict=True))
    for wrong, says in (
        (wanted - found.keys(), "is missing"),
        (found.keys() - wanted, "is not in its design"),
        ({cell for cell, times in found.items() if times > 1}, "is there twice"),
    ):
        if wrong:
            arm, lr, seed = min(wrong, key=str)
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            at = "" if lr == "nan" else f" at lr {lr}"
            raise ValueError(
                f"{experiment.name}: the {stage} run of {arm} on {task}{at}, seed {seed}, {says}{more}: "
                f"{_command(experiment)}"
            )
    if len({lr for _, lr, _ in found}) > 1 and stage != "tuning":
        raise ValueError(f"{experiment.name}: the {stage} runs of {task} have several lrs: {_command(experiment)}")
    return rows.assign(value=rows[value].astype(float))


def _command(experiment: Experiment) -> str:
    return f"make sweep EXPERIMENT={experiment.name}"


def _primary(runs: pd.DataFrame, experiment: Experiment, task: str) -> float:
    """The lr of the test runs; without any, the one at which they will be (runners.experiment.best_lr)."""
    tested = runs[(runs.stage == "test") & (runs.task == task)]
    if len(tested):
        return float(tested.lr.iloc[0])
    tuning = runs[(runs.stage == "tuning") & (runs.task == task) & (runs.arm == experiment.reference)]
    mean = tuning.groupby("lr").validation.mean()
    best: Any = mean.idxmax() if tuning.higher_is_better.iloc[0] else mean.idxmin()
    return float(best)


def _stages(runs: pd.DataFrame, experiment: Experiment) -> dict[str, list[Stage]]:
    """The stages on test seeds that each task has: there is no high lr if tuning chose that very lr."""
    stages: dict[str, list[Stage]] = {}
    for task, plan in experiment.tasks.items():
        primary = _primary(runs, experiment, task)
        same = plan.high_lr is None or math.isclose(plan.high_lr, primary, rel_tol=1e-7)
        stages[task] = ["test"] if same else ["test", "high"]
    return stages


def _untuned_length(cells: pd.DataFrame) -> float | None:
    """2 / (1 - beta2) of a task, None if there is no beta2 or, without an untuned arm, more than one."""
    arm = cells[cells.arm == "untuned_linear"] if (cells.arm == "untuned_linear").any() else cells
    betas = arm.beta2.dropna().unique()
    if len(betas) > 1:
        return None
    return float(f"{2 / (1 - betas[0]):.9g}") if len(betas) else None


def _is_untuned(experiment: Experiment) -> bool:
    words = chain(experiment.overrides, *experiment.arms.values(), *(p.overrides for p in experiment.tasks.values()))
    return any(word.startswith("warmup=untuned_") for word in words)


def _is_linear(arm: str) -> bool:
    return re.fullmatch(r"linear_\d+(\.\d+)?", arm) is not None


def _with_lengths(cells: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The cells with the warmup length ``tau`` of linear_<tau> and untuned_linear, nan for the other arms."""
    if not varies_length(experiment):
        raise ValueError(f"{experiment.name} has no arm linear_<tau>: it is not about the length of a warmup")
    untuned = _untuned_length(cells)

    def tau(arm: str) -> float:
        if arm == "untuned_linear" and untuned is not None:
            return untuned
        return float(arm.removeprefix("linear_")) if _is_linear(arm) else math.nan

    return cells.assign(tau=cells.arm.map(tau))


def _by_length(table: pd.DataFrame) -> list[tuple[str, float]]:
    """The arms and their lengths: none, then by length, then those without one in their order."""
    pairs = list(dict(zip(table.arm, table.tau, strict=True)).items())
    return sorted(pairs, key=lambda pair: (pair[0] != "none", math.isnan(pair[1]), pair[1] if pair[1] > 0 else 0))


# -- drawing ----------------------------------------------------------------------------------------------------


def _losses(
    ax: Axes,
    cells: pd.DataFrame,
    curves: pd.DataFrame,
    experiment: Experiment,
    arm_looks: dict[str, dict[str, Any]],
    at: np.ndarray,
) -> pd.DataFrame:
    """Draw the smoothed losses of the cells at the steps ``at``; returns arm, step, median, diverged and seeds."""
    tables, top = [], 0.0
    for i, (arm, look) in enumerate(arm_looks.items()):
        part = cells[cells.arm == arm].sort_values("seed")
        steps = int(part.steps.max())
        raw = curves[curves.run.isin(part.run)].pivot(index="step", columns="run", values="loss")
        raw = raw.reindex(index=range(1, steps + 1), columns=list(part.run)).astype(float)
        # The first step that is not drawn: the one at which the run diverged, or the one after its last.
        end = part.diverged_at.where(part.status == "diverged", part.steps + 1).to_numpy(dtype=float)
        alive = raw.index.to_numpy()[:, None] < end
        if not np.isfinite(raw.to_numpy()[alive]).all():
            raise ValueError(
                f"{experiment.name}: the training loss of {arm} on {part.task.iloc[0]} has gaps in curves.parquet: "
                f"{_command(experiment)}"
            )
        smooth = raw.where(alive).rolling(_window(steps), min_periods=1).mean().where(alive)
        smooth.columns = pd.Index([f"seed_{seed}" for seed in part.seed])
        shown = smooth.loc[at[at <= steps]]
        done = shown.loc[:, (part.status != "diverged").to_numpy()]
        top = max(top, float(done.to_numpy().max())) if done.size else top
        median = shown.fillna(np.inf).median(axis=1).replace(np.inf, np.nan)
        line = {"color": look["color"], "linestyle": look["linestyle"]}
        for seed in shown:
            ax.plot(shown.index, shown[seed], color=look["color"], linewidth=0.5, alpha=0.3, zorder=2)
        ax.plot(shown.index, median, **line, linewidth=1.3, zorder=_above(look))
        crosses = end[(part.status == "diverged").to_numpy()]
        crosses = crosses[crosses <= at[-1]]
        ax.plot(crosses, np.full(len(crosses), 0.98 - 0.05 * i), "x", color=look["color"], markersize=5,
                transform=ax.get_xaxis_transform(), zorder=4)  # fmt: skip
        lost = (shown.index.to_numpy()[:, None] >= np.where(part.status == "diverged", end, np.inf)).sum(axis=1)
        tables.append(shown.assign(arm=arm, median=median, diverged=lost).rename_axis("step").reset_index())
    ax.set_yscale("log")
    if top > 0:  # the losses of diverged runs leave through the top, where the crosses are
        ax.set_ylim(top=min(ax.get_ylim()[1], 2 * top))
    _log_ticks(ax)
    return pd.concat(tables)


def _above(look: dict[str, Any]) -> float:
    """Where lines coincide, the broken one is on top and the solid one shows through."""
    return 3.0 if look["linestyle"] == "-" else 3.5


def _window(steps: int) -> int:
    """The length of the running mean: 2 % of the budget."""
    return max(1, round(steps / 50))


def _loss_label(steps: int) -> str:
    smoothed = f"\n(mean of last {_window(steps)} steps)" if _window(steps) > 1 else ""
    return f"training loss{smoothed}"


def _points(every: Iterable[pd.DataFrame]) -> int:
    """How many steps of each run to draw; a row of the table has its runs and four columns or so of labels."""
    width = sum(len(cells) + 4 * len(cells.groupby(["arm", "lr"])) for cells in every)
    return int(min(200, max(20, VALUES // max(1, width))))


def _log_ticks(ax: Axes) -> None:
    """Plain numbers on a logarithmic axis, few or many by how much it spans."""
    low, high = ax.get_ylim()
    span = high / low
    subs = (1, 1.5, 2, 3, 4, 5, 7) if span < 6 else (1, 2, 3, 5) if span < 40 else (1, 2, 5) if span < 500 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for k in decades for b in subs if low <= (tick := b * 10.0**k) <= high]
    if len(ticks) < 3:  # so little of a decade that equal steps serve
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_locator(NullLocator())


def _seeds(ax: Axes, x: "pd.Series[float]", part: pd.DataFrame, look: dict[str, Any]) -> None:
    """Every run of ``part`` at x: a dot, or a cross if it diverged."""
    lost = part.status == "diverged"
    ax.plot(x[~lost], part.value[~lost], color=look["color"], marker=look["marker"], linestyle="", markersize=3,
            alpha=0.5, markeredgewidth=0)  # fmt: skip
    ax.plot(x[lost], part.value[lost], "x", color=look["color"], markersize=6, zorder=4)


def _at_worst(cells: pd.DataFrame) -> "pd.Series[bool]":
    return (cells.status == "diverged") | (cells.value == cells.worst)


def _worst(ax: Axes, cells: pd.DataFrame, label: str = "left") -> None:
    """The dashed line at a task's worst value; the label is at its left or right, or not there."""
    worst = float(cells.worst.iloc[0])
    ax.axhline(worst, color=GREY, linestyle="--", linewidth=0.8, zorder=1)
    if label:
        side, up = (1 if label == "right" else 0), (-1 if cells.higher_is_better.iloc[0] else 1)
        ax.annotate(f"worst: {worst:.3g}", (side, worst), (3 - 6 * side, 3 * up), ax.get_yaxis_transform(),
                    "offset points", ha=label, va="bottom" if up > 0 else "top", size=7, color="#606060")  # fmt: skip
    ax.margins(y=0.14)


def _grid(
    rows: Sequence[Sequence[Key | None]], size: tuple[float, float], narrow: bool = False
) -> tuple[Figure, dict[Key, Axes]]:
    """A figure with a panel for each key; none where a row is shorter or has None. A single column is wider."""
    columns = max(len(row) for row in rows)
    width = size[0] if columns > 1 or (len(rows) > 1 and not narrow) else max(size[0], 4.6)
    figure, axes = panels(columns, len(rows), (width, size[1]))
    placed: dict[Key, Axes] = {}
    for i, ax in enumerate(axes):
        row = rows[i // columns]
        key = row[i % columns] if i % columns < len(row) else None
        if key is None:
            ax.remove()
        else:
            placed[key] = ax
    return figure, placed


def _wrapped(
    tasks: Iterable[str], stages: Sequence[Stage] | dict[str, list[Stage]], columns: int = 3
) -> list[list[tuple[str, Stage] | None]]:
    """Panels of a (task, stage): up to three tasks side by side, the stages of a task below each other."""
    names = list(tasks)
    columns = 2 if len(names) == 4 else columns
    own = {task: stages[task] if isinstance(stages, dict) else list(stages) for task in names}
    rows: list[list[tuple[str, Stage] | None]] = []
    for start in range(0, len(names), columns):
        block = names[start : start + columns]
        for i in range(max(len(own[task]) for task in block)):
            rows.append([(task, own[task][i]) if i < len(own[task]) else None for task in block])
    return rows


def _looks(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``style.looks`` and a marker each."""
    plain = looks(arms)
    free = iter("P<>dHX18")
    return {arm: {**look, "marker": MARKERS.get(arm) or next(free)} for arm, look in plain.items()}


def _handles(arm_looks: dict[str, dict[str, Any]], markers: bool = True) -> list[Line2D]:
    return [
        Line2D([], [], **({**look, "marker": look["marker"] if markers else ""}), label=_label(arm))
        for arm, look in arm_looks.items()
    ]


def _diverged_handle(cells: pd.DataFrame, counted: bool = True) -> list[Line2D]:
    """The legend of the crosses, if there are any."""
    if not (cells.status == "diverged").any():
        return []
    label = "diverged (counts as worst)" if counted else "diverged"
    return [Line2D([], [], color=GREY, marker="x", linestyle="", markersize=6, label=label)]


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """Above all panels, in as many columns as the figure is wide."""
    columns = max(1, int(figure.get_figwidth() / 1.65))
    rows = math.ceil(len(handles) / columns)
    figure.legend(handles=list(handles), loc="outside upper center", ncols=math.ceil(len(handles) / rows))


def _dodge(n: int, width: float) -> list[float]:
    """n offsets around 0, spread over ``width``."""
    return [width * (i - (n - 1) / 2) / max(1, n - 1) for i in range(n)]


def _step(lrs: Sequence[float]) -> float:
    """The smallest ratio of neighbours in a grid of learning rates."""
    return min((b / a for a, b in pairwise(lrs)), default=2.0)


def _lr_ticks(ax: Axes, lrs: Sequence[float]) -> None:
    """Ticks at the learning rates of the grid, or at every second of a long one."""
    ax.xaxis.set_major_locator(FixedLocator(list(lrs[:: 1 + (len(lrs) - 1) // 6])))
    ax.xaxis.set_minor_locator(FixedLocator(list(lrs)))
    ax.xaxis.set_major_formatter(PLAIN)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """Of increasing values those that are a factor apart: labels at the others would overlap."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


def _label(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _metric(cells: pd.DataFrame, split: str, gap: str = " ") -> str:
    better = "higher" if cells.higher_is_better.iloc[0] else "lower"
    return f"{split} {_label(cells.metric.iloc[0])}{gap}({better} is better)"


def _numbers(row: "pd.Series[Any]") -> str:
    """The numbers of a verdict's row in units of its metric, or why there are none."""
    if pd.isna(row.low):
        return str(row.reason)
    values = [f"{float(f'{x:.3g}'):+.6g}" for x in (row.difference, row.low, row.high)]
    numbers = f"{values[0]} [{values[1]}, {values[2]}] {row.metric}, $\\pm${row.margin:.3g}, n = {row.n:g}"
    return numbers.replace("-", "\u2212")


def _first(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The table with these columns first, then the seeds in order."""
    seeds = sorted(str(column) for column in table if column not in columns)
    return table[[*columns, *seeds]].reset_index(drop=True)
