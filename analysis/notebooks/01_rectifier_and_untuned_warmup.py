# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The rectifier and untuned warmup: the theory in numbers
#
# RAdam multiplies Adam's step by a rectifier $r_t$, derived from the variance of the adaptive learning rate.
# Ma & Yarats replace it by a warmup that is as long and has no derivation at all. This notebook draws both from
# the functions that train, and checks by simulation what each rests on. No model is trained; every random
# number has a seed.

# %%
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from analysis import theory
from analysis.figures import results, save
from analysis.style import BLACK, BLUE, GREY, SKY, VERMILION, looks, panels, shades
from optimizers.warmups import Rectifier, UntunedExponential, UntunedLinear

FOLDER = results("theory")
WARMUPS = {
    "rectifier": ("RAdam's rectifier", Rectifier()),
    "untuned_linear": ("untuned linear", UntunedLinear()),
    "untuned_exponential": ("untuned exponential", UntunedExponential()),
}
LOOKS = looks(WARMUPS)
PLAIN = FuncFormatter(lambda x, _: f"{x:g}")


def every_decade(last: float, first: float = 1, points: int = 40) -> np.ndarray:
    """About ``points`` whole steps a decade, each once."""
    return np.unique(np.geomspace(first, last, int(points * np.log10(last / first)) + 1).round())


# %% [markdown]
# ## Three schedules
#
# The rectifier starts higher than both (.026 at step 6 for $\beta_2 = .999$, against .003 and .006) and ends
# slower: after $2/(1-\beta_2)$ steps, where the linear warmup is over, it is at .83.

# %%
BETAS = (0.9, 0.98, 0.99, 0.999)
figure, axes = panels(columns=2, rows=2, size=(3.4, 2.2), share_y=True)
rows = []
for ax, beta2 in zip(axes, BETAS, strict=True):
    t = np.unique(np.linspace(1, 6 / (1 - beta2), 150).round())
    for name, (label, warmup) in WARMUPS.items():
        factor = theory.warmup_factor(warmup, t, beta2)
        ax.plot(t, factor, label=label, **LOOKS[name])
        rows.append(pd.DataFrame({"beta2": beta2, "warmup": name, "t": t.astype(int), "factor": factor}))
    ax.set(title=f"$\\beta_2$ = {beta2}", xlim=(0, t[-1]), ylim=(0, 1.04))
for ax in axes[2:]:
    ax.set_xlabel("step $t$")
for ax in axes[::2]:
    ax.set_ylabel("warmup factor $\\omega_t$")
axes[0].legend(loc="lower right")
save(figure, pd.concat(rows), FOLDER, "warmup_factors")

# %% [markdown]
# ## Equal effective periods, by construction
#
# The effective period $T(\omega) = \sum_t (1 - \omega_t)$ is the number of full steps that a warmup withholds.
# The untuned lengths were chosen to give $T \approx 1/(1-\beta_2)$, and RAdam's is within 3 % of it if counted
# from its first adaptive step: 1029 at $\beta_2 = .999$. With its four idle steps it is 1033; four steps matter
# only at a small $\beta_2$.

# %%
gap = np.unique(np.append(np.geomspace(1e-1, 1e-4, 31), [0.1, 0.02, 0.01, 0.001, 0.0001]))[::-1]
periods = []
for beta2 in 1 - gap:
    adaptive = theory.first_adaptive_step(beta2)
    for name, (label, warmup) in WARMUPS.items():
        first = adaptive if name == "rectifier" else 1
        periods.append((beta2, name, label, theory.effective_period(warmup, beta2, first)))
    period = theory.effective_period(Rectifier(), beta2)
    periods.append((beta2, "rectifier_with_idle_steps", "rectifier, idle steps counted", period))
table = pd.DataFrame(periods, columns=["beta2", "warmup", "label", "period"]).drop_duplicates(["beta2", "warmup"])
table["relative"] = table.period * (1 - table.beta2)

figure, (top, bottom) = panels(rows=2, size=(4.6, 2.1), share_x=True, heights=(1.25, 1))
for curve in table.warmup.unique():
    group = table[table.warmup == curve]
    look = LOOKS.get(curve, {"color": SKY, "linestyle": ":"})
    top.plot(1 - group.beta2, group.period, label=group.label.iloc[0], **look)
    bottom.plot(1 - group.beta2, group.relative, **look)
top.set(xscale="log", yscale="log", ylabel="effective period $T$ (steps)")
top.invert_xaxis()
top.legend(loc="upper left")
bottom.set(ylabel="$T \\cdot (1 - \\beta_2)$", xlabel="$\\beta_2$", ylim=(0.93, 1.42))
ticks = [0.1, 0.02, 0.01, 0.001, 0.0001]
bottom.set_xticks(ticks, [f"{1 - x:g}" for x in ticks])
bottom.xaxis.set_minor_formatter(NullFormatter())
save(figure, table.drop(columns="label"), FOLDER, "effective_period")

# %%
table.pivot(index="beta2", columns="warmup", values="period").loc[list(1 - np.array(ticks))].round(1)

# %% [markdown]
# ## The variance of the adaptive rate, and its first-order approximation
#
# The rectifier is made from a first-order approximation of $\mathrm{Var}[\psi]$ (RAdam's Eq. 5), which its
# authors call very accurate. Against the exact expression (Eq. 2) it is, from $\rho \approx 50$ on. At
# $\rho$ = 5 to 10, the first adaptive steps, it is 3.3 to 1.4 times too large, so $r_t$ starts too small: .017
# at step 5 where the exact variance gives .032.
#
# The simulation (40 000 trajectories, $g \sim N(0, 1)$, $\beta_2 = .999$) has Adam's exponential average, where
# Eq. 2 has a simple one of length $\rho_t$. It falls below the exact curve by 7 % at $\rho$ = 500: $\rho_t$
# matches the centre of mass of the exponential weights, which is up to 12 % shorter than the average whose
# mean varies as much.

# %%
grid = np.geomspace(5, 500, 121)
exact, first_order = theory.psi_variance(grid), theory.psi_variance_first_order(grid)
simulated = theory.simulate_psi(trajectories=40_000, iterations=550)
chosen = every_decade(549, first=5, points=10).astype(int) - 1
points = pd.DataFrame({"rho": simulated.rho[chosen], "variance": simulated.raw[chosen]})
points["relative"] = points.variance / theory.psi_variance(points.rho)
table = pd.concat(
    [
        pd.DataFrame({"curve": "exact", "rho": grid, "variance": exact, "relative": 1.0}),
        pd.DataFrame({"curve": "first_order", "rho": grid, "variance": first_order, "relative": first_order / exact}),
        points.assign(curve="simulated"),
    ]
)

curve_exact, curve_first, curve_simulated = (
    table[table.curve == curve] for curve in ("exact", "first_order", "simulated")
)
figure, (top, bottom) = panels(rows=2, size=(4.6, 2.1), share_x=True, heights=(1.25, 1))
for ax, column in ((top, "variance"), (bottom, "relative")):
    ax.plot(curve_exact.rho, curve_exact[column], color=BLUE, label="exact (Eq. 2)")
    ax.plot(curve_first.rho, curve_first[column], color=VERMILION, linestyle="--", label="first order (Eq. 5)")
    ax.plot(
        curve_simulated.rho, curve_simulated[column], "o", color=BLACK, mfc="none", label="simulated, Adam's average"
    )
top.set(xscale="log", yscale="log", ylabel="Var[$\\psi$] $\\cdot$ $\\sigma^2$")
top.legend(loc="upper right")
bottom.set(ylabel="relative to exact", xlabel="length of the average $\\rho$ (steps)", ylim=(0.8, 3.5))
bottom.xaxis.set_major_formatter(PLAIN)
save(figure, table, FOLDER, "psi_variance")

# %% [markdown]
# ## Before and after rectification
#
# RAdam's Figure 9 at its full size: 5000 trajectories of 6000 steps, $g \sim N(\mu, 1)$, from step 5. The raw
# variance falls by three orders of magnitude, the rectified one stays within about 15 % of its limit from step
# 20 on if $\mu \le 1$. But the first adaptive steps are over-corrected: at step 5 the rectified variance is 3.3
# times *smaller* than in the limit at $\mu = 0$ (3.5 in this run) and 8 times at $\mu = 10$. The two lines take
# Eq. 2 at the length $\rho_t$, and at the length that matches the variance of Adam's average: the second
# explains the dip near $t = 1800$ too.

# %%
MEANS = (0, 0.001, 0.01, 0.1, 1, 10)
t = every_decade(6000, first=5).astype(int)
figure, axes = panels(columns=3, size=(2.75, 2.8))
rows = []
limit = theory.psi_variance(theory.rho(1e6, 0.999))
for i, (mu, colour) in enumerate(zip(MEANS, shades(len(MEANS)), strict=True)):
    run = theory.simulate_psi(mu)
    raw, rectified = run.raw[t - 1], run.rectified[t - 1]
    # The limit is a mean over the last sixth: a single step carries the sampling error of 5000 trajectories.
    relative = rectified / run.rectified[-1000:].mean()
    for ax, values in zip(axes, (raw, rectified, relative), strict=True):
        # The small means coincide; a thinner line on top of a thicker one shows them all.
        ax.plot(t, values, color=colour, label=f"{mu:g}", linewidth=3.2 - 0.45 * i)
    rows.append(pd.DataFrame({"mu": f"{mu:g}", "t": t, "raw": raw, "rectified": rectified, "relative": relative}))
for label, length, line in (
    ("Eq. 2 at $\\rho_t$", theory.rho(t, 0.999), "--"),
    ("Eq. 2 at matched length", theory.effective_length(t, 0.999), ":"),
):
    raw = theory.psi_variance(length)
    rectified = theory.rectification(t, 0.999) ** 2 * raw
    axes[2].plot(t, rectified / limit, color=BLACK, linestyle=line, linewidth=1.2, label=label)
    name = "eq2_rho" if line == "--" else "eq2_matched_length"
    rows.append(pd.DataFrame({"mu": name, "t": t, "raw": raw, "rectified": rectified, "relative": rectified / limit}))
for ax in axes:
    ax.set(xscale="log", xlabel="step $t$")
    ax.xaxis.set_major_formatter(PLAIN)
axes[0].set(yscale="log", title="raw: Var[$\\psi_t$]", ylim=(1e-9, 1), ylabel="variance (1 / gradient$^2$)")
axes[1].set(yscale="log", title="rectified: Var[$r_t \\psi_t$]", ylim=(1e-9, 1))
axes[2].set(title="rectified / its limit", ylim=(0, 1.15), ylabel="ratio")
axes[1].legend(title="mean gradient $\\mu$ ($\\sigma$ = 1)", ncols=2, loc="upper right", columnspacing=1)
axes[2].legend(handles=axes[2].lines[-2:], loc="lower right")
save(figure, pd.concat(rows).rename(columns={"mu": "curve"}), FOLDER, "rectified_variance")

# %% [markdown]
# ## The size of an update
#
# Ma & Yarats look at the update itself, $|\hat m| / \sqrt{\hat v}$, under gradients that are noise alone
# ($N(0, 10^{-9})$, 10 000 coordinates). Its median falls from 1 at the first step to
# $.6745 \sqrt{(1-\beta_1)/(1+\beta_1)}$ = .1547, and is within 5 % of it after some 35 steps for every
# $\beta_2$: the transient belongs to $\beta_1$ alone, lasts a few times $1/(1-\beta_1)$ steps, and is far
# shorter than the $2/(1-\beta_2)$ steps of the untuned linear warmup. Whatever that length rests on, it is not
# the length of this transient.

# %%
settings = [(0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.5, 0.999), (0.95, 0.999), (0.99, 0.999)]
runs = {
    (b1, b2): theory.simulate_updates(b1, b2, coordinates=10_000, iterations=2500 if b1 == 0.9 else 1000)
    for b1, b2 in settings
}
figure, (left, right) = panels(columns=2, size=(3.5, 2.9), share_y=True)
rows = []
for (beta1, beta2), updates in runs.items():
    at = every_decade(len(updates.t)).astype(int) - 1
    columns = {
        "median": updates.median[at],
        "low_10": updates.low[at],
        "high_90": updates.high[at],
        "rms": updates.rms[at],
    }
    rows.append(pd.DataFrame({"beta1": beta1, "beta2": beta2, "t": at + 1, **columns}))
table = pd.concat(rows)
curves = {key: table[(table.beta1 == key[0]) & (table.beta2 == key[1])] for key in runs}

band = curves[0.9, 0.999]
left.fill_between(
    band.t, band.low_10, band.high_90, color="#E9E9E9", linewidth=0, label="10 to 90 %, $\\beta_2$ = 0.999"
)
for beta2, colour, width in zip((0.98, 0.99, 0.999), shades(3), (3.4, 2.2, 1.0), strict=True):
    part = curves[0.9, beta2]
    left.plot(part.t, part["median"], color=colour, linewidth=width, label=f"median, $\\beta_2$ = {beta2}")
    left.plot(2 / (1 - beta2), 0.00116, marker="v", color=colour, linestyle="", markersize=6, clip_on=False)
left.axhline(theory.stationary_update(0.9), color=BLACK, linestyle=":", linewidth=1, label="stationary median")
left.plot([], [], "v", color=GREY, label="end of untuned linear warmup")
left.set(title="$\\beta_1$ = 0.9", ylabel="$|\\hat{m}_t| / \\sqrt{\\hat{v}_t}$  (learning rates)")
for beta1, colour in zip((0.5, 0.9, 0.95, 0.99), shades(4), strict=True):
    part = curves[beta1, 0.999].query("t <= 1000")
    right.plot(part.t, part["median"], color=colour, label=f"median, $\\beta_1$ = {beta1}")
    right.axhline(theory.stationary_update(beta1), color=colour, linestyle=":", linewidth=1)
right.set(title="$\\beta_2$ = 0.999 (dotted: stationary median)")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="step $t$", ylim=(0.001, 1.3))
    ax.xaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_major_formatter(PLAIN)
    ax.legend(loc="lower left", labelspacing=0.3)
save(figure, table, FOLDER, "update_magnitude")

# %%
pd.DataFrame(
    {
        "beta1": beta1,
        "beta2": beta2,
        "stationary": theory.stationary_update(beta1),
        "median of the last 500 steps": np.median(run.median[-500:]),
        "within 5 % from step": theory.transient_length(run.median, theory.stationary_update(beta1)),
        "length of untuned linear": 2 / (1 - beta2),
    }
    for (beta1, beta2), run in runs.items()
).round(4)
