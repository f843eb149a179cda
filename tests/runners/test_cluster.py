"""Jobs of a cluster: what goes into one, and that whatever happens to them a sweep trains what is missing, once."""

import contextlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import submitit
from hypothesis import given
from hypothesis import strategies as st
from submitit.core.utils import FailedJobError, JobPaths, cloudpickle_dump

from optimizers.adam import Adam
from optimizers.radam import RAdam
from runners import cluster as clusters
from runners.backend import Slurm
from runners.cluster import Chunk, Cluster, chunked, shared, squeue, time_steps
from runners.collect import STEP_TIMES
from runners.config import Place, Run, UserError
from runners.store import Store
from runners.worker import Event, Job
from tests.runners.conftest import ARMS, CPU, InProcess, MakeExperiment, sweep_of, tiny_run

BACKEND = Slurm(cpus=1, runs_per_job=4)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, in_process: type[InProcess]) -> None:
    """Nothing is waited for, and jobs train in this process."""
    for name in ("LOOK_EVERY", "ASK_EVERY", "SETTLE", "LATE", "HOLD", "GRACE"):
        monkeypatch.setattr(clusters, name, 0.0)
    monkeypatch.setattr(clusters.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(clusters, "Pool", in_process)


class Queue:
    """A cluster in this process, which carries out one job whenever it is asked for their states."""

    def __init__(self, store: Store) -> None:
        self.folder = store.root / ".jobs"
        self.functions: dict[str, Callable[[], Any]] = {}
        self.arrays: list[int] = []
        self.fate: dict[str, Callable[[str], str]] = {}
        self.ended: dict[str, tuple[str, str]] = {}
        self.paused = False

    def submit_array(self, functions: Sequence[Callable[[], Any]]) -> list[SimpleNamespace]:
        self.arrays.append(len(functions))
        n = len(self.arrays)
        ids = [f"{n}_{i}" for i in range(len(functions))] if len(functions) > 1 else [str(n)]
        for job_id, function in zip(ids, functions, strict=True):
            self.functions[job_id] = function
            cloudpickle_dump(function, JobPaths(self.folder, job_id).submitted_pickle)
            (self.folder / f"{job_id}_0_log.err").write_text("srun: error: the last line\n")
        return [SimpleNamespace(job_id=job_id) for job_id in ids]

    def states(self, job_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        if self.functions and not self.paused:
            job_id = next(iter(self.functions))
            function = self.functions.pop(job_id)
            if job_id in self.fate:
                self.ended[job_id] = (self.fate[job_id](job_id), "None")
            else:
                cloudpickle_dump(("success", function()), JobPaths(self.folder, job_id).result_pickle)
        return dict.fromkeys(self.functions, ("PENDING", "Resources")) | self.ended


@pytest.fixture
def queue(store: Store, at_once: None) -> Queue:
    return Queue(store)


class Told(list[str]):
    def __contains__(self, words: object) -> bool:
        return any(str(words) in line for line in self)


def cluster_of(queue: Queue, store: Store, backend: Slurm = BACKEND) -> tuple[Cluster, Told]:
    told = Told()
    place = Place(device="cpu", store=str(store.root), checkpoint_every=backend.checkpoint_every)
    return Cluster(backend, place, told.append, executor=queue, states=queue.states), told


def left_by_jobs(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / ".jobs").iterdir())


# -- chunks --------------------------------------------------------------------------------------------------


@cache
def run_like(width: int, rule: str, execution: str) -> Run:
    optimizer = Adam() if rule == "adam" else RAdam()
    return tiny_run(task={"salt": width}, optimizer=optimizer, execution=execution)


KINDS = st.tuples(st.integers(0, 2), st.sampled_from(["adam", "radam"]), st.sampled_from(["flat", "compiled"]))


@given(st.lists(KINDS, max_size=40), st.integers(1, 9))
def test_every_run_is_in_one_chunk_with_its_like(kinds: list[tuple[int, str, str]], size: int) -> None:
    jobs = [Job(str(i), run_like(*kind)) for i, kind in enumerate(kinds)]
    chunks = chunked(jobs, size)
    assert sorted(job.run_id for chunk in chunks for job in chunk) == sorted(job.run_id for job in jobs)
    assert all(1 <= len(chunk) <= size for chunk in chunks)
    for chunk in chunks:
        assert len({shared(job.run) for job in chunk}) == 1 == len({str(job.run.task) for job in chunk})
        compiled = {job.run.execution for job in chunk}
        assert compiled == {"flat"} or len({type(job.run.optimizer) for job in chunk} | compiled) == 2
    for kind in {shared(job.run) for job in jobs}:
        sizes = [len(chunk) for chunk in chunks if shared(chunk[0].run) == kind]
        assert len(sizes) == -(-sum(sizes) // size) and max(sizes) - min(sizes) <= 1


def test_runs_that_differ_in_what_is_not_compiled_share_a_step() -> None:
    run = run_like(0, "adam", "compiled")
    assert shared(run) == shared(run.replace(lr=0.5, seed=9, steps=3, clip_norm=1.0))
    assert shared(run) != shared(run.replace(optimizer=Adam(beta2=0.5)))
    assert shared(run_like(0, "adam", "flat")) == shared(run_like(0, "radam", "flat"))


# -- one job -------------------------------------------------------------------------------------------------


def test_a_job_carries_out_its_runs_and_passes_over_what_is_done(store: Store, at_once: None) -> None:
    runs = [tiny_run(steps=10, seed=seed) for seed in (1, 2)] + [tiny_run(steps=10, task={"how": "raise", "at": 3})]
    place = Place(device="cpu", store=str(store.root))
    for run in runs:
        run.task.prepare(CPU, None)
    ids = [run.id(run.task.fingerprint()) for run in runs]
    chunk = Chunk([Job(k, r) for k, r in zip(ids, runs, strict=True)], place, BACKEND)
    for text in ("", "was there already"):
        ended = chunk()
        assert [ended[k] for k in ids[:2]] == [("done", text)] * 2
        assert ended[ids[2]] == ("error", "in two lines")
    assert set(store.ids()) == set(ids[:2])


@pytest.mark.parametrize(
    ("device", "backend", "workers"),
    [("cpu", Slurm(cpus=3), 3), ("cuda", Slurm(cpus=3, gpus=1), 1), ("cuda:1", Slurm(workers=2), 2)],
)
def test_a_job_has_a_worker_a_core_or_one_on_a_gpu(device: str, backend: Slurm, workers: int) -> None:
    assert Chunk([], Place(device=device), backend).workers == workers


def test_a_job_whose_machine_lacks_something_starts_nothing_else(store: Store, at_once: None) -> None:
    place = Place(device="nowhere", store=str(store.root))
    ended = Chunk([Job(str(i), tiny_run(seed=i)) for i in range(3)], place, Slurm(workers=1))()
    assert list(ended) == ["0"] and ended["0"][0] == "failed" and "'nowhere' is not there" in ended["0"][1]


def test_a_job_told_to_stop_starts_nothing_and_waits_to_be_killed(
    store: Store, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(clusters, "GRACE", 5.0)
    monkeypatch.setattr(clusters.time, "sleep", waited.append)

    def events(self: InProcess, timeout: float) -> list[Event]:
        return [Event("interrupted", self.queue.pop(0))]

    monkeypatch.setattr(InProcess, "events", events)
    jobs = [Job(str(i), tiny_run(seed=i)) for i in range(3)]
    ended = Chunk(jobs, Place(device="cpu", store=str(store.root)), BACKEND)()
    assert list(ended) == ["0"] and waited == [5.0]


def test_a_job_is_requeued_as_it_was_after_its_workers_are_stopped(
    store: Store, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    stopped: list[int] = []
    again: list[Any] = []
    monkeypatch.setattr(InProcess, "stop", lambda pool: stopped.append(len(pool.queue)), raising=False)
    chunk = Chunk([Job("a", tiny_run()), Job("b", tiny_run(seed=2))], Place(store=str(store.root)), BACKEND)

    def events(pool: InProcess, timeout: float) -> list[Event]:
        again.append(chunk.checkpoint())  # as a signal's handler would, in the middle
        return [Event("done", pool.queue.pop(0))]

    monkeypatch.setattr(InProcess, "events", events)
    chunk()
    submission = pickle.loads(pickle.dumps(again[0]))
    assert stopped == [1, 1] and isinstance(submission, submitit.helpers.DelayedSubmission)
    assert submission.function.jobs == chunk.jobs and submission.function.backend == BACKEND


# -- a sweep in jobs -----------------------------------------------------------------------------------------


def test_a_sweep_in_jobs_makes_what_local_workers_make(
    tiny_experiment: MakeExperiment, store: Store, queue: Queue, tmp_path: Any, in_process: type[InProcess]
) -> None:
    here = Store(tmp_path / "here")
    sweep_of(tiny_experiment(), here).train(2)
    in_process.started.clear()
    cluster, told = cluster_of(queue, store)
    sweep = sweep_of(tiny_experiment(), store)
    counts = sweep.train(1, cluster)
    assert counts == {"done": len(here.ids()), "diverged": 0, "error": 0} and store.ids() == here.ids()
    assert len(in_process.started) == len(store.ids())
    for run_id in store.ids():
        one, other = (s.result(run_id).tables["history"] for s in (store, here))
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    # Six tuning runs in twos of three; later stages when tuning is over.
    assert queue.arrays[0] == 2 and len(queue.arrays) > 1 and "submitted 6 runs as 2 jobs of array 1" in told
    assert left_by_jobs(store) == []
    assert sweep_of(tiny_experiment(), store).train(1, cluster_of(queue, store)[0])["done"] == 0


def test_what_a_killed_job_lost_is_told_and_done_by_the_next_call(
    tiny_experiment: MakeExperiment, store: Store, queue: Queue, in_process: type[InProcess]
) -> None:
    queue.fate["1_0"] = lambda job_id: "OUT_OF_MEMORY"
    cluster, told = cluster_of(queue, store)
    assert sweep_of(tiny_experiment(), store).train(1, cluster) == {"done": 3, "diverged": 0, "error": 0, "lost": 3}
    assert "the job ended as OUT_OF_MEMORY: 3 runs not done (job 1_0; log: " in told
    assert len(queue.arrays) == 1 and left_by_jobs(store) == ["1_0_0_log.err"]
    before = set(store.ids())
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1, cluster_of(queue, store)[0])
    assert queue.arrays[1] == 1 and not sweep.missing() and before < set(store.ids())
    assert len(in_process.started) == len(store.ids()) == len({job.run_id for job in in_process.started})


def test_jobs_outlive_ctrl_c_and_the_next_call_waits_for_them(
    tiny_experiment: MakeExperiment, store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, told = cluster_of(queue, store)
    sweep = sweep_of(tiny_experiment(), store)

    def ctrl_c() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "_gone", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        sweep.train(1, cluster)
    assert "`scancel 1` ends them" in told and len(queue.functions) == 2 and not store.ids()
    again, told = cluster_of(queue, store)
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1, again)
    assert "of an earlier call" in told and "submitted 6 runs" not in told
    assert not sweep.missing() and left_by_jobs(store) == []


def test_notes_of_jobs_that_ended_unseen_are_struck_off(store: Store, queue: Queue) -> None:
    cluster, _ = cluster_of(queue, store)
    with cluster:
        for name, content in (("7", json.dumps({"runs": ["a"]})), ("8", "{")):
            (cluster.folder / f"{name}.json").write_text(content)
    with cluster_of(queue, store)[0] as again:
        assert not again.earlier and left_by_jobs(store) == []


def test_a_queue_that_does_not_answer_is_one_line_when_jobs_may_be_in_it(store: Store, queue: Queue) -> None:
    cluster, _ = cluster_of(queue, store)
    cluster.states = lambda job_ids: None
    with cluster:
        (cluster.folder / "7.json").write_text('{"runs": ["a"]}')
    with pytest.raises(UserError, match="squeue"):
        cluster.__enter__()


def test_errors_of_runs_and_of_jobs_reach_the_user(
    tiny_experiment: MakeExperiment, store: Store, queue: Queue, tmp_path: Any
) -> None:
    arms = {**ARMS, "broken": ("optimizer=adam", "task.how=raise", "task.at=4")}  # a task, and so a job, of its own

    def raised(job_id: str) -> str:
        trace = "Traceback\nModuleNotFoundError: No module named 'torch'"
        cloudpickle_dump(("error", trace), JobPaths(queue.folder, job_id).result_pickle)
        return "FAILED"

    queue.fate["1_0"] = queue.fate["1_1"] = raised
    cluster, told = cluster_of(queue, store)
    counts = sweep_of(tiny_experiment(arms), store).train(1, cluster)
    assert counts["lost"] == 6 and counts["error"] == 2 and len(queue.arrays) == 1
    for job in ("1_0", "1_1"):
        assert f"ModuleNotFoundError: No module named 'torch': 3 runs not done (job {job}; log: " in told
    queue.fate.clear()
    counts = sweep_of(tiny_experiment(arms), store).train(1, cluster_of(queue, store)[0])
    # The 6 that were lost, and what the reference's tuning decides; new errors, though there were two before.
    assert counts == {"done": 6 + 12, "diverged": 0, "error": 2 + 2}


def test_runs_that_others_are_at_are_waited_for(
    tiny_experiment: MakeExperiment, store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tiny_experiment(), store)
    one = next(iter(sweep.missing()))
    with contextlib.ExitStack() as claims:
        assert claims.enter_context(Store(store.root).claim(one))
        monkeypatch.setattr("runners.sweep.time.sleep", lambda seconds: claims.close() if seconds == 2 else None)
        counts = sweep.train(1, cluster_of(queue, store)[0])
    assert counts["done"] == len(store.ids()) and not sweep.missing() and counts["error"] == 0


def test_no_more_jobs_than_allowed_at_a_time(tiny_experiment: MakeExperiment, store: Store, queue: Queue) -> None:
    cluster, _ = cluster_of(queue, store, Slurm(cpus=1, runs_per_job=1, jobs=2))
    sweep = sweep_of(tiny_experiment(), store)
    sweep.train(1, cluster)
    assert not sweep.missing() and max(queue.arrays) <= 2 and sum(queue.arrays) == len(store.ids())


def test_step_times_are_measured_in_a_job(
    tiny_experiment: MakeExperiment, store: Store, queue: Queue, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny_experiment()
    cluster, _ = cluster_of(queue, store)
    with cluster:
        cluster.call(lambda: time_steps(experiment, cluster.place, tmp_path))
    assert set(pd.read_csv(tmp_path / STEP_TIMES).arm) == set(ARMS)
    queue.fate["2"] = lambda job_id: "TIMEOUT"
    with pytest.raises(UserError, match="ended as TIMEOUT"), cluster:
        cluster.call(dict)


# -- SLURM's side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [FailedJobError("sbatch: error: invalid partition\nmore"), OSError("no sbatch")])
def test_a_submission_that_is_refused_is_one_line(
    error: Exception, tiny_experiment: MakeExperiment, store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(functions: object) -> None:
        raise error

    monkeypatch.setattr(queue, "submit_array", refuse)
    with pytest.raises(UserError, match=r"^no job could be submitted: [^\n]*$"):
        sweep_of(tiny_experiment(), store).train(1, cluster_of(queue, store)[0])


@pytest.mark.parametrize(
    ("answer", "states"),
    [
        (
            (0, "3_0|RUNNING|None\n3_1|PENDING|Resources\n", ""),
            {"3_0": ("RUNNING", "None"), "3_1": ("PENDING", "Resources")},
        ),
        ((1, "", "slurm_load_jobs error: Invalid job id specified"), {}),
        ((1, "", "slurm_load_jobs error: Unable to contact slurm controller"), None),
        (FileNotFoundError("squeue"), None),
    ],
)
def test_what_squeue_says(answer: Any, states: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(words: list[str], **_: Any) -> Any:
        asked.append(words)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(words, *answer)

    monkeypatch.setattr(clusters.subprocess, "run", run)
    assert squeue(["3_1", "3_0", "12"]) == states
    assert asked[0][-2:] == ["--jobs", "3,12"]


def test_the_settings_reach_sbatch(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    backend = Slurm(
        partition="fast", account="us", qos="low", constraint="a100", gpus=2, cpus=6, memory_gb=12, minutes=90,
        warning_seconds=45, setup=("module load cuda",), options={"exclude": "node7"},
    )  # fmt: skip
    text = clusters._executor(backend, tmp_path)._executor._make_submission_file_text("train", "x")
    flags = {
        "partition=fast", "account=us", "qos=low", "constraint=a100", "gpus-per-node=2", "cpus-per-task=6", "mem=12GB",
        "time=90", "signal=USR2@45", "exclude=node7", "requeue",
    }  # fmt: skip
    assert {f"#SBATCH --{flag}" for flag in flags} <= set(text.splitlines())
    assert "\nmodule load cuda\n" in text and "--cpus-per-task=6 train" in text
    plain = clusters._executor(Slurm(), tmp_path)._executor._make_submission_file_text("train", "x")
    assert not any(word in plain for word in ("partition", "gpus", "mem=", "account"))


def test_where_slurm_is_not_there_it_is_said(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: -1))
    with pytest.raises(UserError, match=r"sbatch, srun, squeue"):
        clusters._executor(Slurm(), tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"extra `slurm`"):
        clusters._executor(Slurm(), tmp_path)
