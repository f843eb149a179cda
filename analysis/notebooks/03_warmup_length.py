# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # How long a warmup
#
# The RAdam paper (Figure 7) sets RAdam beside Adam with linear warmups of several lengths, at several learning
# rates: the length matters, and RAdam needs none. Ma & Yarats give a length that needs no tuning either,
# $\tau = 2/(1-\beta_2)$. Below, for every experiment that has results and arms called `linear_<tau>` (or the one
# that `$UNTUNED_EXPERIMENT` names): the validation metric over learning rate and length, and the early training
# loss. A diverged run counts as the task's worst value. These runs have tuning seeds; they describe, and test
# no claim.

# %%
import os

from IPython.display import Markdown, display

from analysis import plots
from analysis.figures import save
from analysis.tables import collected, load

only = os.environ.get("UNTUNED_EXPERIMENT")
found = [load(name) for name in ([only] if only else collected())]
chosen = [results for results in found if plots.varies_length(results.experiment)]
if not chosen:
    print(f"Nothing to draw: no arms linear_<tau> in {only or 'any experiment with results'}. "
          "Run one: make sweep EXPERIMENT=...")  # fmt: skip

# %%
for results in chosen:
    experiment, runs = results.experiment, results.runs
    display(Markdown(f"## {results.name}\n\n{experiment.question}\n\nSource: {experiment.source}."))
    figures = {
        "length_heatmap": plots.length_heatmap(runs, experiment),
        "length_curves": plots.length_curves(runs, experiment),
        "length_training": plots.length_training(runs, results.curves, experiment),
    }
    for name, (figure, numbers) in figures.items():
        display(save(figure, numbers, results.folder / "figures", name))
