# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What 8-bit state costs
#
# Adam's moments after training with 32-bit state, rounded as each 8-bit code would (`python -m runners.state_error`
# measures it): a linear and a dynamic codebook with one scale for a whole tensor, and the dynamic one with a scale
# for each block of 2048 (Dettmers et al. 2022) or 256 elements. A linear code rounds small second moments to 0, and
# the update made of them explodes; the dynamic one keeps their order of magnitude. Whether training notices is the
# claim of the experiment `eight_bit_quick`.

# %%
import pandas as pd
from IPython.display import display
from matplotlib.ticker import NullFormatter

from analysis.figures import results, save
from analysis.style import BLUE, GREEN, VERMILION, panels

folder = results("eight_bit_quick")
path = folder / "state_error.csv"
if path.exists():
    table = pd.read_csv(path)
    figure, axes = panels(columns=3, size=(3.0, 1.9), share_y=True)
    names = {"m": "error of m / mean |m|", "v": "error of v / mean v", "update": "error of update / lr"}
    for ax, (what, label), colour in zip(axes, names.items(), (BLUE, GREEN, VERMILION)):
        for kind, marker in (("mean", "o"), ("q999", "|")):
            ax.plot(table[f"{what}_{kind}"], range(len(table)), marker, color=colour, markersize=7)
        ax.set(xscale="log", xlim=(None, None if what == "update" else 1.5), xlabel=f"{label}\n(dot: mean; bar: 99.9 %)")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(table)), table.code)
        ax.set_ylim(len(table) - 0.5, -0.5)
    display(save(figure, table, folder / "figures", "state_error"))
    display(table)
else:
    print("Nothing to draw: run python -m runners.state_error first.")
