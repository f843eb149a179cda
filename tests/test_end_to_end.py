"""The whole way: from a YAML to the report, and the commands of the README."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import report
from runners import run as run_app
from runners import sweep as sweeps
from runners.config import ROOT
from runners.store import Store
from tests.runners.conftest import InProcess


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Sweeps train in this process; the jobs they start."""
    monkeypatch.setattr(sweeps, "Pool", InProcess)
    monkeypatch.setattr(InProcess, "started", [])
    return InProcess.started


def test_from_a_yaml_to_the_report_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    monkeypatch.setenv("UNTUNED_RESULTS", str(results))

    def sweep(command: str, store: str) -> None:
        sweeps.main([command, "smoke", "--device", "cpu", "--store", str(tmp_path / store), "--results", str(results)])

    sweep("run", "runs")
    folder = results / "smoke"
    runs = pd.read_csv(folder / "runs.csv")
    store = Store(tmp_path / "runs")
    assert set(runs.run) == set(store.ids()) and len(started) == len(store.ids())
    assert (runs.status == "done").all() and runs.test.between(0.1, 1).all() and (runs.steps == 40).all()
    sizes = {"tuning": 6, "pilot": 4, "test": 9, "control": 3}
    assert runs.groupby("stage").size().to_dict().items() >= sizes.items()
    curves = pd.read_parquet(folder / "curves.parquet")
    assert set(curves.run) == set(runs.run) and (curves.groupby("run").size() == 40).all() and curves.loss.notna().all()
    # beta2 = .9: the untuned warmup lasts 20 steps; the rate on record is lr * warmup * decay.
    own = curves[curves.run == runs[(runs.arm == "untuned_linear") & (runs.stage == "test")].run.iloc[0]]
    np.testing.assert_allclose(own.warmup, np.minimum(1, own.step / 20))
    peak = runs[runs.stage == "test"].lr.iloc[0]
    np.testing.assert_allclose(own.lr, peak * own.warmup * (1 - (own.step - 1) / 40))

    report.main(["smoke"])
    told = capsys.readouterr().out
    verdicts = pd.read_csv(folder / "verdicts.csv")
    assert set(verdicts.claim) == {"radam_like_untuned", "warmup_matters", "control"} and len(verdicts) == 6
    assert set(verdicts.verdict) <= {"supported", "refuted", "inconclusive"}
    test = runs[runs.stage == "test"].set_index("seed")
    row = verdicts[(verdicts.claim == "radam_like_untuned") & (verdicts.task == "digits_resnet")].iloc[0]
    difference = (test[test.arm == "radam"].test - test[test.arm == "untuned_linear"].test).mean()
    assert row.n == 3 and row.lr == peak
    if "difference" in verdicts and pd.notna(row.difference):  # not where the pilot gave a margin of 0
        assert row.difference == pytest.approx(difference, abs=1e-6)
    text = (folder / "report.md").read_text()
    assert text.startswith("# Does the machinery run end to end?") and "screening" in text
    for verdict in verdicts[verdicts.task == "all tasks"].verdict:
        assert f": {verdict}**" in text and f": {verdict}**" in told
    assert len(pd.read_csv(folder / "lr_curves.csv")) == 3

    # Again trains nothing and changes nothing; a restored store needs nothing.
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    started.clear()
    sweep("run", "runs")
    sweep("restore", "fresh")
    assert Store(tmp_path / "fresh").ids() == store.ids()
    sweep("run", "fresh")
    report.main(["smoke"])
    assert not started and {p.name: p.read_bytes() for p in folder.iterdir()} == content


def test_a_report_of_nothing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNTUNED_RESULTS", str(tmp_path))
    with pytest.raises(SystemExit):
        report.main(["smoke"])
    assert capsys.readouterr().err == "error: smoke has no results yet: make sweep EXPERIMENT=smoke\n"


RUN = [
    "task=digits_resnet",
    "optimizer=adam",
    "optimizer.beta2=.99",
    "warmup=untuned_linear",
    "seed=1",
    "device=cpu",
    "steps=5",
]


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runners.run", *RUN, "lr=.01", f"store={tmp_path / 'store'}"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    store = Store(tmp_path / "store")
    (run_id,) = store.ids()
    assert done.stdout.startswith(f"done: {store.root / run_id}\n") and "accuracy" in done.stdout
    config = store.result(run_id).config
    assert (config["lr"], config["seed"], config["steps"], config["optimizer"]["beta2"]) == (0.01, 1, 5, 0.99)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]  # no litter of Hydra's


def test_a_multirun_is_a_run_each_and_does_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "-m", *RUN, "task.width=4", "lr=.01,.02", f"store={tmp_path / 'store'}"]
    monkeypatch.setattr(sys, "argv", words)
    run_app.main()
    store = Store(tmp_path / "store")
    assert sorted(store.result(k).config["lr"] for k in store.ids()) == [0.01, 0.02]
    assert capsys.readouterr().out.count("done: ") == 2
    run_app.main()
    assert capsys.readouterr().out.count("is in the store already") == 2 and len(store.ids()) == 2
    # A probe that the results lack makes them anew, with what they had.
    monkeypatch.setattr(sys, "argv", [*words, "probes.norms=[]", "probes.update_quantiles=[3]"])
    run_app.main()
    tables = [store.result(k).tables for k in store.ids()]
    assert all(list(t["quantiles"].step) == [3] and t["history"].update_rms.notna().all() for t in tables)
    (store.root / store.ids()[0] / "summary.json").write_text("{")
    run_app.main()
    assert "cannot be read: set aside" in capsys.readouterr().out and len(store.ids()) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
