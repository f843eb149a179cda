"""How long a training step takes: of one run, for a plan, and of all arms of an experiment side by side."""

import itertools
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from runners.collect import STEP_TIMES
from runners.config import Run
from runners.experiment import Design
from runners.graphs import WARMUP
from runners.loss import passes_of
from runners.store import write_whole
from runners.train import environment, make_optimizer
from tasks.common import of_one_shape

ROUNDS, STEPS = 6, 8


class Stepper:
    """A fresh model of a run (its task must be prepared) that takes training steps and does nothing else."""

    def __init__(self, run: Run) -> None:
        torch.manual_seed(0)
        self.model = run.task.model()
        self.optimizer = make_optimizer(run, self.model)
        self.passes = passes_of(run, run.task, self.model)
        batches, first = run.task.batches, 2
        if run.model_execution == "cuda_graph":  # each new shape would be captured first, which takes long
            batches, first = of_one_shape(batches), WARMUP + 1
        self.batches = batches(0)
        self.seconds(first)  # to allocate, compile or capture

    def step(self, batch: Any) -> torch.Tensor:
        """One step; the loss before it."""
        loss = self.passes(batch)
        self.optimizer.step(loss=loss)
        return loss

    def seconds(self, steps: int) -> float:
        """Seconds of one step: the mean over some."""
        batches = list(itertools.islice(self.batches, steps))
        started = time.perf_counter()
        for batch in batches:
            loss = self.step(batch)
        loss.item()  # waits for the device
        return (time.perf_counter() - started) / steps


def step_times(design: Design, device: torch.device) -> pd.DataFrame:
    """Milliseconds of a step, model and optimizer together, of every arm on every task (they must be prepared).

    All arms of a task take turns, a few steps each, and the fastest turn of each counts: what else the machine does
    meanwhile, and whether it slows down, strikes all of them alike. Columns: task, arm, step_ms, and the device.
    """
    rows: list[dict[str, Any]] = []
    for task in design.experiment.tasks:
        steppers = {arm: Stepper(design.base[arm, task]) for arm in design.experiment.arms}
        best = dict.fromkeys(steppers, float("inf"))
        for _ in range(ROUNDS):
            for arm, stepper in steppers.items():
                best[arm] = min(best[arm], stepper.seconds(STEPS))
        rows += [{"task": task, "arm": arm, "step_ms": 1000 * s} for arm, s in best.items()]
    where = environment(device)
    return pd.DataFrame(rows).assign(device_name=where["device_name"], torch=where["torch"])


def step_times_known(design: Design, folder: Path) -> bool:
    """Whether every arm is in ``step_times.csv``."""
    path = folder / STEP_TIMES
    if not path.exists():
        return False
    known = pd.read_csv(path)
    return design.base.keys() <= set(zip(known.arm, known.task, strict=True))


def write_step_times(design: Design, device: torch.device, folder: Path) -> None:
    """Write ``step_times.csv`` unless every arm is in it already."""
    if not step_times_known(design, folder):
        table = step_times(design, device)
        write_whole(folder / STEP_TIMES, table.to_csv(index=False, float_format="%.4g").encode())
