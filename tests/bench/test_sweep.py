"""That the benchmark of sweeps runs, and what its table has; never how fast anything is."""

from pathlib import Path

import pandas as pd

from bench import sweep
from runners.config import Place


def test_the_quick_benchmark_runs_every_candidate(tmp_path: Path) -> None:
    table = sweep.measure(Place(device="cpu", store=str(tmp_path)), quick=True)
    assert set(table.candidate) == {sweep.MULTIRUN, sweep.JOBLIB, sweep.OURS, sweep.CEILING}
    assert set(table.runs) == {6} and sorted(table.timed) == [1, 1, 6, 6]
    assert (table.runs_per_hour > 0).all() and (table.seconds_a_run > 0).all()
    text = sweep.summary(table)
    assert "digits_resnet" in text and "times multirun" in text


def test_on_a_gpu_ours_is_measured_with_several_workers_and_the_fastest_counts() -> None:
    assert sweep.worker_counts("cpu", 3) == [3]
    assert sweep.worker_counts("cuda", 1) == [1] and sweep.worker_counts("cuda", 16) == [1, 2, 4, 8, 16]
    rates = {(sweep.MULTIRUN, 1): 100, (sweep.JOBLIB, 4): 200, (sweep.OURS, 1): 900, (sweep.OURS, 2): 1500,
             (sweep.OURS, 4): 1200, (sweep.GRAPHS, 1): 800, (sweep.GRAPHS, 2): 2500, (sweep.GRAPHS, 4): 2400,
             (sweep.CEILING, 1): 1000, (sweep.CEILING, 4): 5000}  # fmt: skip
    table = pd.DataFrame(
        {"task": "t", "steps": 9, "runs": 60, "candidate": name, "workers": workers, "runs_per_hour": rate}
        for (name, workers), rate in rates.items()
    )
    text = sweep.summary(table)
    for cell in ("2,500", "25.00", "12.50", "50%", "900", "1,200", "2,400"):
        assert f" {cell} " in text, cell
    # In one way with one number of workers there is nothing to choose from.
    alone = table[(table.candidate != sweep.GRAPHS) & ((table.workers == 1) | (table.candidate == sweep.JOBLIB))]
    assert "CUDA graphs" not in sweep.summary(alone)
