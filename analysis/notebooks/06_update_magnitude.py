# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The size of updates on real gradients
#
# Ma & Yarats explain warmup by the magnitude of Adam's updates, not by their variance: even where gradients are pure
# noise, the first updates are several times larger than the stationary ones. Below, for every experiment that
# recorded them (or the one that `$UNTUNED_EXPERIMENT` names): quantiles over all coordinates of
# $|\theta_{t}-\theta_{t-1}|$ in units of the peak learning rate, averaged over seeds; beside it the median for
# simulated Gaussian gradients of mean zero times the arm's own warmup factor, and the value to which that tends,
# $0.6745\sqrt{(1-\beta_1)/(1+\beta_1)} = .1547$ at $\beta_1 = .9$. Real gradients have a mean: where the median lies
# above the dashed line, successive gradients agree.

# %%
import os

from IPython.display import Markdown, display

from analysis import magnitudes
from analysis.figures import save
from analysis.tables import collected, load

only = os.environ.get("UNTUNED_EXPERIMENT")
found = [load(name) for name in ([only] if only else collected())]
chosen = [results for results in found if magnitudes.measures_updates(results)]
if not chosen:
    print(f"Nothing to draw: no quantiles of updates in {only or 'any experiment with results'}.")

# %%
for results in chosen:
    display(Markdown(f"## {results.name}\n\n{results.experiment.question}"))
    display(save(*magnitudes.figure(results), results.folder / "figures", "update_magnitude"))

# %% [markdown]
# The median, and the share of it in the simulation, at a few steps:

# %%
for results in chosen:
    table = magnitudes.magnitudes(results)
    rows = table[table.step.isin([1, 2, 3, 5, 10, 20, 40, 100, 500, 1000, 2000])]
    display(rows.assign(ratio=rows.q50 / rows.simulated).pivot_table(
        index=["task", "lr", "step"], columns="arm", values=["q50", "ratio"], sort=False).round(3))  # fmt: skip
