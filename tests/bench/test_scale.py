"""The benchmark of many runs runs, over results that are like those of a sweep, and its table has what it says."""

import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from bench import scale
from runners.config import Place
from runners.experiment import Design
from runners.store import Store
from runners.sweep import Sweep
from runners.worker import Job, carry_out

SIZE = scale.Size(arms=2, seeds=1)


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return scale.measure(Place(device="cpu"), quick=True)


def test_every_command_is_measured_and_so_is_a_worker(measured: pd.DataFrame) -> None:
    assert list(measured.columns) == ["what", "runs", "seconds", "mib", "process_seconds"]
    commands = measured[measured.what != "worker"]
    assert list(commands.what) == [*scale.COMMANDS] and (commands.runs == SIZE.runs).all()
    assert list(measured[measured.what == "worker"].runs) == [5, 10]
    assert (measured.seconds > 0).all() and (measured.mib > 0).all()


def test_the_summary_has_every_row_and_says_whether_a_worker_grows(measured: pd.DataFrame) -> None:
    table = measured.copy()
    table.loc[table.what == "worker", "mib"] = [100.0, 105.0]
    text = scale.summary(table)
    assert all(f"| {what} " in text for what in measured.what)
    assert "100 MiB after 5 runs and 105 MiB after 10: +1024 KiB a run." in text


def test_made_up_runs_are_as_a_sweep_leaves_them(tmp_path: Path) -> None:
    place = Place(device="cpu", store=str(tmp_path / "store"))
    scale.fill(SIZE, place, steps=3)
    store = Store(place.store)
    sweep = Sweep(Design(SIZE.experiment()), store, place, Console(file=io.StringIO()))
    assert not sweep.missing() and len(store.ids()) == len(sweep.cells()) == SIZE.runs
    cell, run_id = sweep.cells()[-1]
    made = store.result(run_id)
    true = Store(tmp_path / "true")
    run = cell.run.replace(steps=3)  # the files of a run of so many steps
    true_id = run.id(sweep.fingerprints[cell.arm, cell.task])
    assert carry_out(Job(true_id, run), Place(device="cpu", store=str(true.root)), {}).kind == "done"
    trained = true.result(true_id)
    assert {p.name for p in (store.root / run_id).iterdir()} == {p.name for p in (true.root / true_id).iterdir()}
    assert made.summary.keys() == trained.summary.keys() and made.provenance.keys() == trained.provenance.keys()
    assert made.config == {**trained.config, "steps": made.config["steps"]}
    assert made.summary["id"] == run_id and list(made.tables["history"]) == list(trained.tables["history"])
