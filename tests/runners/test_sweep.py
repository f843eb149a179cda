"""Sweeps: only what is missing is trained, however they are stopped, killed, shared or repeated."""

import io
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners import collect as collecting
from runners import experiment as experiments
from runners import sweep as sweeps
from runners.collect import CURVES, collect, restore
from runners.config import UserError
from runners.store import Store
from runners.sweep import Sweep
from tests.runners.conftest import ARMS, PLAN, InProcess, MakeExperiment, sweep_of


def histories(store: Store) -> dict[str, pd.DataFrame]:
    return {run_id: store.result(run_id).tables["history"] for run_id in store.ids()}


def identical(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> None:
    assert one.keys() == other.keys()
    for run_id, history in one.items():
        pd.testing.assert_frame_equal(history, other[run_id], check_exact=True)


def collected(sweep: Sweep, folder: Path) -> pd.DataFrame:
    cells = [(c, k) for c, k in sweep.cells() if sweep.summary(k, c.run)]
    assert collect(sweep.design, cells, sweep.store, folder) == []
    return pd.read_csv(folder / "runs.csv")


def test_a_sweep_trains_what_is_missing_and_nothing_else(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess]
) -> None:
    sweep = sweep_of(tiny_experiment(), store)
    counts = sweep.train(2)
    runs = {k for _, k in sweep.cells()}
    assert set(store.ids()) == runs and not sweep.missing()
    assert counts == {"done": len(runs), "diverged": 0, "error": 0} and len(in_process.started) == len(runs)
    for leftover in (".claims", ".building", ".errors", ".checkpoints", ".aside"):
        assert not list((store.root / leftover).iterdir())
    in_process.started.clear()
    again = sweep_of(tiny_experiment(), store)
    assert again.train(2) == {"done": 0, "diverged": 0, "error": 0} and not in_process.started
    # One more seed is one more run of each arm.
    more = sweep_of(tiny_experiment(plan={**PLAN, "test_seeds": 3}), store)
    assert more.train(1)["done"] == len(ARMS) == len(in_process.started)


def test_progress_counts_every_run_once(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        sweeps.Display, "tick", lambda self, _: seen.append((sum(self.counts.values()), self.left.total()))
    )
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(2)
    runs = len({k for _, k in sweep.cells()})
    assert {ended + left for ended, left in seen} == {runs} and seen[0] == (0, runs) and seen[-1] == (runs, 0)


def test_the_number_of_workers_changes_nothing(
    tiny_experiment: MakeExperiment, tmp_path: Path, in_process: type[InProcess]
) -> None:
    stores = [Store(tmp_path / str(n)) for n in (1, 3)]
    for workers, store in zip((1, 3), stores, strict=True):
        sweep_of(tiny_experiment(), store).train(workers)
    identical(histories(stores[0]), histories(stores[1]))


def test_divergence_is_a_result_and_an_error_is_tried_again_while_the_rest_goes_on(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, in_process: type[InProcess]
) -> None:
    own = {
        arm: ("optimizer=adam", f"task.how={how}", "task.at=4") for arm, how in (("wild", "nan"), ("broken", "raise"))
    }
    arms = {**ARMS, **own}
    experiment = tiny_experiment(arms)
    sweep = sweep_of(experiment, store)
    assert sweep.undetermined() == {"tiny": 4 + 2 + 10}
    # Tuning: 2 of each arm, so 6, 2 and 2. The reference is tuned, so all of the later stages but "own" of the broken
    # arm is there too: 4 pilots and 2 controls, 2 tests of each arm, and one of the wild at its own lr.
    assert sweep.train(2) == {"done": 6 + 4 + 2 + 6, "diverged": 2 + 2 + 1, "error": 2 + 2}
    assert {cell.arm for cell in sweep.missing().values()} == {"broken"} and sweep.undetermined() == {"tiny": 0}
    assert all(sweep.store.status(k) == "error" for k in sweep.missing())
    in_process.started.clear()
    assert sweep_of(experiment, store).train(2) == {"done": 0, "diverged": 0, "error": 4}
    assert len(in_process.started) == 4  # the broken ones, once each; the diverged ones are not run again
    runs = collected(sweep, tmp_path / "results")
    wild = runs[runs.arm == "wild"]
    assert (wild.status == "diverged").all() and (wild.diverged_at == 4).all() and (wild.test == 1.0).all()


def test_a_task_that_cannot_even_be_timed_does_not_stop_the_plan(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess]
) -> None:
    arms = {"warm": ("optimizer=adam", "task.how=raise", "task.at=1")}
    sweep = sweep_of(tiny_experiment(arms, claims={}), store)
    assert sweep.seconds_a_run == {"tiny": 0.0} and list(sweeps.plan_table(sweep, 1))
    assert sweep.train(1)["error"] == 2


def test_ctrl_c_keeps_what_is_finished(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess]
) -> None:
    in_process.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        sweep_of(tiny_experiment(), store).train(1)
    assert len(store.ids()) == 4 and not list((store.root / ".claims").iterdir())
    in_process.stop_after = None
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1)
    assert len(in_process.started) == len(store.ids()) == len({k for _, k in sweep.cells()})


def test_ctrl_c_at_the_command_line(
    tmp_path: Path, in_process: type[InProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    in_process.stop_after = 0
    with pytest.raises(SystemExit) as caught:
        sweeps.main(
            ["run", "smoke", "--store", str(tmp_path / "s"), "--results", str(tmp_path / "r"), "--device", "cpu"]
        )
    assert caught.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().out


def test_plan_and_status_train_nothing(
    tiny_experiment: MakeExperiment, tmp_path: Path, in_process: type[InProcess], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    experiment = tiny_experiment(plan={**PLAN, "high_lr": 0.1})
    monkeypatch.setattr(experiments, "load", lambda name: experiment)
    place = ["tiny", "--store", str(tmp_path / "s"), "--results", str(tmp_path / "r"), "--device", "cpu"]
    for command in ("plan", "status"):
        sweeps.main([command, *place])
    assert not in_process.started and not Store(tmp_path / "s").ids() and not (tmp_path / "r").exists()
    told = capsys.readouterr().out
    assert "Does it?" in told and "tuning" in told
    sweeps.main(["run", *place])
    trained = len(in_process.started)
    capsys.readouterr()
    sweeps.main(["status", *place])
    sweeps.main(["run", *place])
    assert len(in_process.started) == trained
    assert "trained now: 0 done, 0 diverged, 0 error" in capsys.readouterr().out


def test_a_probe_asked_for_later_makes_runs_incomplete_once(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess]
) -> None:
    arms = {"warm": ARMS["warm"]}
    plain, first, other = (
        tiny_experiment(arms, claims={}, overrides=("steps=10", *probe))
        for probe in ((), ("probes.update_quantiles=[2,4]",), ("probes.gradient_histogram=[3]",))
    )
    for experiment in (plain, first, other):
        sweep = sweep_of(experiment, store)
        sweep.train(1)
        assert len(in_process.started) == len(store.ids()) == 10
        in_process.started.clear()
    for experiment in (plain, first, other):  # the last results have what all of them ask for
        sweep_of(experiment, store).train(1)
    assert not in_process.started


def test_two_arms_that_are_one_run_with_different_probes(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess]
) -> None:
    arms = {
        "warm": (*ARMS["warm"], "probes.update_quantiles=[2]"),
        "same": (*ARMS["warm"], "probes.update_quantiles=[3]"),
    }
    sweep = sweep_of(tiny_experiment(arms, claims={}), store)
    sweep.train(1)
    assert not sweep.missing()
    of_both = {k for c, k in sweep.cells() if c.arm == "same"}
    assert len(of_both) == 4 and all(list(store.result(k).tables["quantiles"].step) == [2, 3] for k in of_both)


def test_damage_is_repaired(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, in_process: type[InProcess]
) -> None:
    sweep_of(tiny_experiment(), store).train(1)
    before = histories(store)
    one, two, three = store.ids()[:3]
    (store.root / one / "summary.json").write_text("{")
    (store.root / two / "summary.json").unlink()
    (store.root / three / "history.parquet").unlink()  # planning does not read it: collecting finds it
    in_process.started.clear()
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1)
    assert {job.run_id for job in in_process.started} == {one, two}
    cells = [(c, k) for c, k in sweep.cells() if sweep.summary(k, c.run)]
    damaged = collect(sweep.design, cells, store, tmp_path / "results")
    assert str(store.root / three / "history.parquet") in damaged
    sweep_of(tiny_experiment(), store).train(1)
    identical(histories(store), before)


def test_two_sweeps_on_one_store_make_each_result_once(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[str] = []
    publish = Store.publish

    def spy(self: Store, result: Any) -> bool:
        first = publish(self, result)
        published.extend([result.summary["id"]] * first)
        return first

    monkeypatch.setattr(Store, "publish", spy)
    monkeypatch.setattr(sweeps.time, "sleep", lambda seconds: threading.Event().wait(0.01))
    experiment = tiny_experiment()
    both = [sweep_of(experiment, Store(store.root)) for _ in range(2)]
    threads = [threading.Thread(target=sweep.train, args=(2,)) for sweep in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    assert sorted(published) == store.ids() == sorted({k for _, k in both[0].cells()})
    assert not both[0].missing() and not both[1].missing()
    assert not list((store.root / ".aside").iterdir())


def test_worker_processes_give_the_same_and_survive_kill_9(
    tiny_experiment: MakeExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"lrs": (0.003, 0.03), "tuning_seeds": 1}
    experiment = tiny_experiment(plan=plan, claims={}, overrides=("steps=60", "task.slow=0.01"))
    store, here = Store(tmp_path / "processes"), Store(tmp_path / "here")
    killed: list[str] = []
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            for claim in (store.root / ".claims").iterdir():
                try:
                    pid = int(claim.read_text().split(":")[1])
                except (OSError, IndexError, ValueError):
                    continue
                os.kill(pid, signal.SIGKILL)
                killed.append(claim.name)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    sweep = sweep_of(experiment, store)
    counts = sweep.train(2)
    over.set()
    killer.join()
    assert killed and counts == {"done": 6, "diverged": 0, "error": 0}
    assert not list((store.root / ".claims").iterdir()) and not list((store.root / ".building").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "Pool", InProcess)
        patch.setattr(InProcess, "started", [])
        sweep_of(experiment, here).train(1)
        identical(histories(store), histories(here))
        InProcess.started.clear()
        assert sweep_of(experiment, store).train(1)["done"] == 0 and not InProcess.started


# -- tables --------------------------------------------------------------------------------------------------


def test_collect_and_restore_are_a_round_trip(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, in_process: type[InProcess]
) -> None:
    arms = {**ARMS, "wild": ("optimizer=adam", "task.how=inf", "task.at=7")}
    experiment = tiny_experiment(arms, overrides=("steps=10", "probes.update_quantiles=[2,9]"))
    sweep = sweep_of(experiment, store)
    sweep.train(2)
    folder = tmp_path / "results"
    runs = collected(sweep, folder)
    assert {p.name for p in folder.iterdir()} == {"runs.csv", CURVES, "quantiles.parquet"}
    assert len(runs) == len(sweep.cells()) and set(runs.run) == set(store.ids())
    assert not runs.duplicated(["stage", "task", "arm", "lr", "seed"]).any()
    curves = pd.read_parquet(folder / CURVES)
    assert set(curves.run) == set(store.ids()) and len(curves) == sum(len(h) for h in histories(store).values())
    content = {p.name: p.read_bytes() for p in folder.iterdir()}

    other = Store(tmp_path / "other")
    some = store.ids()[0]
    other.publish(store.result(some))
    assert restore(folder, other) == (len(store.ids()) - 1, 1)
    assert restore(folder, other) == (0, len(store.ids()))
    assert other.ids() == store.ids()
    identical(histories(other), histories(store))
    for run_id in store.ids():
        one, two = store.result(run_id), other.result(run_id)
        assert {**one.summary, "digests": 0} == {**two.summary, "digests": 0}
        assert (one.config, one.provenance) == (two.config, two.provenance)
        assert one.tables.keys() == two.tables.keys()
    in_process.started.clear()
    again = sweep_of(experiment, other)
    again.train(1)
    assert not in_process.started
    collected(again, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == content


def test_an_unfinished_sweep_can_be_collected_and_restored(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, in_process: type[InProcess],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sweeps.experiments, "load", lambda name: tiny_experiment())
    words = ["tiny", "--device", "cpu", "--store", str(store.root), "--results", str(tmp_path)]
    folder = tmp_path / "tiny"
    with pytest.raises(SystemExit):
        sweeps.main(["collect", *words])
    assert "no run of tiny is finished yet" in capsys.readouterr().err
    monkeypatch.setattr(InProcess, "stop_after", 3)
    with pytest.raises(SystemExit):
        sweeps.main(["run", *words])
    sweeps.main(["collect", *words])
    assert "3 finished runs written" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {CURVES}  # the analysis does not see it
    other = Store(tmp_path / "other")
    assert restore(folder, other) == (3, 0) and other.ids() == store.ids()
    monkeypatch.setattr(InProcess, "stop_after", None)
    sweeps.main(["run", *words])
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(whole) == {"runs.csv", CURVES}
    sweeps.main(["collect", *words])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole
    with pytest.raises(SystemExit):
        sweeps.main(["collect", *words[:3], "--store", str(other.root), "--results", str(tmp_path)])
    assert "holds a whole sweep, and this one is unfinished" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["nothing", "garbage", "no records"])
def test_what_cannot_be_restored_is_one_line(how: str, store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    if how == "garbage":
        (folder / CURVES).write_bytes(b"not a table")
    elif how == "no records":
        pd.DataFrame({"run": ["x"], "step": [1]}).to_parquet(folder / CURVES)
    with pytest.raises(UserError, match=r"^[^\n]*restore[^\n]*$"):
        restore(folder, store)


def test_a_damaged_result_in_the_store_is_restored_over(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, in_process: type[InProcess]
) -> None:
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1)
    collected(sweep, tmp_path / "results")
    before = histories(store)
    (store.root / store.ids()[0] / "summary.json").write_text("{")
    assert restore(tmp_path / "results", store) == (1, len(before) - 1)
    identical(histories(store), before)


def test_numbers_of_the_table_are_those_of_the_runs(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, in_process: type[InProcess]
) -> None:
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1)
    runs = collected(sweep, tmp_path / "results")
    for row in runs.itertuples():
        summary = store.summary(row.run)
        assert summary is not None
        assert row.test == pytest.approx(min(summary["metrics"]["test"]["loss"], 1.0), rel=1e-8)
        assert row.test_root == pytest.approx(summary["metrics"]["test"]["root"], rel=1e-8)
        assert (row.device, row.steps, row.beta2, row.execution) == ("cpu", 10, 0.999, "flat")


# -- what planning reads -------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the summaries that are read, as they are."""
    seen: list[str] = []
    read = Store.summary

    def spy(self: Store, run_id: str) -> Any:
        seen.append(run_id)
        return read(self, run_id)

    monkeypatch.setattr(Store, "summary", spy)
    return seen


def test_planning_reads_each_summary_once(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess], reads: list[str]
) -> None:
    sweep_of(tiny_experiment(), store).train(1)
    reads.clear()
    sweep = sweep_of(tiny_experiment(plan={**PLAN, "test_seeds": 3}), store)  # some of whose runs are missing
    assert list(sweeps.plan_table(sweep, 1)) and len(sweep.missing()) == len(ARMS)
    assert sorted(reads) == store.ids()


def test_after_a_run_has_ended_only_its_summary_is_read(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess], tmp_path: Path, reads: list[str]
) -> None:
    trained = sweep_of(tiny_experiment(), store)
    trained.train(1)
    tests = [run_id for cell, run_id in trained.cells() if cell.stage == "test"]
    ended, later = tests[0], tests[-1]
    for run_id in (ended, later):
        (store.root / run_id).rename(tmp_path / run_id)
    sweep = sweep_of(tiny_experiment(), store)
    before = sweep.missing()
    reads.clear()
    (tmp_path / ended).rename(store.root / ended)
    after = sweep.missing()
    assert set(reads) == {ended} and after == {k: cell for k, cell in before.items() if k != ended}
    assert ended in before and later in after
    reads.clear()
    assert sweep.missing() == after and not reads


def test_a_sweep_that_has_watched_knows_what_a_new_one_sees(
    tiny_experiment: MakeExperiment, store: Store, in_process: type[InProcess], tmp_path: Path
) -> None:
    """Results come, go, are damaged and lose a probe in any order."""
    experiment = tiny_experiment(overrides=("steps=10", "probes.update_quantiles=[2]"))
    sweep_of(experiment, store).train(1)
    ids = store.ids()

    @settings(max_examples=20, deadline=None)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        shared = Store(tempfile.mkdtemp(dir=tmp_path))
        watching = sweep_of(experiment, shared)
        for _ in range(data.draw(st.integers(1, 4))):
            for run_id in data.draw(st.lists(st.sampled_from(ids), unique=True)):
                shared.set_aside(run_id)
                how = data.draw(st.sampled_from(["there", "there", "there", "gone", "damaged", "without its probe"]))
                if how == "gone":
                    continue
                shutil.copytree(store.root / run_id, shared.root / run_id)
                summary = shared.root / run_id / "summary.json"
                if how == "damaged":
                    summary.write_text("{")
                elif how == "without its probe":
                    values = json.loads(summary.read_text())
                    summary.write_text(json.dumps({**values, "probes": {**values["probes"], "update_quantiles": []}}))
            missing = watching.missing()
            new = sweep_of(experiment, shared)
            assert watching.cells() == new.cells()
            assert missing == watching.missing() == new.missing()

    law()


@pytest.mark.parametrize("rows", [3, 10, 2**20])
def test_tables_are_the_bytes_that_pandas_would_give(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the row groups, also where runs differ in their columns and have gaps."""
    monkeypatch.setattr(collecting, "ROWS", rows)
    monkeypatch.setattr(collecting, "JOINED", 2)
    frames = {
        f"run{i}": pd.DataFrame({
            "step": range(1, 3 + i), "lr": 0.1 * i, "loss": np.linspace(0, i, 2 + i, dtype=np.float32),
            **({"gradient_l1": np.array([np.nan, *range(1 + i)], np.float32)} if i in (2, 3) else {}),
        })
        for i in range(5)
    }  # fmt: skip
    stack = collecting._Stack()
    for run_id, frame in frames.items():
        stack.add(run_id, frame.to_parquet(index=False))
    whole = pa.Table.from_pandas(
        pd.concat([f.assign(run=k) for k, f in frames.items()], ignore_index=True), preserve_index=False
    )
    expected = io.BytesIO()
    pq.write_table(whole, expected, compression="zstd", compression_level=12, row_group_size=rows)
    assert stack.parquet(()) == expected.getvalue()
