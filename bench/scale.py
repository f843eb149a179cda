"""Cost against the number of runs: commands over stores of finished runs, figures, and the memory of a worker.

The stores are made up: every run has the files of one that was trained, with its own id, lr, seed and metrics. Each
command has a process of its own, so that its peak memory can be told.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import yaml
from rich.console import Console

from runners import experiment as experiments
from runners import sweep as sweeps
from runners.collect import collect, row, runs_csv
from runners.config import ROOT, Place
from runners.experiment import Cell, Design, Experiment, TaskPlan
from runners.store import Store
from runners.sweep import Sweep
from runners.train import prepare, train, vars_of
from runners.worker import Job, carry_out
from tasks.task import Task

TITLE = "Cost against the number of runs"

ARMS: dict[str, tuple[str, ...]] = {
    **{name: (f"optimizer={name}",) for name in ("adam", "adamw", "radam", "adan", "lion", "sgd", "lamb")},
    **{name: ("optimizer=adam", f"warmup={name}") for name in ("untuned_linear", "rectifier")},
    "linear": ("optimizer=adam", "warmup=linear", "warmup.tau=50"),
}
BATCHES = {"digits": 64, "digits_small": 32}
LRS = (0.001, 0.003, 0.01, 0.03, 0.1)
STEPS = 300
"""Of the run whose history every made-up run has: as in the quick experiments."""
QUICK = "untuned_warmup_quick"
"""The experiment whose figures are drawn."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How many runs a made-up sweep has."""

    arms: int
    seeds: int

    @property
    def runs(self) -> int:
        return len(BATCHES) * self.arms * len(LRS) * self.seeds

    def experiment(self) -> Experiment:
        """A sweep of so many tuning runs."""
        tasks = {
            name: TaskPlan(LRS, self.seeds, task="digits_resnet", overrides=(f"task.batch_size={batch}",))
            for name, batch in BATCHES.items()
        }
        arms = dict(list(ARMS.items())[: self.arms])
        return Experiment("made_up", "What do many runs cost?", "none", "none", arms, tasks, "adam")


def measure(place: Place, quick: bool) -> pd.DataFrame:
    """One row a measurement. Columns:

    what: a command, or ``worker``, or ``figures``.
    runs: in the store; for a worker, that it has trained.
    seconds: from when everything is imported; for a worker since its first run.
    process_seconds: of the whole process, imports included.
    mib: the process's peak memory; for a worker its memory then.
    """
    rows: list[dict[str, Any]] = []
    for size in [Size(2, 1)] if quick else [Size(10, 1), Size(10, 10), Size(10, 100)]:
        with tempfile.TemporaryDirectory(prefix="untuned-") as folder:
            there = dataclasses.replace(place, store=f"{folder}/store")
            fill(size, there, steps=5 if quick else STEPS)
            for what in COMMANDS:
                rows += _apart(command, what, size, there, alone=not quick)
    with tempfile.TemporaryDirectory(prefix="untuned-") as folder:
        there = dataclasses.replace(place, store=f"{folder}/store")
        rows += _apart(worker, *((Size(1, 1), 5) if quick else (Size(10, 5), 50)), there, alone=not quick)
    if not quick:
        rows += figures()
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> str:
    """The table for the report."""
    shown = table.assign(
        seconds=table.seconds.map("{:.2f}".format),
        process_seconds=table.process_seconds.map(lambda s: "" if np.isnan(s) else f"{s:.1f}"),
        mib=table.mib.map(lambda m: "" if np.isnan(m) else f"{m:.0f}"),
    ).rename(columns={"process_seconds": "with imports", "mib": "MiB"})
    columns = ["what", "runs", "seconds", "with imports", "MiB"]
    lines = [
        shown[columns].to_markdown(index=False, disable_numparse=True),
        "Seconds of a command are those after the imports, in one process, so they scatter by some tenths; MiB is the "
        "process's peak. " + " ".join(f"`{name}`: {command.__doc__}" for name, command in COMMANDS.items()),
    ]
    trained = table[table.what == "worker"]
    if len(trained) > 1:
        first, last = trained.iloc[0], trained.iloc[-1]
        growth = 1024 * (last.mib - first.mib) / (last.runs - first.runs)
        lines.append(
            f"A worker holds {first.mib:.0f} MiB after {first.runs} runs and {last.mib:.0f} MiB after {last.runs}: "
            f"{growth:+.0f} KiB a run."
        )
    return "\n\n".join(lines)


# -- a store of made-up runs -----------------------------------------------------------------------------------


def fill(size: Size, place: Place, steps: int) -> None:
    """Write every run of a sweep into the store, as ``Store.publish`` would but for its fsyncs."""
    store, design = Store(place.store), Design(size.experiment())
    first = next(design.cells(lambda cell: None)).run
    device = prepare(first.task, place)
    trained = train(first.replace(steps=steps), first.task, device, store)
    store.publish(trained)
    made = store.root / trained.summary["id"]
    same = {path.name: path.read_bytes() for path in made.iterdir() if path.name not in ("summary.json", "config.yaml")}
    shutil.rmtree(made)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in same.items()}
    draws = np.random.default_rng(0)
    fingerprint = first.task.fingerprint()
    configs: dict[tuple[str, str], tuple[str, str]] = {}
    for cell in design.cells(lambda cell: None):
        if (cell.arm, cell.task) not in configs:
            configs[cell.arm, cell.task] = _around_lr_and_seed(cell)
        before, after = configs[cell.arm, cell.task]
        config = before + yaml.safe_dump({"lr": cell.lr, "seed": cell.seed}) + after
        result = copy.deepcopy(trained.summary)
        result |= {"id": cell.run.id(fingerprint), "probes": vars_of(cell.run.probes), "steps": cell.run.steps}
        for values in result["metrics"].values():
            values["loss"] += draws.exponential()
        result["digests"] = {"config.yaml": hashlib.sha256(config.encode()).hexdigest(), **digests}
        folder = store.root / result["id"]
        folder.mkdir()
        (folder / "config.yaml").write_text(config)
        (folder / "summary.json").write_text(json.dumps(result, indent=1))
        for name, content in same.items():
            (folder / name).write_bytes(content)


def _around_lr_and_seed(cell: Cell) -> tuple[str, str]:
    """A config's YAML before and after its lines of lr and seed: writing the whole of it takes milliseconds."""
    config = {**cell.run.science, "probes": vars_of(cell.run.probes)}
    lines = yaml.safe_dump(config, sort_keys=False).splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("lr: "))
    return "".join(lines[:at]), "".join(lines[at + 2 :])


# -- commands, each over a store that holds every run ----------------------------------------------------------


def plan(size: Size, place: Place, results: Path) -> None:
    """what `make plan` does, or `make status`, which says the same of each stage."""
    _main("plan", size, place, results)


def status(size: Size, place: Place, results: Path) -> None:
    """`make status`."""
    _main("status", size, place, results)


def resume(size: Size, place: Place, results: Path) -> None:
    """a sweep up to where it finds nothing to train."""
    assert _sweep(size, place).train(1) == {"done": 0, "diverged": 0, "error": 0}


def replan(size: Size, place: Place, results: Path) -> Iterator[None]:
    """what a sweep that lacks as many runs as it has does after each run that ends."""
    twice = dataclasses.replace(size, seeds=2 * size.seeds)
    sweep = _sweep(twice, place)
    ended, aside = sweep.store.ids()[0], results.with_name("aside")
    (sweep.store.root / ended).rename(aside)
    before = sweep.missing()
    aside.rename(sweep.store.root / ended)
    yield  # what is above is not timed
    assert before.keys() - sweep.missing().keys() == {ended}


def summaries(size: Size, place: Place, results: Path) -> None:
    """the summaries of all runs as the one table that the analysis reads, runs.csv."""
    sweep = _sweep(size, place)
    found = ((cell, run_id, sweep.summary(run_id, cell.run)) for cell, run_id in sweep.cells())
    rows = [row(cell, run_id, known) for cell, run_id, known in found if known is not None]
    assert len(rows) == size.runs
    results.with_suffix(".csv").write_bytes(runs_csv(rows))


def tables(size: Size, place: Place, results: Path) -> None:
    """all tables that are committed, with every step's loss, checked against digests and compressed."""
    sweep = _sweep(size, place)
    assert collect(sweep.design, sweep.cells(), sweep.store, results) == []


COMMANDS = {f.__name__: f for f in (plan, status, resume, replan, summaries, tables)}


def command(what: str, size: Size, place: Place) -> list[dict[str, Any]]:
    """Measure one of the commands in this process."""
    console = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="untuned-") as folder, contextlib.redirect_stdout(console):
        started = time.perf_counter()
        rest = COMMANDS[what](size, place, Path(folder, "made_up"))
        if rest is not None:
            next(rest)
            started = time.perf_counter()
            next(rest, None)
        seconds = time.perf_counter() - started
    return [{"what": what, "runs": size.runs, "seconds": seconds, "mib": _memory("VmHWM")}]


def _main(what: str, size: Size, place: Place, results: Path) -> None:
    with mock.patch.object(experiments, "load", return_value=size.experiment()):
        sweeps.main([what, "made_up", "--store", place.store, "--results", str(results), "--device", place.device])


def _sweep(size: Size, place: Place) -> Sweep:
    return Sweep(Design(size.experiment()), Store(place.store), place, Console(file=io.StringIO()))


# -- the others ------------------------------------------------------------------------------------------------


def worker(size: Size, every: int, place: Place) -> list[dict[str, Any]]:
    """Train all runs, but for a few steps each, one after another, as a worker of a sweep does."""
    sweep = _sweep(size, place)
    prepared: dict[str, Task] = {}
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for count, (cell, _) in enumerate(sweep.cells(), start=1):
        run = cell.run.replace(steps=3)
        event = carry_out(Job(run.id(sweep.fingerprints[cell.arm, cell.task]), run), place, prepared)
        assert event.kind in ("done", "diverged"), event.text
        if count % every == 0:
            seconds = time.perf_counter() - started
            rows.append({"what": "worker", "runs": count, "seconds": seconds, "mib": _memory("VmRSS")})
    return rows


def figures() -> list[dict[str, Any]]:
    """Draw an experiment's figures from a copy of its tables."""
    with tempfile.TemporaryDirectory(prefix="untuned-") as folder:
        shutil.copytree(ROOT / "results" / QUICK, Path(folder, QUICK), ignore=shutil.ignore_patterns("figures"))
        words = [sys.executable, "-m", "analysis.run_notebooks", "--results", folder, "--experiment", QUICK]
        started = time.perf_counter()
        subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    runs = pd.read_csv(ROOT / "results" / QUICK / "runs.csv").run.nunique()
    return [{"what": "figures", "runs": runs, "seconds": seconds, "process_seconds": seconds, "mib": np.nan}]


def _apart(call: Callable[..., list[dict[str, Any]]], *words: Any, alone: bool) -> list[dict[str, Any]]:
    """What a call measured in a process of its own, with the seconds of that process; or in this one, which is
    quicker."""
    started = time.perf_counter()
    if alone:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            rows = pool.submit(call, *words).result()
    else:
        rows = call(*words)
    return [{**row, "process_seconds": time.perf_counter() - started if alone else np.nan} for row in rows]


def _memory(kind: str) -> float:
    """MiB of this process: VmHWM, its peak, or VmRSS, now. Where there is no /proc both are the peak."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
