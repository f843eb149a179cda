"""Runs per hour of a grid: this project's sweep, and what one would do otherwise."""

import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import yaml

from runners.config import ROOT, Place, Run, UserError, compose_run
from runners.timing import Stepper
from runners.train import prepare

TITLE = "A sweep"

LRS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
OVERRIDES = ["optimizer=adamw", "optimizer.beta2=0.98", "warmup=untuned_linear"]
OURS = "this project's sweep"
GRAPHS = f"{OURS}, CUDA graphs"
WAYS: dict[str, list[str]] = {OURS: [], GRAPHS: ["model_execution=cuda_graph"]}
"""Of ours, in words of a run: all of them on a GPU, elsewhere the first alone."""
MULTIRUN, JOBLIB = "Hydra multirun of processes", "joblib, processes on all cores"
CEILING = "ceiling: bare steps on all cores"


@dataclass(frozen=True)
class Grid:
    """A grid of six learning rates: its task, steps of a run, seeds, and how many runs the slow candidates are timed
    on (each is a process of its own, so that they cost the same, one by one)."""

    task: str
    steps: int
    seeds: int
    timed: int
    overrides: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """Of the whole grid."""
        return self.seeds * len(LRS)


GRIDS = (
    Grid("digits_resnet", 300, 10, 6),
    Grid("pydocs_lstm", 300, 10, 6),
    Grid("phrases_transformer", 300, 10, 4),
    Grid("cifar10_resnet", 50, 10, 4, ("task.depth=8",)),
)
QUICK = (Grid("digits_resnet", 5, 1, 1),)


def worker_counts(device: str, cores: int) -> list[int]:
    """With how many workers ours is measured: one a core, or on a GPU 1, 2, 4, ... up to that."""
    return [cores] if device == "cpu" else [2**i for i in range(cores.bit_length())]


def measure(place: Place, quick: bool) -> pd.DataFrame:
    """One row a task, candidate and number of workers: ``runs_per_hour`` of the whole grid, and how it was found.

    Columns: task, steps, runs (of the grid), candidate, workers (processes at a time), timed (runs that were really
    made), seconds (that they took), seconds_a_run, startup (seconds, paid once), runs_per_hour. The runs of Hydra and
    joblib are timed before and after ours, half each. A task without data is left out.
    """
    rows: list[dict[str, Any]] = []
    cores = 1 if quick else len(os.sched_getaffinity(0))
    for grid in QUICK if quick else GRIDS:
        run, _ = compose_run([f"task={grid.task}", *OVERRIDES, f"steps={grid.steps}", *grid.overrides])
        try:
            device = prepare(run.task, place)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        half = grid.timed // 2
        timed: dict[tuple[str, int], list[tuple[int, float, float]]] = {}
        others: dict[tuple[str, int], Callable[[int, int], tuple[float, float]]] = {
            (MULTIRUN, 1): lambda first, count, grid=grid: _multirun(grid, place, first, count),  # type: ignore[misc]
            (JOBLIB, cores): lambda first, count, grid=grid: _joblib(grid, place, first, count, cores),  # type: ignore[misc]
        }
        for which, call in others.items():
            timed[which] = [(half, *call(0, half))] if half else []
        counts = worker_counts(device.type, cores)
        for name, words in WAYS.items() if device.type == "cuda" else [(OURS, WAYS[OURS])]:
            for workers in counts:
                timed[name, workers] = [(grid.runs, _ours(grid, place, workers, words), 0.0)]
        for which, call in others.items():
            timed[which].append((grid.timed - half, *call(half, grid.timed - half)))
        for workers in counts:
            step = max(_bare(run, place, workers, 3 if quick else 40))
            timed[CEILING, workers] = [(grid.runs, step * grid.steps * grid.runs / workers, 0.0)]
        for (name, workers), parts in timed.items():
            count, seconds = sum(p[0] for p in parts), sum(p[1] for p in parts)
            startup = sum(p[2] for p in parts) / len(parts)
            rows.append({
                "task": grid.task, "steps": grid.steps, "runs": grid.runs, "candidate": name, "workers": workers,
                "timed": count, "seconds": seconds, "seconds_a_run": seconds / count, "startup": startup,
                "runs_per_hour": 3600 * grid.runs / (startup + seconds / count * grid.runs),
            })  # fmt: skip
    return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> str:
    """The table, with how many times as fast ours is: in its fastest way, with its fastest number of workers."""
    rows, of_ours = [], []
    for task, of_task in table.groupby("task", sort=False):
        ours = of_task[of_task.candidate.isin(WAYS)].sort_values("runs_per_hour")
        rate = of_task.groupby("candidate").runs_per_hour.max()
        best, first = ours.iloc[-1], of_task.iloc[0]
        rows.append({
            "task": task, "grid": f"{first.runs} runs of {first.steps} steps",
            **{name: f"{rate[name]:,.0f}" for name in (MULTIRUN, JOBLIB)},
            OURS: f"{best.runs_per_hour:,.0f}", CEILING: f"{rate[CEILING]:,.0f}",
            "times multirun": f"{best.runs_per_hour / rate[MULTIRUN]:.2f}",
            "times joblib": f"{best.runs_per_hour / rate[JOBLIB]:.2f}",
            "of the ceiling": f"{best.runs_per_hour / rate[CEILING]:.0%}",
        })  # fmt: skip
        for name, in_way in ours.groupby("candidate"):
            by_workers = in_way.set_index("workers").runs_per_hour.sort_index().map("{:,.0f}".format)
            of_ours.append({"task": task, "way": name, **by_workers})
    parts = ["Runs per hour, from the command to its tables, validation and test included.", _markdown(rows)]
    if len(of_ours) > len(rows):
        parts += [
            "Of this project's sweep the fastest is above. All that were measured, by their number of workers (with "
            "CUDA graphs the ceiling, which is eager, is none):",
            _markdown(of_ours),
        ]
    return "\n\n".join([*parts, NOTE])


def _markdown(rows: list[dict[Any, Any]]) -> str:
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


NOTE = """*Hydra multirun*: its basic launcher, one job after the other, each a process of `bench/plain.py` (DataLoader,
eager model, fused AdamW, no logging) with torch's default threads. *joblib*: the same processes, one a core, one thread
each. Both are timed on a few runs, before and after ours, and counted for the whole grid; ours is the whole grid, from
the start of `python -m runners.sweep run` to its end. *Ceiling*: what all cores could give if there were nothing but
training steps: no start, no evaluation, no data to load, each core (on a GPU, each worker) at work while the others
are. (With 50 steps of CIFAR-10 the evaluation on 15,000 images is 39 % of a run on the AMD EPYC.)"""

TRIED = """Tried and left out: runs stacked along a lane dimension (`torch.func.vmap` over the models of 4 runs, on one
core of the AMD EPYC). Milliseconds of forward and backward a run and step, stacked against one after the other:
phrases_transformer 68 / 55, pydocs_lstm 23 / 14, digits_resnet 5.6 / 6.7. It loses on two tasks of three, and on the
third it wins less than it costs in code and in results that depend on which runs were stacked."""


def _rates(first: int, count: int) -> list[float]:
    return list(itertools.islice(itertools.cycle(LRS), first, first + count))


def _multirun(grid: Grid, place: Place, first: int, count: int) -> tuple[float, float]:
    """Seconds of the jobs, and of Hydra's own start."""
    seconds = startup = 0.0
    with tempfile.TemporaryDirectory() as folder:
        rates = ",".join(map(str, _rates(first, count)))
        words = [f"task={grid.task}", f"lr={rates}", f"steps={grid.steps}", f"device={place.torch_device()}",
                 f"data_root={place.data or ''}", f"hydra.sweep.dir={folder}"]  # fmt: skip
        started = time.time()
        said = _run([sys.executable, "-m", "bench.multirun", "-m", *words], folder)
        done = [float(found) for found in re.findall(r"^done at ([\d.]+)", said, re.MULTILINE)]
        assert len(done) == count
        if count > 1:
            each = (done[-1] - done[0]) / (count - 1)
            startup = max(0.0, done[0] - started - each)
            seconds = each * count
        else:
            seconds = done[0] - started
    return seconds, startup


def _joblib(grid: Grid, place: Place, first: int, count: int, cores: int) -> tuple[float, float]:
    """Seconds that as many runs a core as ``count`` took, a core's share of them: what ``count`` runs take."""
    words = [sys.executable, "-m", "bench.plain", grid.task]
    rest = ["0", str(grid.steps), str(place.torch_device()), place.data or ""]
    commands = [[*words, str(lr), *rest] for lr in _rates(first * cores, count * cores)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    joblib.Parallel(n_jobs=cores, prefer="threads")(
        joblib.delayed(subprocess.run)(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        for words in commands
    )
    return (time.perf_counter() - started) / cores, 0.0


def _ours(grid: Grid, place: Place, workers: int, way: list[str]) -> float:
    """Seconds of the whole command, in an empty store."""
    experiment = {
        "question": "How fast is a sweep?", "source": "our own", "cost": "measured here", "screening": True,
        "arms": {"adamw": OVERRIDES}, "reference": "adamw", "overrides": [f"steps={grid.steps}", *way],
        "tasks": {grid.task: {"lrs": list(LRS), "tuning_seeds": grid.seeds, "overrides": list(grid.overrides)}},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.yaml"
        path.write_text(yaml.safe_dump(experiment))
        words = ["run", str(path), "--store", f"{folder}/runs", "--results", f"{folder}/results",
                 "--device", place.device, "--workers", str(workers),
                 *(["--data-root", place.data] if place.data else [])]  # fmt: skip
        started = time.perf_counter()
        said = _run([sys.executable, "-m", "runners.sweep", *words])
        seconds = time.perf_counter() - started
        assert f"{grid.runs} done" in said or "diverged" in said, said
    return seconds


def _run(words: list[str], folder: str | Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(words[1:4])} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout


def _bare(run: Run, place: Place, workers: int, steps: int) -> list[float]:
    """Seconds of a bare training step in each of some processes that are at it at the same time."""
    if workers == 1:
        return [Stepper(run).seconds(steps)]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(workers) as pool:
        barrier = manager.Barrier(workers)
        return pool.starmap(_steps, [(run, place, steps, barrier)] * workers, chunksize=1)


def _steps(run: Run, place: Place, steps: int, barrier: Any) -> float:
    prepare(run.task, place)
    stepper = Stepper(run)
    barrier.wait()
    return stepper.seconds(steps)
