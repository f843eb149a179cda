"""That the benchmark of sweeps runs, and what its table has; never how fast anything is."""

from pathlib import Path

from bench import sweep
from runners.config import Place


def test_the_quick_benchmark_runs_every_candidate(tmp_path: Path) -> None:
    table = sweep.measure(Place(device="cpu", store=str(tmp_path)), quick=True)
    assert set(table.candidate) == {sweep.MULTIRUN, sweep.JOBLIB, sweep.OURS, sweep.CEILING}
    assert set(table.runs) == {6} and sorted(table.timed) == [1, 1, 6, 6]
    assert (table.runs_per_hour > 0).all() and (table.seconds_a_run > 0).all()
    text = sweep.summary(table)
    assert "digits_resnet" in text and "times multirun" in text
