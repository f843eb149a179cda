# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What each rule does where everything can be seen
#
# Every rule of the package, with its default hyper-parameters and no weight decay, takes 100 steps with exact
# gradients on three functions of two variables. Then Lookahead on a quadratic with noise, where its variance has a
# closed form. Two variables and exact gradients say nothing about which rule trains a network best; they show how
# each moves.
#
# **The learning rate** is chosen alike for all: of twelve, half-decades from 1/100 to 3162 times the rule's
# published rate, the one whose run ends at the lowest value. The grid is coarse, so a rule whose useful rates are
# a narrow range (plain SGD in the ravine) can miss its best by up to a factor of 1.8, and rules must not be ranked
# by these numbers.

# %%
from itertools import cycle
from math import ceil
from typing import Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import landscapes
from analysis.figures import results, save
from analysis.landscapes import LANDSCAPES, MULTIPLES
from analysis.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, panels, shades

torch.set_num_threads(1)
FOLDER, STEPS, COLUMNS = results("theory"), 100, 6
RULES = landscapes.rules()
FAMILIES = dict(zip(dict.fromkeys(rule.family for rule in RULES.values()),
                    cycle((BLUE, PURPLE, VERMILION, GREEN, ORANGE, SKY, GREY))))  # fmt: skip
SEARCHES = {
    name: {rule: landscapes.search(RULES[rule], landscape, STEPS) for rule in RULES}
    for name, landscape in LANDSCAPES.items()
}


def trajectories(name: str) -> tuple[Figure, pd.DataFrame]:
    """A panel a rule: the best path of its search. Table: family, rule, lr, step, x, y, value; trained_x and trained_y
    where the weights that are trained are not those that are evaluated."""
    landscape = LANDSCAPES[name]
    left, right, bottom, top = landscape.window
    x, y = np.meshgrid(np.linspace(left, right, 161), np.linspace(bottom, top, 161))
    height = landscape.value(x, y)
    figure, axes = panels(COLUMNS, ceil(len(RULES) / COLUMNS), size=(1.75, 1.6), share_x=True, share_y=True)
    tables = []
    for ax, (rule, paths) in zip(axes, SEARCHES[name].items()):
        path, colour = landscapes.best(paths), FAMILIES[RULES[rule].family]
        ax.contour(x, y, height, np.geomspace(height.max() / 3e4, height.max(), 12), colors="#CFCFCF", linewidths=0.5)
        apart = not np.array_equal(path.trained, path.evaluated)
        if apart:
            ax.plot(*path.trained.T, color=colour, linewidth=0.5, alpha=0.5)
        ax.plot(*path.evaluated.T, ".-", color=colour, linewidth=0.8, markersize=2.5)
        ax.plot(*landscape.start, "o", color=BLACK, mfc="white", markersize=4)
        ax.plot(*np.transpose(landscape.minima), "x", color=BLACK, markersize=5, linestyle="")
        ax.plot(*path.evaluated[-1], "D", color=colour, mec=BLACK, mew=0.5, markersize=3.5)
        ax.set_title(f"{rule}\nlr {path.lr:.3g}, ends at {path.final:.2g}", size=6.5)
        ax.set(xlim=(left, right), ylim=(bottom, top))
        ax.grid(False)
        ax.tick_params(labelsize=6)
        trained = path.trained if apart else np.full_like(path.trained, np.nan)
        tables.append(pd.DataFrame({
            "family": RULES[rule].family, "rule": rule, "lr": path.lr, "step": range(len(path.values)),
            "x": path.evaluated[:, 0], "y": path.evaluated[:, 1], "value": path.values,
            "trained_x": trained[:, 0], "trained_y": trained[:, 1],
        }))  # fmt: skip
    for ax in axes[len(RULES):]:
        ax.set_visible(False)
    for ax in axes[len(RULES) - COLUMNS : len(RULES)]:
        ax.tick_params(labelbottom=True)
    handles = [Line2D([], [], color=colour, label=family) for family, colour in FAMILIES.items()]
    handles += [Line2D([], [], color=BLACK, linestyle="", marker="o", mfc="white", label="start"),
                Line2D([], [], color=BLACK, linestyle="", marker="x", label="minimum"),
                Line2D([], [], color=GREY, linestyle="", marker="D", mec=BLACK, label=f"end, step {STEPS}")]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), title=landscape.formula)
    return figure, pd.concat(tables)


# %% [markdown]
# ## A ravine that no axis follows
#
# Curvature .08 along and 8 across, turned so that both coordinates carry both. Plain SGD may take no rate above
# .25, so it falls to the floor at once and then creeps; momentum swings from wall to wall and arrives. Rules that
# scale each coordinate, which help where the axes are those of the function, have no axis to scale here: most of
# them move along the diagonals (the sign of the gradient) at first. Dots are steps; where the weights that are
# trained are not those that are evaluated (Lookahead, averages) they are the thin line.
#
# In every picture: Adam and AdamW are the same without weight decay, and EightBit is Adam, since two numbers stay in
# 32 bits; Adam2k stands still, since it spends its first 2000 steps on its second moment. KOALA is told the value of
# the function, whose least is 0 here, as it supposes.

# %%
figure, table = trajectories("ravine")
save(figure, table, FOLDER, "rules_in_a_ravine")

# %% [markdown]
# ## Rosenbrock's valley
#
# At the start the gradient is 233 long, at the origin, on the valley's floor, 2. The step of SGD is proportional
# to it, so that the start bounds the rate, and the floor is slow. Adam's first step is as long as its rate,
# whatever the gradient; its relatives overshoot with the large rate that the floor needs, and are on the floor
# some tens of steps later. RAdam shows what its first four steps are: momentum steps without a second moment,
# whose rate the large gradient bounds as it bounds SGD's. At higher rates they end higher or diverge, and at the
# rate that is left its adaptive steps hardly move. The average over all steps lags: it still holds the start.

# %%
figure, table = trajectories("rosenbrock")
save(figure, table, FOLDER, "rules_on_rosenbrock")

# %% [markdown]
# ## Past a saddle
#
# The start is 1/1000 off the ridge $x = 0$, where the gradient points into the saddle at the origin. Rules whose
# direction is the gradient, or the gradient over a norm of it (SGD, normalised SGD, LARS, KOALA), first fall into
# the saddle, and leave along $x$ only as fast as the thousandth grows; PNM has not left in 100 steps. Rules that scale each coordinate by its own history (Adam and most of its family, the signs, and LAMB,
# whose direction is Adam's) give the tiny $x$ a full step at once and never come near it. Padam, whose power 1/8
# of $v$ lies between SGD's 0 and Adam's 1/2, falls like SGD before it turns, and so does RAdam in its first steps.
# Which of the two minima is reached is decided by the sign of the start's $x$, but for a rule that jumps over
# (ACProp, whose third step divides a gradient that has grown by the small ones before it).

# %%
figure, table = trajectories("saddle")
save(figure, table, FOLDER, "rules_at_a_saddle")

# %% [markdown]
# ## The whole grids
#
# The value at the end of every run, relative to the start. A square on the right edge says that an even larger
# rate might end lower still. The published rates are made for networks and thousands of steps: on this scale of a
# unit, in 100 steps, most per-coordinate rules want 10 to 1000 times theirs. SGD, with or without momentum, and
# PNM diverge within two columns of their best. Adam and Lion, whose steps are bounded, do not diverge on this
# grid, nor does normalised SGD, which ends high instead.

# %%
ends = pd.DataFrame(
    {"landscape": name, "family": RULES[rule].family, "rule": rule, "multiple": multiple, "lr": path.lr,
     "value": path.final, "start": path.values[0], "drawn": path is landscapes.best(paths)}
    for name, searches in SEARCHES.items()
    for rule, paths in searches.items()
    for multiple, path in zip(MULTIPLES, paths, strict=True)
)  # fmt: skip
figure, axes = panels(columns=3, size=(2.7, 4.6), share_y=True)
for ax, (name, part) in zip(axes, ends.groupby("landscape", sort=False)):
    grid = (part.value / part.start).to_numpy().reshape(len(RULES), len(MULTIPLES))
    shown = np.ma.masked_invalid(np.log10(np.maximum(grid, 1e-6)))
    image = ax.imshow(shown, cmap="viridis", vmin=-6, vmax=1, aspect="auto")
    rows, columns = np.nonzero(np.isinf(grid))
    ax.plot(columns, rows, "x", color=VERMILION, markersize=3.5, linestyle="")
    rows, columns = np.nonzero(part.drawn.to_numpy().reshape(grid.shape))
    ax.plot(columns, rows, "s", mec=BLACK, mfc="none", markersize=8, linestyle="")
    ax.set(title=name, xlabel="multiple of the published rate")
    ax.set_xticks(range(0, len(MULTIPLES), 2), [f"{m:g}" for m in MULTIPLES[::2]])
    ax.set_yticks(range(len(RULES)), RULES, size=7)
    ax.grid(False)
figure.colorbar(image, ax=axes, label="log10 of value at the end / at the start (at least $-6$)", shrink=0.6)
handles = [
    Line2D([], [], color=VERMILION, linestyle="", marker="x", label="diverged"),
    Line2D([], [], color=BLACK, linestyle="", marker="s", mfc="none", markersize=8, label="drawn above"),
]
figure.legend(handles=handles, loc="outside upper center", ncols=2)
save(figure, ends, FOLDER, "rules_and_rates")

# %% [markdown]
# ## Lookahead on a noisy quadratic
#
# $f(\theta) = \frac h2 (\theta - c)^2$ with a new $c \sim N(0, \sigma^2)$ at every step. SGD with rate $\gamma$
# ends in a stationary variance $V = \frac{\gamma h}{2 - \gamma h}\sigma^2$. Between two synchronisations the fast
# weights are $a^k$ times the slow ones, $a = 1 - \gamma h$, plus noise of variance $(1 - a^{2k}) V$; so the slow
# weights' variance $W$ solves $W = (1 - \alpha + \alpha a^k)^2 W + \alpha^2 (1 - a^{2k}) V$:
#
# $$\frac WV = \frac{\alpha\,(1 + a^k)}{2 - \alpha\,(1 - a^k)},$$
#
# which is Proposition 2 of Zhang et al. with a common factor cancelled. The points are the optimizer itself,
# Lookahead over SGD, with 5000 independent chains (standard error 2 %), until what is left of its start is
# negligible. Theory and points agree over the whole range. For small $\gamma h$ the reduction is $\alpha$ itself;
# once $a^k \approx 0$ it is $\alpha / (2 - \alpha)$. Beyond $\gamma h = 1$ the fast weights jump over the minimum
# at every step, so that $a^k$ is negative for an odd $k$ and the variance falls further; for an even $k$ it rises
# again.

# %%
ALPHAS, KS, CHAINS = (0.2, 0.4, 0.6, 0.8, 1.0), (2, 5, 20), 5000
RATES = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 1.8)
runs = []
for seed, (alpha, k) in enumerate((alpha, k) for alpha in ALPHAS for k in KS):
    slow = landscapes.simulate_lookahead(RATES, alpha, k, chains=CHAINS, seed=seed)
    runs.append(pd.DataFrame({"k": k, "alpha": alpha, "rate": RATES, "simulated": (slow**2).mean(axis=1)}))
points = pd.concat(runs)
fine = np.unique(np.concatenate([np.geomspace(0.03, 1.9, 60), RATES]))
lines = pd.MultiIndex.from_product([KS, ALPHAS, fine], names=["k", "alpha", "rate"]).to_frame(index=False)
lines["theory"] = landscapes.lookahead_variance(lines.rate, lines.alpha, lines.k)
table = lines.merge(points, how="outer", on=["k", "alpha", "rate"])
table["sgd"] = landscapes.sgd_variance(table.rate)

figure, axes = panels(columns=3, size=(2.8, 2.7), share_y=True)
for ax, k in zip(axes, KS):
    for alpha, colour in zip(ALPHAS, shades(len(ALPHAS))):
        part = table[(table.k == k) & (table.alpha == alpha)]
        ax.plot(part.rate, part.theory / part.sgd, color=colour, label=f"{alpha:g}")
        ax.plot(part.rate, part.simulated / part.sgd, "o", color=colour, mfc="white")
    ax.set(title=f"$k$ = {k}", xscale="log", xlabel=r"$\gamma h$", ylim=(0, 1.1))
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 1.8], ["0.05", "0.1", "0.2", "0.5", "1", "1.8"])
    ax.minorticks_off()
axes[0].set_ylabel("variance / that of SGD")
handles = [*axes[0].get_lines()[::2], Line2D([], [], color=BLACK, label="closed form"),
           Line2D([], [], color=BLACK, linestyle="", marker="o", mfc="white", label="simulated")]  # fmt: skip
figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), title=r"$\alpha$", columnspacing=1)
save(figure, table, FOLDER, "lookahead_variance")

# %%
error = (table.simulated / table.theory - 1).dropna() / np.sqrt(2 / CHAINS)
pd.Series({"points": len(error), "rms error in standard errors": np.sqrt((error**2).mean()),
           "largest": error.abs().max()}).round(2)  # fmt: skip

# %% [markdown]
# ## And at an equal rate of convergence?
#
# A lower variance alone is no merit: SGD at a smaller rate has that too. Lookahead pays for it by contracting by
# $1 - \alpha + \alpha a^k$ in $k$ steps, where SGD contracts by $a^k$. So compare with an SGD whose smaller rate
# makes it as fast: in the same direction (left), or in a direction so flat that only the product $\alpha\gamma$
# counts, which is what sets the pace where curvatures differ much (right). In one direction Lookahead loses for
# $\gamma h < 1$: SGD at the smaller rate is as fast and has less variance, nearly the same for small $k \gamma h$,
# 20 times less at $\gamma h = 1$ and $k = 20$. Against the flat direction Lookahead wins, by up to 39 % among
# these settings: where the curvature is large its slow weights contract more slowly than SGD's at rate
# $\alpha\gamma$, which does no harm as long as the flat direction sets the pace, and average more noise away. So
# the gain needs different curvatures, and for $\gamma h < 1$ the ratio is never below 1/2, as $\frac{2 -
# \alpha\gamma h}{2 - \gamma h} \ge 1$ and $\frac{1 + a^k}{2 - \alpha (1 - a^k)} \ge \frac12$ are its factors; it
# is not the $\alpha$ of the figure before. (Closed forms; the one for Lookahead is that simulated above.)

# %%
rates = np.concatenate([np.linspace(0.01, 1, 100), RATES])
cells = pd.MultiIndex.from_product([KS, (0.2, 0.5, 0.8), np.unique(rates[rates <= 1])], names=["k", "alpha", "rate"])
equal = cells.to_frame(index=False)
variance = landscapes.lookahead_variance(equal.rate, equal.alpha, equal.k)
equal["same_direction"] = variance / landscapes.sgd_variance(landscapes.matched_rate(equal.rate, equal.alpha, equal.k))
equal["flat_direction"] = variance / landscapes.sgd_variance(equal.alpha * equal.rate)

DASHES: tuple[Literal[":", "--", "-"], ...] = (":", "--", "-")
figure, axes = panels(columns=2, size=(3.4, 2.8))
for ax, column in zip(axes, ("same_direction", "flat_direction")):
    for alpha, colour in zip((0.2, 0.5, 0.8), shades(3)):
        for k, look in zip(KS, DASHES):
            part = equal[(equal.k == k) & (equal.alpha == alpha)]
            ax.plot(part.rate, part[column], linestyle=look, color=colour)
    ax.axhline(1, color=BLACK, linewidth=0.8)
    ax.set(xlabel=r"$\gamma h$ of Lookahead", title=f"as fast in {'the same' if ax is axes[0] else 'a flat'} direction")
axes[0].set(yscale="log", ylabel="variance / that of SGD")
axes[0].set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
axes[0].minorticks_off()
handles = [Line2D([], [], color=colour, label=f"$\\alpha$ = {a}") for a, colour in zip((0.2, 0.5, 0.8), shades(3))]
handles += [Line2D([], [], color=BLACK, linestyle=look, label=f"$k$ = {k}") for k, look in zip(KS, DASHES)]
figure.legend(handles=handles, loc="outside upper center", ncols=6, columnspacing=1)
save(figure, equal, FOLDER, "lookahead_at_equal_speed")

# %%
equal[equal.rate.round(6).isin([0.05, 0.2, 0.5, 1.0])].pivot(
    index=["alpha", "k"], columns="rate", values=["same_direction", "flat_direction"]
).round(2)
