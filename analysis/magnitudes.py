"""The size of updates on real gradients, beside what simulated gradients give."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis import theory
from analysis.style import BLACK, GREY, looks, panels
from analysis.tables import Results

QUANTILES = ["q10", "q25", "q50", "q75", "q90"]


def measures_updates(found: Results) -> bool:
    """Whether an experiment recorded quantiles of updates."""
    return (found.folder / "quantiles.parquet").exists()


def magnitudes(found: Results) -> pd.DataFrame:
    """Quantiles of |update| / peak lr over all coordinates, at every measured step, averaged over seeds.

    Columns: task, lr, arm, seeds, step, q10 to q90; simulated: the median for independent Gaussian gradients of
    mean 0 (theory.simulate_updates) times the arm's warmup, or RAdam's rectifier (NaN in its first, un-adapted steps);
    stationary: what that median tends to, without the warmup.
    """
    runs = found.runs[found.runs.stage == "tuning"]
    quantiles = found.quantiles.merge(found.curves[["run", "step", "warmup"]], on=["run", "step"])
    tables = []
    for (task, lr, arm), cells in runs.groupby(["task", "lr", "arm"], sort=False):
        own = quantiles[quantiles.run.isin(cells.run)]
        config = found.configs[cells.run.iloc[0]]["optimizer"]
        beta1, beta2 = config["beta1"], config["beta2"]
        table = own.groupby("step", as_index=False)[[*QUANTILES, "warmup"]].mean()
        simulated = theory.simulate_updates(beta1, beta2, iterations=int(table.step.max()))
        factor = table.pop("warmup").to_numpy()
        if config["name"] == "radam":
            factor = theory.rectification(table.step.to_numpy(), beta2)
            factor = np.where(factor > 0, factor, np.nan)
        table["simulated"] = simulated.median[table.step.to_numpy() - 1] * factor
        table["stationary"] = theory.stationary_update(beta1)
        named: dict[str, Any] = {"task": task, "lr": lr, "arm": arm, "seeds": cells.seed.nunique()}
        tables.append(table.assign(**named)[[*named, *table.columns]])
    return pd.concat(tables, ignore_index=True)


def figure(found: Results) -> tuple[Figure, pd.DataFrame]:
    """A row of panels for each task and lr, a panel an arm; and the table plotted."""
    table = magnitudes(found)
    rows = list(dict.fromkeys(zip(table.task, table.lr, strict=True)))
    arms = list(found.experiment.arms)
    arm_looks = looks(arms)
    drawn, axes = panels(len(arms), len(rows), (2.75, 2.7), share_x=True, share_y=True)
    for i, ax in enumerate(axes):
        (task, lr), arm = rows[i // len(arms)], arms[i % len(arms)]
        own = table[(table.task == task) & (table.lr == lr) & (table.arm == arm)]
        colour = arm_looks[arm]["color"]
        ax.fill_between(own.step, own.q10, own.q90, color=colour, alpha=0.15, linewidth=0)
        ax.fill_between(own.step, own.q25, own.q75, color=colour, alpha=0.25, linewidth=0)
        ax.plot(own.step, own.q50, color=colour)
        ax.plot(own.step, own.simulated, color=BLACK, linestyle="--", linewidth=1)
        ax.axhline(own.stationary.iloc[0], color=GREY, linestyle=":", linewidth=1)
        ax.set(xscale="log", yscale="log", title=f"{arm.replace('_', ' ')}, lr {lr:g}")
        if i // len(arms) == len(rows) - 1:
            ax.set_xlabel("step")
        if i % len(arms) == 0:
            ax.set_ylabel(f"{task.replace('_', ' ')}\n|update| / peak lr")
    stationary = table.stationary.iloc[0]
    drawn.legend(
        handles=[
            Line2D([], [], color=GREY, label="median over coordinates"),
            Patch(color=GREY, alpha=0.45, label="25 to 75 %"),
            Patch(color=GREY, alpha=0.2, label="10 to 90 %"),
            Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label="median, simulated Gaussian gradients"),
            Line2D([], [], color=GREY, linestyle=":", linewidth=1, label=f"its stationary value {stationary:.4f}"),
        ],
        loc="outside upper center",
        ncols=5,
    )
    return drawn, table
