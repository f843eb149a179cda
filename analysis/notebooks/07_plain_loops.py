# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Beside plain torch loops
#
# Is the machinery right? The experiment `sanity` trains three of the papers' tasks for an epoch or two, long enough to
# be clearly learning. `python -m runners.plain sanity` trains the same settings with what anyone would write:
# torch.optim.AdamW, LambdaLR, a DataLoader, and no part of this project but the model and the raw data. If batches,
# augmentation, loss, optimizer, schedule and evaluation are right, the two end alike but for the noise of seeds.

# %%
from IPython.display import Markdown, display

from analysis import sanity
from analysis.figures import save
from analysis.tables import collected, load

found = load(sanity.EXPERIMENT) if sanity.EXPERIMENT in collected() else None
if found is None:
    print(f"Nothing to draw yet: make sweep EXPERIMENT={sanity.EXPERIMENT}, "
          f"and python -m runners.plain {sanity.EXPERIMENT}")  # fmt: skip

# %% [markdown]
# The comparison, which `plain_loops.md` beside the tables repeats:

# %%
if found is not None:
    table = sanity.write(found)
    display(sanity.readable(table), Markdown(sanity.NOTE))

# %% [markdown]
# Training losses. They agree where the bundles of thin lines overlap; a point of a line is the mean of 20 steps.

# %%
if found is not None:
    display(save(*sanity.figure(found), found.folder / "figures", "plain_loops"))
