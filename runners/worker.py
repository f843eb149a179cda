"""Workers that live for a whole sweep: each prepares a task once and trains run after run.

The parent hands each worker one job at a time through a pipe of its own, so a worker that is killed loses its
run in flight and nothing else.
"""

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, Self

from runners.config import Place, Probes, Run, UserError, name_of, plain
from runners.loggers import logger_for
from runners.store import Damaged, Store
from runners.train import Interrupted, prepare, train, vars_of
from tasks.task import Task

REPORT_EVERY = 0.5
"""Seconds between a worker's progress reports."""
TRIES = 2
"""How often a run is started whose worker process is killed."""


@dataclass(frozen=True)
class Job:
    """A run to train, with the id that the parent computed."""

    run_id: str
    run: Run


@dataclass(frozen=True)
class Event:
    """What happened: ``step`` (and which), ``again`` (the worker process is gone, another one has begun anew), or a
    job's end as ``done``, ``diverged``, ``error``, ``elsewhere`` (another sweep has it), ``interrupted``, ``failed``
    (the machine or the store is at fault, so that other runs would fail too) or ``lost`` (its job on a cluster ended
    without it)."""

    kind: str
    job: Job
    step: int = 0
    text: str = ""


class Workers(Protocol):
    """What a sweep gives its runs to. Use as a context."""

    @property
    def idle(self) -> int:
        """How many jobs could be started now."""

    @property
    def busy(self) -> list[Job]:
        """The jobs in flight."""

    @property
    def status(self) -> str:
        """How they are, in a few words for the user, if there is anything to say."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, value: object, trace: object) -> None: ...

    def start(self, job: Job) -> None:
        """Take a job."""

    def events(self, timeout: float) -> list[Event]:
        """What has happened; waits at most ``timeout`` seconds for something."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None


@dataclass
class Pool:
    """A fixed number of worker processes. Use as a context: they are stopped at its end.

    Attributes:
        patience: seconds that stopped workers have for their checkpoints.
    """

    place: Place
    count: int
    patience: float = 20.0
    status: str = ""
    workers: list[_Worker] = field(default_factory=list)
    deaths: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the workers; of the runs in flight checkpoints are left, if they keep any."""
        until = time.monotonic() + self.patience
        for worker in self.workers:
            if worker.job is not None:
                worker.process.terminate()  # it writes its checkpoint, if it keeps any
            with contextlib.suppress(OSError):
                worker.pipe.send(None)
        for worker in self.workers:
            worker.process.join(timeout=max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()

    @property
    def idle(self) -> int:
        """How many jobs could be started now."""
        return self.count - sum(worker.job is not None for worker in self.workers)

    @property
    def busy(self) -> list[Job]:
        """The jobs in flight."""
        return [worker.job for worker in self.workers if worker.job is not None]

    def start(self, job: Job) -> None:
        """Give a job to an idle worker; a new one is started if need be."""
        for worker in [worker for worker in self.workers if worker.job is None]:
            with contextlib.suppress(OSError):  # it died while idle: take another
                worker.pipe.send(job)
                worker.job = job
                return
        worker = self._spawn()
        worker.job = job
        worker.pipe.send(job)

    def events(self, timeout: float) -> list[Event]:
        """What has happened; waits at most ``timeout`` seconds for something."""
        sources: list[Any] = [w.pipe for w in self.workers] + [w.process.sentinel for w in self.workers]
        ready = wait(sources, timeout) if sources else []
        events: list[Event] = []
        for worker in list(self.workers):
            try:
                while worker.pipe.poll():
                    event: Event = worker.pipe.recv()
                    if event.kind != "step":
                        worker.job = None
                    events.append(event)
            except (EOFError, OSError):
                pass
            if worker.process.sentinel in ready and not worker.process.is_alive():
                self.workers.remove(worker)
                if worker.job is not None:
                    code = worker.process.exitcode
                    events.append(self._died(worker.job, f"its worker process ended with code {code}"))
        return events

    def _died(self, job: Job, text: str) -> Event:
        self.deaths[job.run_id] += 1
        if self.deaths[job.run_id] < TRIES:
            self.start(job)
            return Event("again", job, text=f"{text}; again")
        Store(self.place.store).record_error(job.run_id, text, job.run.science)
        return Event("error", job, text=text)

    def _spawn(self) -> _Worker:
        # spawn, not fork: a forked child of a process that has used torch's threads or CUDA can hang.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.place), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker


def serve(pipe: Connection, place: Place) -> None:
    """A worker's life: train what comes through the pipe until None comes, or nobody is left to send."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    # Ctrl-C, and what a cluster announces the end of a job's time with, reach the whole group; the parent decides.
    for warning in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    tasks: dict[str, Task] = {}
    while not stopped:
        try:
            job: Job | None = pipe.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        last = time.monotonic()

        def progress(step: int, job: Job = job) -> None:
            nonlocal last
            if stopped:
                raise Interrupted
            if time.monotonic() - last >= REPORT_EVERY:
                last = time.monotonic()
                with contextlib.suppress(OSError):
                    pipe.send(Event("step", job, step))

        event = carry_out(job, place, tasks, progress)
        try:
            pipe.send(event)
        except OSError:
            return


def carry_out(job: Job, place: Place, tasks: dict[str, Task], progress: Any = None) -> Event:
    """Claim, train and publish one run. ``tasks`` keeps prepared tasks from job to job."""
    try:
        store = Store(place.store)
        with store.claim(job.run_id) as mine:
            if not mine:
                return Event("elsewhere", job)
            with contextlib.suppress(Damaged):
                summary = store.summary(job.run_id)
                if summary is not None:
                    recorded = Probes(**summary["probes"])
                    if recorded.covers(job.run.probes, job.run.steps):
                        return Event(summary["status"], job, text="was there already")  # another sweep was faster
                    # What is there stays there: else two experiments would replace each other's result for ever.
                    probes = job.run.probes.with_those_of(recorded, job.run.steps)
                    job = Job(job.run_id, job.run.replace(probes=probes))
            return _train_claimed(job, place, store, tasks, progress)
    except UserError as error:
        return Event("failed", job, text=str(error))


def _train_claimed(job: Job, place: Place, store: Store, tasks: dict[str, Task], progress: Any) -> Event:
    key = str(plain(job.run.task))
    try:
        device = place.torch_device()
        if key not in tasks:
            prepare(job.run.task, place)
            tasks[key] = job.run.task
        if job.run.id(tasks[key].fingerprint()) != job.run_id:
            raise UserError(f"the data of task {name_of(job.run.task)} has changed since the sweep began")
        with logger_for(place, job.run, job.run_id) as log:
            result = train(
                job.run, tasks[key], device, store, checkpoint_every=place.checkpoint_every, progress=progress
            )
            if (store.root / job.run_id).exists():
                store.set_aside(job.run_id)  # damaged, or without a probe that is now asked for
            store.publish(result)
            log(result)
    except Interrupted:
        return Event("interrupted", job)
    except UserError:
        raise
    except Exception:
        text = traceback.format_exc()
        store.record_error(job.run_id, text, {**job.run.science, "probes": vars_of(job.run.probes)})
        return Event("error", job, text=text.strip().splitlines()[-1])
    return Event(result.summary["status"], job)
