"""The report has what was measured, of a CPU and of a GPU, and says what was not."""

import shutil
from pathlib import Path

import pandas as pd

from bench import sweep
from bench.__main__ import PARTS, file_of, report
from runners.config import ROOT

COMMITTED = ROOT / "results" / "bench"


def test_the_committed_report_is_that_of_the_committed_tables() -> None:
    assert (COMMITTED / "report.md").read_text() == report(COMMITTED)


def test_a_gpu_stands_beside_the_cpu(tmp_path: Path) -> None:
    assert {file_of(name, "cpu") for name in PARTS} == {f"{name}.csv" for name in PARTS}
    shutil.copy(COMMITTED / "sweep.csv", tmp_path)
    alone = report(tmp_path)
    assert "No GPU has been measured yet" in alone and "Not measured yet: `python -m bench scale`" in alone
    table = pd.read_csv(tmp_path / "sweep.csv").assign(device="NVIDIA H200")
    table.to_csv(tmp_path / file_of("sweep", "cuda"), index=False)
    both = report(tmp_path)
    assert "No GPU" not in both and both.count("NVIDIA H200") == 1
    assert both.index("AMD EPYC, ") < both.index("NVIDIA H200, ") < both.index(sweep.TRIED)
    assert both.count(sweep.TRIED) == 1 and both.count("*Ceiling*") == 2
