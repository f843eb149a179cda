"""A sweep of 40 runs as jobs of a real SLURM: a job killed, a sweep stopped, a job preempted, and nothing done twice;
and a run that goes on from its checkpoint.

``make test-slurm`` runs it beside a SLURM of its own (with_slurm.sh).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from optimizers import decays, warmups
from optimizers.adam import Adam
from runners import experiment as experiments
from runners import sweep as sweeps
from runners.backend import Slurm, load
from runners.cluster import Cluster
from runners.config import ROOT, Place, Run
from runners.store import Store
from runners.worker import Job
from tests.runners.tiny import Tiny

HERE = Path(__file__).parent
RUNS, JOBS = 40, 4
PATIENCE = 1200.0
"""Seconds that anything may take."""
BACKEND = ["slurm", "partition=here", "cpus=1", f"runs_per_job={RUNS // JOBS}", "minutes=20", "warning_seconds=60"]


class Sweep:
    """Calls of ``python -m runners.sweep run`` on one store, and what can be seen of them from beside."""

    def __init__(self, folder: Path) -> None:
        self.store, self.results, self.logs = folder / "store", folder / "results", folder / "logs"
        self.logs.mkdir()

    @contextlib.contextmanager
    def call(self) -> Iterator["subprocess.Popen[str]"]:
        words = ["run", "forty", "--device", "cpu", "--store", str(self.store), "--results", str(self.results)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.check", *words, "--backend", *BACKEND],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def ended(self, process: "subprocess.Popen[str]", code: int, *told: str) -> str:
        """Wait for a call's end; its output, in which there must be what it should have told."""
        self.until(lambda: process.poll() is not None, "the sweep ends", None)
        assert process.stdout is not None
        text = process.stdout.read()
        print(text, flush=True)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}"
        flat = " ".join(text.split())
        assert all(words in flat for words in told), f"not told: {told}"
        return flat

    def until(self, condition: object, what: str, process: "subprocess.Popen[str] | None") -> None:
        assert callable(condition)
        end = time.monotonic() + PATIENCE
        while not condition():
            self.keep_logs()
            if time.monotonic() > end or (process is not None and process.poll() is not None):
                said = process.stdout.read() if process is not None and process.poll() is not None else ""
                raise AssertionError(f"waited in vain until {what}\n{said}\n{self.told_by_jobs()}")
            time.sleep(0.1)
        self.keep_logs()

    def keep_logs(self) -> None:
        """Second names for the logs: those of jobs that end well are removed."""
        for path in (self.store / ".jobs").glob("*_log.*"):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(path, self.logs / path.name)

    def told_by_jobs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(self.logs.iterdir()))

    def done(self) -> set[str]:
        return {p.name for p in self.store.iterdir() if not p.name.startswith(".")} if self.store.exists() else set()

    def jobs(self) -> dict[str, set[str]]:
        """The runs of each job that is queued or running."""
        found: dict[str, set[str]] = {}
        for path in (self.store / ".jobs").glob("[0-9]*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = set(json.loads(path.read_text())["runs"])
        return found

    def midway(self) -> list[str]:
        """Jobs with some of their runs done, but by far not all."""
        done = self.done()
        return [job for job, runs in self.jobs().items() if 1 <= len(runs & done) <= len(runs) - 4]


def scancel(*words: str) -> None:
    subprocess.run(["scancel", *words], check=True)


def check(folder: Path) -> None:
    sweep = Sweep(folder)
    began = time.monotonic()

    print("== 40 runs in 4 jobs, one of which is killed midway", flush=True)
    with sweep.call() as process:
        sweep.until(sweep.midway, "a job is midway", process)
        jobs, victim = sweep.jobs(), sweep.midway()[0]
        assert len(jobs) == JOBS and sorted(map(len, jobs.values())) == [RUNS // JOBS] * JOBS, jobs
        scancel("--signal=KILL", victim)
        sweep.ended(
            process, 1, f"submitted {RUNS} runs as {JOBS} jobs of array", f"job {victim};", "lost by their jobs"
        )
    first = sweep.done()
    lost = jobs[victim] - first
    assert lost and len(first) + len(lost) == RUNS, (len(first), len(lost))
    assert sweep.midway() == [] and not sweep.jobs()

    print("== the same again, stopped by Ctrl-C when its jobs are there", flush=True)
    with sweep.call() as process:
        sweep.until(sweep.jobs, "the rest is submitted", process)
        process.send_signal(signal.SIGINT)
        told = sweep.ended(process, 130, f"submitted {len(lost)} runs as one job", "go on by themselves: `scancel ")
    (job,) = sweep.jobs()
    assert sweep.jobs()[job] == lost and f"`scancel {job}`" in told

    print("== its job is preempted while nobody waits for it; then the same again", flush=True)
    sweep.until(lambda: sweep.done() > first, "a job is midway", None)
    scancel("--signal=USR2", job)
    sweep.until(lambda: "preempted" in sweep.told_by_jobs() or "timed-out" in sweep.told_by_jobs(), "it is told", None)
    assert sweep.done() < first | lost
    with sweep.call() as process:
        told = sweep.ended(process, 0, f"job {job} of an earlier call", "0 diverged, 0 error; tables in")
    assert "submitted" not in told and sweep.done() == first | lost
    assert re.search(rf"Requeued job {job}\b", sweep.told_by_jobs())

    print("== and once more, with nothing to do", flush=True)
    with sweep.call() as process:
        told = sweep.ended(process, 0, "trained now: 0 done")
    assert "submitted" not in told

    trained = re.findall(r"^(\w{16}) (\w+) *$", sweep.told_by_jobs(), flags=re.M)
    twice = sorted({run_id for run_id, _ in trained if sum(run_id == other for other, _ in trained) > 1} - lost)
    finished = [run_id for run_id, kind in trained if kind == "done"]
    assert not twice and len(finished) == len(set(finished)) and set(finished) <= first | lost, (twice, finished)
    # What a killed job published last, and had no time to tell, is in the store.
    assert len(finished) >= RUNS - 1
    runs = pd.read_csv(sweep.results / "forty" / "runs.csv")
    assert len(runs) == RUNS == runs.run.nunique() and (runs.status == "done").all()
    left = {n: [p.name for p in (sweep.store / n).iterdir()] for n in os.listdir(sweep.store) if n.startswith(".")}
    assert all(name.startswith(f"{victim}_") or "submission" in name for name in left.pop(".jobs")), left
    assert not any(left.values()), left
    print(f"{RUNS} runs, each trained once, in {time.monotonic() - began:.0f} s", flush=True)


def check_checkpoint(folder: Path) -> None:
    print("== a run that is preempted midway goes on from its checkpoint", flush=True)
    run = Run(
        optimizer=Adam(),
        warmup=warmups.Warmup(),
        decay=decays.Linear(),
        task=Tiny(slow=0.02),
        lr=0.01,
        seed=1,
        steps=300,
    )
    run.task.prepare(torch.device("cpu"), None)
    run_id = run.id(run.task.fingerprint())
    store = Store(folder / "other")
    backend = load([*BACKEND, "checkpoint_every=25"])
    assert isinstance(backend, Slurm)
    place = Place(device="cpu", store=str(store.root), checkpoint_every=backend.checkpoint_every)
    told = False
    end = time.monotonic() + PATIENCE
    with Cluster(backend, place, print) as cluster:
        cluster.start(Job(run_id, run))
        while cluster.busy:
            assert time.monotonic() < end, "waited in vain until the run is done"
            ended = cluster.events(timeout=0.2)
            if not told and store.checkpoint(run_id).exists():
                scancel("--signal=USR2", *cluster.jobs)
                told = True
    assert told and [event.kind for event in ended] == ["done"], ended
    summary = store.summary(run_id)
    assert summary is not None and summary["seconds"]["from_step"] > 0, summary
    print(f"it went on from step {summary['seconds']['from_step']}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        experiments.load = lambda name: experiments.read(HERE / f"{name}.yaml")
        sweeps.main()
    else:
        # Who started this in the background of a script made it, and so its sweeps, deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with tempfile.TemporaryDirectory() as temporary:
            check(Path(temporary))
            check_checkpoint(Path(temporary))
            print("passed")
