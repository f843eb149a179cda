# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # RAdam against untuned warmup
#
# Ma & Yarats claim that Adam with an untuned warmup does what RAdam does. Here that is an equivalence claim on
# paired seeds, with a margin from a pilot; the hypotheses are those of the experiment's YAML. Below, for every
# experiment that has claims and results (or the one that `$UNTUNED_EXPERIMENT` names): the raw test metrics, the
# differences with their verdicts, the learning-rate curves and the training curves. A diverged run counts as the
# task's worst value.

# %%
import os

from IPython.display import Markdown, display

from analysis import plots
from analysis.figures import save
from analysis.tables import collected, load
from analysis.verdicts import verdicts

only = os.environ.get("UNTUNED_EXPERIMENT")
found = [load(name) for name in ([only] if only else collected())]
chosen = [results for results in found if results.experiment.claims]
if not chosen:
    print(f"Nothing to draw: no claims in {only or 'any experiment with results'}. Run one: make sweep EXPERIMENT=...")

# %% [markdown]
# **How to read the differences.** Each line is the 90 % interval of the mean paired difference between an arm and
# the reference arm, in margins. Wholly inside the grey band: the claim of equivalence is supported (two one-sided
# tests at 5 %). Wholly outside: refuted, which is what the sensitivity claim wants to see of no warmup on at
# least one task. Otherwise inconclusive, which is no evidence of equivalence.

# %%
for results in chosen:
    experiment, runs = results.experiment, results.runs
    size = "\n\n*A screening: too small to settle its claims.*" if experiment.screening else ""
    display(Markdown(f"## {results.name}\n\n{experiment.question}\n\nSource: {experiment.source}.{size}"))
    figures = {
        "differences": plots.differences(verdicts(results), runs, experiment),
        "final_metrics": plots.final_metrics(runs, experiment),
        "training_curves": plots.training_curves(runs, results.curves, experiment),
    }
    if any(len(plan.lrs) > 1 for plan in experiment.tasks.values()):
        figures["lr_curves"] = plots.lr_curves(runs, experiment)
    for name, (figure, numbers) in figures.items():
        display(save(figure, numbers, results.folder / "figures", name))
