"""Sweeps: ``python -m runners.sweep run untuned_warmup_quick``.

A sweep trains what an experiment lacks, however often it is started, stopped or started twice at once; then it
writes the experiment's tables. ``plan`` says what it would do, ``status`` how far it is, ``collect`` writes what an
unfinished one has so far, ``restore`` puts such results, or the tables of a whole one, back into the store.
"""

import argparse
import dataclasses
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from runners import backend as backends
from runners import experiment as experiments
from runners.backend import Slurm
from runners.cluster import Cluster, time_steps
from runners.collect import collect, restore
from runners.config import ROOT, Place, Run, UserError, first_line, name_of, plain
from runners.experiment import Cell, Design
from runners.finished import Finished
from runners.refine import refined
from runners.store import Store
from runners.timing import Stepper, step_times_known, write_step_times
from runners.train import prepare
from runners.worker import Job, Pool, Workers
from tasks.task import Task


class Sweep:
    """An experiment over a store: which runs it needs, which are there, and training the rest."""

    def __init__(
        self, design: Design, store: Store, place: Place, console: Console, elsewhere: torch.device | None = None
    ) -> None:
        """``elsewhere``: what the runs are trained on if not on this machine, where nothing is timed then."""
        self.design, self.store, self.place, self.console = design, store, place, console
        self.device, self.here = elsewhere or place.torch_device(), elsewhere is None
        self.fingerprints: dict[tuple[str, str], str] = {}
        tasks: dict[str, Task] = {}
        for place_in_design, run in design.base.items():
            key = str(plain(run.task))  # an arm may change a field of the task
            if key not in tasks:
                prepare(run.task, place)
                tasks[key] = run.task
            design.base[place_in_design] = refined(run, store).replace(task=tasks[key])
            self.fingerprints[place_in_design] = tasks[key].fingerprint()
        self.finished = Finished(store, console)
        self._ids: dict[tuple[str, str, float, int], str] = {}
        self._cells: list[tuple[Cell, str]] = []
        self._lacking: dict[str, list[Cell]] = {}  # by id: those that have no result, or not all that they ask for
        self._untuned: Counter[tuple[str, str]] = Counter()  # tuning runs among them, by task and arm
        self._plan()

    def run_id(self, cell: Cell) -> str:
        """The id of a cell's run (hashed once)."""
        key = (cell.arm, cell.task, cell.lr, cell.seed)
        if key not in self._ids:
            self._ids[key] = cell.run.id(self.fingerprints[cell.arm, cell.task])
        return self._ids[key]

    def summary(self, run_id: str, run: Run) -> dict[str, Any] | None:
        """The summary of a finished run that recorded all that is asked for, when ``missing`` was last called."""
        return self.finished.summary(run_id, run)

    def cells(self) -> list[tuple[Cell, str]]:
        """Every cell that was determined when ``missing`` was last called, with its run's id."""
        return self._cells

    def missing(self) -> dict[str, Cell]:
        """The determined runs that have no result now, by id."""
        determined = True
        for run_id in self.finished.look() & self._wanted:
            cells = self._lacking.get(run_id, [])
            if cells and all(self.summary(run_id, cell.run) is not None for cell in cells):
                del self._lacking[run_id]
                tuning = [(cell.task, cell.arm) for cell in cells if cell.stage == "tuning"]
                self._untuned.subtract(tuning)
                determined &= all(self._untuned[place] for place in tuning)
            else:  # gone, or replaced by one that lacks something else
                determined = False
        if not determined:
            self._plan()
        return {run_id: cells[-1] for run_id, cells in self._lacking.items()}

    def _plan(self) -> None:
        """Determine the cells from the results, and which of them lack one. ``missing`` needs this again only where
        an arm has been tuned on a task, which determines further cells."""

        def lookup(cell: Cell) -> dict[str, Any] | None:
            return self.summary(self.run_id(cell), cell.run)

        self._cells = [(cell, self.run_id(cell)) for cell in self.design.cells(lookup)]
        self._wanted = {run_id for _, run_id in self._cells}
        self._lacking = {}
        for cell, run_id in self._cells:
            if self.summary(run_id, cell.run) is None:
                self._lacking.setdefault(run_id, []).append(cell)
        lacking = (cell for cells in self._lacking.values() for cell in cells)
        self._untuned = Counter((cell.task, cell.arm) for cell in lacking if cell.stage == "tuning")

    @cached_property
    def seconds_a_run(self) -> dict[str, float]:
        """Training seconds of one run of each task: from the store's results, else by timing a few steps."""
        known: dict[str, list[float]] = {task: [] for task in self.design.experiment.tasks}
        for cell, run_id in self._cells:
            found = self.summary(run_id, cell.run)
            if (
                found is not None
                and found["status"] == "done"
                and found["seconds"]["from_step"] == 0
                and found["environment"]["device"] == self.device.type
            ):
                known[cell.task].append(found["seconds"]["train"] + found["seconds"]["evaluate"])
        first = {task: run for (_, task), run in reversed(self.design.base.items())}
        return {task: sum(of) / len(of) if of else self._timed(first[task]) for task, of in known.items()}

    def _timed(self, run: Run) -> float:
        if not self.here:
            return math.nan
        try:
            return Stepper(run).seconds(4) * run.steps
        except Exception as error:  # the worker that trains it will record what is wrong
            self.console.print(f"cannot time a step of {name_of(run.task)}: {first_line(error)}", style="red")
            return 0.0

    def train(self, workers: int, given: Workers | None = None) -> dict[str, int]:
        """Train all that is missing, by worker processes here or what is given instead; the counts of how the runs
        ended. Raises KeyboardInterrupt when stopped."""
        counts = dict.fromkeys(("done", "diverged", "error"), 0)
        gave_up: set[str] = set()  # errors, and runs that their jobs lost: not again in this sweep
        elsewhere: dict[str, Cell] = {}
        pending: list[tuple[str, Cell]] = []
        waiting = 0
        seconds = self.seconds_a_run
        with Display(self.console, seconds) as display, given or Pool(self.place, workers) as pool:
            replan = True
            while True:
                if replan or (elsewhere and pool.idle and not pending):
                    flying = {job.run_id for job in pool.busy}
                    missing = self.missing()
                    elsewhere = {k: c for k, c in elsewhere.items() if k in missing and self.store.claimed(k)}
                    pending = [(k, c) for k, c in missing.items() if k not in flying | gave_up | elsewhere.keys()]
                    left = Counter(cell.task for run_id, cell in missing.items() if run_id not in gave_up)
                    later = Counter({task: n for task, n in self.undetermined().items() if left[task]})
                    display.expect(left + later, counts)
                    replan = False
                while pool.idle and pending:
                    run_id, cell = pending.pop(0)
                    pool.start(Job(run_id, cell.run))
                    display.began(run_id, cell)
                display.tick(pool.status)
                if not pool.busy and not pending:
                    if not elsewhere:
                        return counts
                    if len(elsewhere) != waiting:
                        waiting = len(elsewhere)
                        display.say(f"waiting for {waiting} runs that another sweep is at")
                    time.sleep(2)
                for event in pool.events(timeout=1.0):
                    run_id = event.job.run_id
                    if event.kind == "step":
                        display.step(run_id, event.step)
                        continue
                    if event.kind == "again":
                        display.say(f"{run_id}: {event.text}")
                        continue
                    display.ended(run_id)
                    replan = True
                    if event.kind in (*counts, "lost"):
                        counts[event.kind] = counts.get(event.kind, 0) + 1
                    if event.kind == "failed":
                        raise UserError(event.text)
                    if event.kind == "elsewhere":
                        elsewhere[run_id] = next(c for c, k in self.cells() if k == run_id)
                    elif event.kind in ("error", "lost"):
                        gave_up.add(run_id)
                        if event.text:
                            display.say(f"{run_id}: {event.text}")

    def undetermined(self) -> Counter[str]:
        """The runs that tuning has yet to determine, by task; but for those of ``own`` and ``high``, of which there may
        be none. A task that is not there is tuned."""
        untuned = {task for (task, _), count in self._untuned.items() if count > 0}
        runs = {run_id: cell for cell, run_id in self.cells() if cell.task in untuned}
        determined = Counter((cell.task, cell.stage) for cell in runs.values())
        return Counter({
            task: sum(max(0, n - determined[task, s]) for s, n in stages.items() if s not in ("own", "high"))
            for task, stages in self.design.size().items() if task in untuned
        })  # fmt: skip


class Display:
    """Progress: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, seconds_a_run: dict[str, float]) -> None:
        self.console = console
        # Where nobody knows how long the runs of a task take, all runs count alike.
        known = all(s > 0 for s in seconds_a_run.values())
        self.seconds = seconds_a_run if known else dict.fromkeys(seconds_a_run, 1.0)
        self.live = console.is_terminal
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"), TextColumn("{task.fields[counts]}"), console=console,
        )  # fmt: skip
        self.item = self.bar.add_task("runs", total=None, eta="", counts="")
        self.left: Counter[str] = Counter()
        self.counts = dict.fromkeys(("done", "diverged", "error"), 0)
        self.flying: dict[str, tuple[Cell, int]] = {}
        self.work = 0.0  # of the runs that have ended, in the seconds they were estimated at
        self.said = 0.0

    def __enter__(self) -> "Display":
        if self.live:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bar.stop()

    def expect(self, left: Counter[str], counts: dict[str, int]) -> None:
        """How many runs of each task are left, those in flight among them, and how many ended how."""
        self.left, self.counts = left, counts

    def began(self, run_id: str, cell: Cell) -> None:
        """A run is in flight."""
        self.flying[run_id] = (cell, 0)

    def step(self, run_id: str, step: int) -> None:
        """A run in flight has reached a step."""
        self.flying[run_id] = (self.flying[run_id][0], step)

    def ended(self, run_id: str) -> None:
        """A run is no longer in flight."""
        cell, _ = self.flying.pop(run_id)
        self.work += self.seconds[cell.task]

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.console.print(text, highlight=False)

    def tick(self, status: str = "") -> None:
        """Redraw, with a word on who is at work."""
        ended = sum(self.counts.values())
        total = ended + self.left.total()
        elapsed = time.monotonic() - self.started
        # Estimated seconds tell the tasks apart; how fast they go by tells what they are worth here and now.
        flying = sum(self.seconds[cell.task] * step / cell.run.steps for cell, step in self.flying.values())
        left = sum(self.seconds[task] * n for task, n in self.left.items()) - flying
        done = self.work + flying
        eta = f"about {_duration(elapsed * left / done)} left" if elapsed > 20 and done else ""
        counts = "; ".join(filter(None, [", ".join(f"{n} {kind}" for kind, n in self.counts.items()), status]))
        if self.live:
            self.bar.update(self.item, total=total, completed=ended, eta=eta, counts=counts)
        elif time.monotonic() - self.said >= 30 and elapsed > 20:
            self.said = time.monotonic()
            line = "; ".join(filter(None, [f"{ended}/{total} runs in {_duration(elapsed)}: {counts}", eta]))
            self.console.print(line, highlight=False)


def plan_table(sweep: Sweep, workers: int, cluster: Slurm | None = None) -> Iterator[Any]:
    """The plan, for the console: arms x tasks x grid = runs, how many are done, the time for the rest."""
    experiment = sweep.design.experiment
    sizes, seconds = sweep.design.size(), sweep.seconds_a_run
    done: dict[tuple[str, str], int] = {}
    cells = {run_id: cell for cell, run_id in sweep.cells()}
    for run_id, cell in cells.items():
        if sweep.summary(run_id, cell.run) is not None:
            done[cell.task, cell.stage] = done.get((cell.task, cell.stage), 0) + 1
    undetermined = sweep.undetermined()
    table = Table(
        "task", "steps", "lrs", "runs", "done", "s a run", "left", title=f"{experiment.name}: {experiment.question}"
    )
    left_total, runs_total, done_total = 0.0, 0, 0
    for task, plan in experiment.tasks.items():
        runs = sum(cell.task == task for cell in cells.values()) + undetermined[task]
        least = task in undetermined and plan.test_seeds
        finished = sum(n for (t, _), n in done.items() if t == task)
        left = (runs - finished) * seconds[task]
        left_total, runs_total, done_total = left_total + left, runs_total + runs, done_total + finished
        steps = next(r for (_, t), r in sweep.design.base.items() if t == task).steps
        table.add_row(
            task, str(steps), experiment.grid(task), f"{'≥ ' if least else ''}{runs}", str(finished),
            "?" if math.isnan(seconds[task]) else f"{seconds[task]:.1f}", _duration(left),
        )  # fmt: skip
    yield table
    arms = ", ".join(experiment.arms)
    yield f"{len(experiment.arms)} arms ({arms}) x {len(experiment.tasks)} tasks; runs by stage: " + "; ".join(
        f"{task} " + " + ".join(f"{n} {stage}" for stage, n in stages.items() if n) for task, stages in sizes.items()
    )
    rest = f"{_duration(left_total / workers)} left with {workers} worker{'s' if workers > 1 else ''}"
    if cluster is not None:
        partition = f" of {cluster.partition}" if cluster.partition else ""
        time_left = "an unknown time" if math.isnan(left_total) else _duration(left_total)
        rest = f"{time_left} of training left, at most {cluster.runs_per_job} runs to a job{partition}"
    yield f"{runs_total} runs, {done_total} done; {rest} on {sweep.device}; stated cost: {experiment.cost}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m runners.sweep", description=__doc__)
    parser.add_argument("command", choices=["run", "plan", "status", "collect", "restore"])
    parser.add_argument("experiment", help="a file in conf/experiment/, without .yaml")
    parser.add_argument(
        "--backend", nargs="+", default=["local"], metavar=("NAME", "KEY=VALUE"),
        help="a file in conf/backend/, without .yaml, and changes to it: slurm partition=gpu gpus=1",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core; one on a GPU)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--store", default=str(ROOT / "runs"), help="folder of the run directories")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the tables")
    parser.add_argument("--data-root", default=None, help="folder of local data sets (or set UNTUNED_DATA)")
    parser.add_argument("--checkpoint-every", type=int, default=None, help="steps between checkpoints; 0: none")
    parser.add_argument("--logger", default="none", choices=["none", "wandb"])
    words = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    try:
        _command(words, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None


def _command(words: argparse.Namespace, console: Console) -> None:
    if words.workers is not None and words.workers < 1:
        raise UserError(f"workers must be at least 1, not {words.workers}")
    experiment = experiments.load(words.experiment)
    folder = Path(words.results) / experiment.name
    store = Store(words.store)
    if words.command == "restore":
        put, there = restore(folder, store)
        console.print(f"{put} runs restored to {store.root}, {there} were there")
        return
    if words.command in ("run", "collect"):
        _check_writable(folder)
    backend = backends.load(words.backend, workers=words.workers, checkpoint_every=words.checkpoint_every)
    place = Place(
        device=words.device, store=str(store.root), data_root=words.data_root,
        checkpoint_every=backend.checkpoint_every, logger=words.logger,
    )  # fmt: skip
    design = Design(experiment)
    cluster = backend if isinstance(backend, Slurm) else None
    if cluster is None:
        sweep = Sweep(design, store, place, console)
    else:  # planning needs the data, and no GPU
        device = place.device if place.device != "auto" else "cuda" if cluster.gpus else "cpu"
        here = dataclasses.replace(place, device="cpu")
        sweep = Sweep(design, store, here, console, elsewhere=_device(device))
    workers = backend.workers or (len(os.sched_getaffinity(0)) if sweep.device.type == "cpu" else 1)
    if words.command == "status":
        _print_status(sweep, console)
        return
    if words.command == "collect" and sweep.missing():
        _collect_so_far(sweep, folder, console)
        return
    for part in plan_table(sweep, workers, cluster):
        console.print(part)
    if words.command == "plan":
        return

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    while True:
        counts = sweep.train(workers, None if cluster is None else Cluster(cluster, place, say))
        if counts.get("lost"):
            raise UserError(f"{counts['lost']} runs were lost by their jobs; the same command submits them again")
        damaged = collect(design, [(c, k) for c, k in sweep.cells() if sweep.summary(k, c.run)], store, folder)
        if not damaged:
            break
        for path in damaged:
            console.print(f"{path} cannot be read: set aside, the run is made again")
    if experiment.reference is None and not step_times_known(design, folder):
        if cluster is None:
            write_step_times(design, sweep.device, folder)
        else:
            console.print("measuring step times in a job")
            with Cluster(cluster, place, say) as jobs:
                jobs.call(partial(time_steps, experiment, place, folder))
    ended = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    console.print(f"trained now: {ended}; tables in {folder}")
    if counts["error"]:
        raise UserError(f"{counts['error']} runs failed, see {store.root}/.errors; the same command tries them again")


def _collect_so_far(sweep: Sweep, folder: Path, console: Console) -> None:
    if (folder / "runs.csv").exists():
        raise UserError(f"{folder} holds a whole sweep, and this one is unfinished: restore it first, or move it away")
    cells = [(cell, run_id) for cell, run_id in sweep.cells() if sweep.summary(run_id, cell.run) is not None]
    if not cells:
        raise UserError(f"no run of {sweep.design.experiment.name} is finished yet")
    damaged = collect(sweep.design, cells, sweep.store, folder, whole=False)
    count = len({run_id for _, run_id in cells}) - len(damaged)
    console.print(f"{count} finished runs written to {folder}; from there `restore` puts them into a store again")


def _print_status(sweep: Sweep, console: Console) -> None:
    table = Table("task", "stage", "runs", "done", "diverged", "error", "in flight")
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for cell, run_id in sweep.cells():
        row = rows.setdefault(
            (cell.task, cell.stage), dict.fromkeys(("runs", "done", "diverged", "error", "flying"), 0)
        )
        row["runs"] += 1
        summary = sweep.summary(run_id, cell.run)
        status = summary["status"] if summary is not None else sweep.store.status(run_id)
        if summary is not None or status == "error":  # a result without a probe that is asked for is not done
            row[status] += 1
        row["flying"] += sweep.store.claimed(run_id)
    for (task, stage), row in rows.items():
        table.add_row(task, stage, *(str(n) for n in row.values()))
    console.print(table)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)  # of another machine: it need not be here
    except RuntimeError as error:
        raise UserError(f"device {name!r}: {first_line(error)}") from None


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the results folder {folder}: {error.strerror}") from None


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    main()
