"""The size of updates: averaged over seeds, beside a simulation with the arm's own warmup."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import magnitudes, theory
from analysis.tables import Results
from runners.config import UserError
from runners.experiment import Experiment, TaskPlan

STEPS = [1, 2, 5, 10, 50]
ARMS = {"none": ("adam", 1.0), "half": ("adam", 0.5), "radam": ("radam", 1.0)}
"""An arm's rule, and its constant warmup factor."""


def results(folder: Path, quantiles: bool = True) -> Results:
    plan = TaskPlan(lrs=(0.01,), tuning_seeds=2)
    experiment = Experiment(
        name="e", question="Q?", source="s", cost="c", arms=dict.fromkeys(ARMS, ()), tasks={"t": plan}, reference="none"
    )
    rows, measured, curves, configs = [], [], [], {}
    for arm, (rule, factor) in ARMS.items():
        for seed in (1000, 1001):
            run = f"{arm}{seed}"
            rows.append({"stage": "tuning", "task": "t", "arm": arm, "lr": 0.01, "seed": seed, "run": run})
            configs[run] = {"optimizer": {"name": rule, "beta1": 0.9, "beta2": 0.99}}
            curves += [{"run": run, "step": t, "warmup": factor} for t in range(1, 51)]
            level = factor * (seed - 999)  # 1 and 2 for the two seeds
            measured += [{"run": run, "step": t, **dict.fromkeys(magnitudes.QUANTILES, level)} for t in STEPS]
    found = Results("e", experiment, folder, pd.DataFrame(rows))
    found.__dict__["curves"], found.__dict__["configs"] = pd.DataFrame(curves), configs  # as read from the files
    if quantiles:
        pd.DataFrame(measured).to_parquet(folder / "quantiles.parquet")
    return found


def test_quantiles_are_averaged_over_seeds_and_set_beside_the_simulation(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert magnitudes.measures_updates(found)
    table = magnitudes.magnitudes(found).set_index(["arm", "step"])
    assert table.q50["none", 5] == 1.5 and table.q50["half", 5] == 0.75 and set(table.seeds) == {2}
    simulated = theory.simulate_updates(0.9, 0.99, iterations=50).median
    np.testing.assert_allclose(table.simulated["none"].to_numpy(), simulated[np.array(STEPS) - 1])
    np.testing.assert_allclose(table.simulated["half"], table.simulated["none"] / 2)
    rectified = table.simulated["radam"]
    assert rectified[[1, 2]].isna().all()  # un-adapted steps
    r = theory.rectification(np.array([5.0, 50.0]), 0.99)
    np.testing.assert_allclose(rectified[[5, 50]], table.simulated["none"][[5, 50]] * r)
    assert table.stationary.unique() == pytest.approx(0.1547, abs=5e-5)


def test_the_figure_has_a_panel_an_arm(tmp_path: Path) -> None:
    drawn, table = magnitudes.figure(results(tmp_path))
    assert [ax.get_title() for ax in drawn.axes] == ["none, lr 0.01", "half, lr 0.01", "radam, lr 0.01"]
    assert len(table) == len(ARMS) * len(STEPS)


def test_an_experiment_without_the_probe_is_told_so(tmp_path: Path) -> None:
    found = results(tmp_path, quantiles=False)
    assert not magnitudes.measures_updates(found)
    with pytest.raises(UserError, match=r"^e has no quantiles of updates: set probes.update_quantiles in it$"):
        magnitudes.magnitudes(found)
