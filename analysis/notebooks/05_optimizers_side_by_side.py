# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Optimizers side by side
#
# Every experiment without a reference arm that has results (or the one that `$UNTUNED_EXPERIMENT` names): each
# optimizer is tried at the same multiples of its published rate and tested, on other seeds, at the one that was best
# on validation data. The best mean rank over the tasks is on top. A diverged run counts as the task's worst value.

# %%
import os

from IPython.display import Markdown, display

from analysis import ranking
from analysis.figures import save
from analysis.tables import collected, load

only = os.environ.get("UNTUNED_EXPERIMENT")
found = [load(name) for name in ([only] if only else collected())]
chosen = [results for results in found if results.experiment.reference is None]
if not chosen:
    print(f"Nothing to draw: {only or 'every experiment with results'} has a reference arm.")

# %%
for results in chosen:
    experiment = results.experiment
    display(Markdown(f"## {results.name}\n\n{experiment.question}\n\n{ranking.limits(results)}"))
    display(save(*ranking.figure(results), results.folder / "figures", "side_by_side"))
