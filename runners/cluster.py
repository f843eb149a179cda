"""Runs as jobs of a SLURM cluster: the interface of ``worker.Pool`` over submitit.

Runs are submitted in array jobs, a chunk of them to each job; a job is a pool of workers over its chunk. Results come
back through the store alone, so its claims keep anything from being trained twice, whatever was submitted twice.

    <store>/.jobs/<job>.json     the ids of the runs of a job that is queued or running
    <store>/.jobs/<job>_*        submitit's files: what the job is to do, its outcome, its logs

A job that ended well leaves nothing there, any other its logs.
"""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runners.backend import Slurm
from runners.config import Place, Probes, Run, UserError, first_line
from runners.experiment import Design, Experiment
from runners.store import FINISHED, Damaged, Store, write_whole
from runners.timing import write_step_times
from runners.worker import Event, Job, Pool

LOOK_EVERY = 2.0
"""Seconds between looks at the store."""
ASK_EVERY = 15.0
"""Seconds between questions to the queue."""
SETTLE = 15.0
"""Seconds that a job is out of the queue before it counts as ended: it may be on its way back into it, and a network
file system shows late what the job has left."""
LATE = 60.0
"""The same of a result that a job says it has published."""
HOLD = 20.0
"""Seconds between submissions while jobs are there: runs that turn up one after the other go together."""
GRACE = 600.0
"""Seconds that a job waits to be killed after its workers were told to stop."""
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
}  # fmt: skip
"""The queue's words for a job that does not go on."""

PER_RUN = ("lr", "seed", "steps", "warmup", "decay", "weight_decay", "clip_norm", "initialisation")
"""Of a run's science what a compiled step does not depend on."""

States = Callable[[Sequence[str]], dict[str, tuple[str, str]] | None]
"""Of jobs that the queue knows the state, and why it is not another; None if the queue does not answer."""


def shared(run: Run) -> str:
    """What the runs of one job have in common: the task, prepared once, and where anything is compiled all that
    it is compiled for."""
    science = run.science
    if "compiled" not in science.values():
        return str(science["task"])
    return str({name: value for name, value in science.items() if name not in PER_RUN})


def chunked(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """The runs in chunks of at most ``size`` that share what ``shared`` says, as few and as even as can be."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(shared(job.run), []).append(job)
    counts = {key: math.ceil(len(group) / size) for key, group in groups.items()}
    return [group[i :: counts[key]] for key, group in groups.items() for i in range(counts[key])]


class Chunk:
    """What one job carries out. Requeued after preemption or at its time limit it passes over what is done."""

    def __init__(self, jobs: list[Job], place: Place, backend: Slurm) -> None:
        self.jobs, self.place, self.backend = jobs, place, backend
        self._pool: Pool | None = None

    def __call__(self) -> dict[str, tuple[str, str]]:
        """How each run ended, as the kind and the text of its event."""
        ended: dict[str, tuple[str, str]] = {}
        pending = list(self.jobs)
        patience = max(5.0, self.backend.warning_seconds - 30.0)
        with Pool(self.place, self.workers, patience) as pool:
            self._pool = pool
            while pool.busy or pending:
                while pool.idle and pending:
                    pool.start(pending.pop(0))
                for event in pool.events(timeout=1.0):
                    if event.kind == "step":
                        continue
                    print(event.job.run_id, event.kind, event.text, flush=True)
                    ended[event.job.run_id] = (event.kind, event.text)
                    if event.kind == "failed":
                        return ended
                    if event.kind == "interrupted":
                        # SLURM tells all processes to stop some time before it preempts a job or the user's
                        # scancel kills it. One that ended by itself before would not be requeued.
                        time.sleep(GRACE)
                        return ended
        return ended

    @property
    def workers(self) -> int:
        """Runs at a time: one a core, or one on a GPU (asked without starting to use it)."""
        device = self.place.device
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        return self.backend.workers or (self.backend.cpus if on_cpu else 1)

    def checkpoint(self) -> Any:
        """What submitit requeues a job with: the same, after its workers have written their checkpoints."""
        from submitit.helpers import DelayedSubmission

        if self._pool is not None:
            self._pool.stop()
        return DelayedSubmission(Chunk(self.jobs, self.place, self.backend))


@dataclass
class _Flight:
    """A run that is to be submitted (``where`` is None) or is with a job."""

    job: Job
    where: str | None
    error: int  # time of the error that was recorded before, 0 if there was none


class Cluster:
    """Runs in flight as jobs. Use as a context; jobs go on when it ends before them.

    Args:
        say: is given lines for the user.
        executor, states: stand in for SLURM's.

    Raises:
        UserError: if submitit or SLURM is not there, or does not take a job.
    """

    idle = sys.maxsize
    """It takes any number of runs: queueing them is what it is for."""

    def __init__(
        self,
        backend: Slurm,
        place: Place,
        say: Callable[[str], None],
        executor: Any = None,
        states: States | None = None,
    ) -> None:
        self.backend, self.place, self.say = backend, place, say
        self.store = Store(place.store)
        self.folder = self.store.root / ".jobs"
        self.executor, self.states = executor or _executor(backend, self.folder), states or squeue
        self.flying: dict[str, _Flight] = {}
        self.jobs: set[str] = set()  # submitted by this call, or with runs that it waits for
        self.earlier: dict[str, str] = {}  # runs of living jobs of earlier calls
        self._known: dict[str, tuple[str, str]] | None = None  # the queue's last answer
        self._absent: dict[str, float] = {}
        self._error_times: dict[str, int] = {}  # as last looked at
        self._looked = self._asked = self._sent = float("-inf")

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(exist_ok=True)
        self._error_times = self._errors()
        notes = {path.stem: _runs(path) for path in self.folder.glob("*.json")}
        states = self.states(sorted(notes)) if notes else {}
        if states is None:
            raise UserError("the queue (squeue) does not answer, and jobs of an earlier call may be in it")
        for job_id, runs in notes.items():
            if _over(states, job_id) or self._outcome(job_id) is not None:
                self._forget(job_id)
            else:
                self.earlier.update(dict.fromkeys(runs, job_id))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        until = time.monotonic() + SETTLE
        while kind is None and self.jobs and time.monotonic() < until:  # their results are there: they are about to end
            for job_id in sorted(self.jobs):
                if self._outcome(job_id) is not None:
                    self._forget(job_id)
            time.sleep(0.1)
        left = _arrays([flight.where for flight in self.flying.values() if flight.where is not None])
        if left:
            self.say(
                f"jobs go on by themselves: `scancel {' '.join(left)}` ends them, the same command waits for them again"
            )

    @property
    def busy(self) -> list[Job]:
        """The runs in flight."""
        return [flight.job for flight in self.flying.values()]

    @property
    def status(self) -> str:
        """The jobs by state, for the user."""
        states = [(self._known or {}).get(job_id) for job_id in self.jobs]
        words = [f"{s[0].lower()} ({s[1]})" if s[0] == "PENDING" else s[0].lower() for s in states if s is not None]
        return "jobs: " + ", ".join(f"{n} {word}" for word, n in sorted(Counter(words).items())) if words else ""

    def start(self, job: Job) -> None:
        """Submit a run with the next array, or wait for the job that has it already."""
        where = self.earlier.get(job.run_id)
        if where is not None and where not in self.jobs:
            self.say(f"job {where} of an earlier call is at some of this: waiting for it")
            self.jobs.add(where)
        self.flying[job.run_id] = _Flight(job, where, self._error_times.get(job.run_id, 0))

    def events(self, timeout: float) -> list[Event]:
        """What has happened since; waits ``timeout`` seconds."""
        self._submit()
        time.sleep(timeout)
        if time.monotonic() - self._looked < LOOK_EVERY:
            return []
        self._looked = time.monotonic()
        gone = self._gone()  # before the results: they are there when their job has gone
        return self._seen() + self._closed(gone)

    def call(self, function: Callable[[], Any]) -> None:
        """Call a function in a job of its own, and wait for it."""
        (job_id,) = self._send([function])
        self.jobs.add(job_id)
        while job_id not in self._gone():
            time.sleep(1.0)
        match self._outcome(job_id):
            case "success", _:
                self._forget(job_id)
            case _:
                reason = self._reason(job_id)
                self._forget(job_id)
                raise UserError(f"{reason} (log: {self._log(job_id)})")

    # -- to the cluster --------------------------------------------------------------------------------------

    def _submit(self) -> None:
        waiting = [flight.job for flight in self.flying.values() if flight.where is None]
        if not waiting or (self.jobs and time.monotonic() - self._sent < HOLD):
            return
        chunks = chunked(waiting, self.backend.runs_per_job)[: max(0, self.backend.jobs - len(self.jobs))]
        if not chunks:
            return
        ids = self._send([Chunk(chunk, self.place, self.backend) for chunk in chunks])
        for job_id, chunk in zip(ids, chunks, strict=True):
            self.jobs.add(job_id)
            for job in chunk:
                self.flying[job.run_id].where = job_id
            write_whole(self.folder / f"{job_id}.json", json.dumps({"runs": [job.run_id for job in chunk]}))
        jobs = "one job" if len(ids) == 1 else f"{len(ids)} jobs of array"
        self.say(f"submitted {_count(sum(map(len, chunks)), 'run')} as {jobs} {_arrays(ids)[0]}")

    def _send(self, functions: Sequence[Callable[[], Any]]) -> list[str]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import clean_env

        self._sent, self._asked = time.monotonic(), float("-inf")
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # it is in the error as well
                if "SLURM_JOB_ID" in os.environ:  # a job of its own: not the settings of the one that this runs in
                    found = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
                    stack.enter_context(clean_env())
                    os.environ.update(found)
                return [job.job_id for job in self.executor.submit_array(functions)]
        except (FailedJobError, FailedSubmissionError, OSError, RuntimeError) as error:
            raise UserError(f"no job could be submitted: {first_line(error)}") from None

    # -- and back --------------------------------------------------------------------------------------------

    def _seen(self) -> list[Event]:
        """The runs in flight that the store now has a result or a new error of."""
        events: list[Event] = []
        names, errors = set(self.store.ids()), self._errors()
        self._error_times = errors
        for run_id, flight in list(self.flying.items()):
            if run_id in names and (status := self._finished(flight.job)) is not None:
                events.append(Event(status, flight.job))
            elif errors.get(run_id, flight.error) != flight.error:
                text = self.store.error(run_id).strip()
                events.append(Event("error", flight.job, text=text.splitlines()[-1] if text else ""))
            else:
                continue
            del self.flying[run_id]
        return events

    def _finished(self, job: Job) -> str | None:
        """The status of a finished run whose result has all that is asked for."""
        with contextlib.suppress(Damaged):
            summary = self.store.summary(job.run_id)
            if summary is not None and summary["status"] in FINISHED:
                covers = Probes(**summary["probes"]).covers(job.run.probes, job.run.steps)
                return str(summary["status"]) if covers else None
        return None

    def _errors(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in os.scandir(self.store.root / ".errors"):
            with contextlib.suppress(OSError):  # a run that was published a moment ago has none any more
                found[entry.name.removesuffix(".json")] = entry.stat().st_mtime_ns
        return found

    def _gone(self) -> set[str]:
        """The jobs that have ended: by themselves, or because the queue has not known them for a while."""
        now = time.monotonic()
        if now - self._asked >= ASK_EVERY and self.jobs:
            self._known, self._asked = self.states(sorted(self.jobs)), now
        gone: set[str] = set()
        for job_id in self.jobs:
            if self._outcome(job_id) is not None:
                gone.add(job_id)
            elif self._known is None or not _over(self._known, job_id):
                self._absent.pop(job_id, None)
            elif now - self._absent.setdefault(job_id, now) >= SETTLE:
                gone.add(job_id)
        return gone

    def _closed(self, gone: set[str]) -> list[Event]:
        """What is to be said of the runs that were with jobs that have ended."""
        events: list[Event] = []
        reasons: dict[str, list[str]] = {}
        lost: Counter[str] = Counter()
        for job_id in sorted(gone):
            kind, report = self._outcome(job_id) or ("nothing", {})
            ended: dict[str, tuple[str, str]] = report if kind == "success" else {}
            rest = {run_id: flight.job for run_id, flight in self.flying.items() if flight.where == job_id}
            now = time.monotonic()
            late = any(ended.get(run_id, ("",))[0] in FINISHED for run_id in rest)
            if late and now - self._absent.setdefault(job_id, now) < LATE:
                continue
            reason = self._reason(job_id)
            for run_id, job in rest.items():
                kind, text = ended.get(run_id, ("lost", ""))
                kind = kind if kind in ("elsewhere", "error") else "lost"
                events.append(Event(kind, job, text=text))
                del self.flying[run_id]
                if kind == "lost":
                    lost[reason] += 1
                    reasons.setdefault(reason, []).append(job_id)
            self._forget(job_id)
        for reason, job_ids in reasons.items():
            names = ", ".join(dict.fromkeys(job_ids))
            log = self._log(job_ids[0])
            self.say(f"{reason}: {_count(lost[reason], 'run')} not done (job {names}; log: {log})")
        return events

    def _outcome(self, job_id: str) -> tuple[str, Any] | None:
        """What the job's function returned or raised, as submitit keeps it; None while it has not."""
        from submitit.core.utils import JobPaths, pickle_load

        path = JobPaths(self.folder, job_id).result_pickle
        try:
            return pickle_load(path) if path.exists() else None
        except (OSError, EOFError):
            return None

    def _reason(self, job_id: str) -> str:
        """Why a job ended without all its runs, in one line."""
        match self._outcome(job_id):
            case "success", report:
                said = [text for how, text in report.values() if how == "failed"]
                return said[0] if said else "the job was told to stop"
            case _, trace:
                return str(trace).strip().splitlines()[-1]
        state = (self._known or {}).get(job_id, ("gone from the queue", ""))[0]
        log = self._log(job_id).read_text(errors="replace") if self._log(job_id).exists() else ""
        words = [
            line.strip() for line in log.splitlines() if line.strip() and not line.startswith(("srun:", "submitit "))
        ]
        return f"the job ended as {state}" + (f": {words[-1]}" if words else "")

    def _log(self, job_id: str) -> Path:
        return self.folder / f"{job_id}_0_log.err"

    def _forget(self, job_id: str) -> None:
        """Strike off a job that has ended; what it leaves behind goes, but for the logs of one that went wrong."""
        kind, report = self._outcome(job_id) or ("nothing", {})
        well = kind == "success" and all(how in (*FINISHED, "elsewhere") for how, _ in (report or {}).values())
        leftover = [self.folder / f"{job_id}.json", *self.folder.glob(f"{job_id}_*" if well else f"{job_id}_*.pkl")]
        self.jobs.discard(job_id)
        self._absent.pop(job_id, None)
        self.earlier = {run_id: where for run_id, where in self.earlier.items() if where != job_id}
        for path in leftover:
            path.unlink(missing_ok=True)
        array = job_id.partition("_")[0]
        if not any(self.folder.glob(f"{array}_*.pkl")):
            (self.folder / f"{array}_submission.sh").unlink(missing_ok=True)
        for link in self.folder.glob(".submission_file_*.sh"):
            if not link.exists():
                link.unlink(missing_ok=True)


def squeue(job_ids: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """The state of jobs by SLURM's queue, which needs no accounting (sacct does)."""
    words = [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        "--format=%i|%T|%r",
        "--jobs",
        ",".join(_arrays(job_ids)),
    ]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return {} if "Invalid job id" in answer.stderr else None
    lines = [line.split("|") for line in answer.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def time_steps(experiment: Experiment, place: Place, folder: Path) -> None:
    """The job that measures an experiment's step times where its runs were trained."""
    from rich.console import Console

    from runners.sweep import Sweep  # which imports this module

    sweep = Sweep(Design(experiment), Store(place.store), place, Console(quiet=True))
    write_step_times(sweep.design, sweep.device, folder)


def _executor(backend: Slurm, folder: Path) -> Any:
    try:
        import submitit

        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=backend.requeues)
    except ImportError:
        raise UserError("the slurm backend needs submitit: install the extra `slurm`") from None
    except RuntimeError:
        raise UserError("the slurm backend needs SLURM's commands (sbatch, srun, squeue), which are not here") from None
    executor.update_parameters(
        name="untuned", timeout_min=backend.minutes, cpus_per_task=backend.cpus, mem_gb=backend.memory_gb,
        gpus_per_node=backend.gpus or None, slurm_partition=backend.partition, slurm_account=backend.account,
        slurm_qos=backend.qos, slurm_constraint=backend.constraint, slurm_signal_delay_s=backend.warning_seconds,
        slurm_array_parallelism=backend.jobs, slurm_setup=list(backend.setup) or None,
        slurm_srun_args=[f"--cpus-per-task={backend.cpus}"],  # which srun does not take over from sbatch
        slurm_additional_parameters={"requeue": True, **backend.options},
    )  # fmt: skip
    return executor


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _over(states: dict[str, tuple[str, str]], job_id: str) -> bool:
    return job_id not in states or states[job_id][0] in OVER


def _arrays(job_ids: Sequence[str]) -> list[str]:
    return sorted({job_id.partition("_")[0] for job_id in job_ids}, key=int)


def _runs(note: Path) -> list[str]:
    try:
        return [str(run_id) for run_id in json.loads(note.read_text())["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
