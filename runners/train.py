"""One run: a training loop that never waits for the device, and what it leaves behind."""

import contextlib
import functools
import hashlib
import io
import math
import os
import pickle
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import optimizers
from optimizers import execution
from optimizers.engine import Engine, engine_of
from optimizers.rule import describe
from runners.config import ROOT, Place, Probes, Run, UserError, first_line, name_of
from runners.forward import reestimated
from runners.loss import autocast, compiler_there, passes_of
from runners.probes import Recorder
from runners.refine import refined
from runners.store import Result, Store, write_whole
from tasks.task import Task

CHECK_EVERY = 25
"""Steps between looks at the losses for divergence: the only times that the device is waited for."""
DIVERGED_ABOVE = 10.0
"""A loss above this many times the loss of a uniform prediction ends the run as diverged."""

Progress = Callable[[int], None]


class Interrupted(Exception):
    """The run was told to stop; it goes on from its checkpoint, if it keeps any, when it is started again."""


class Training:
    """The model, optimizer and records of a run, and its training steps.

    Raises:
        UserError: see runners.loss.
    """

    def __init__(self, run: Run, task: Task, device: torch.device) -> None:
        torch.manual_seed(run.seed)
        self.run, self.task = run, task
        self.model = task.model()
        if run.execution == "compiled":
            # The optimizer alone would warn and go on flat, and the run's id would say what it was not.
            compiler_there(device, execution.BACKEND, "execution=compiled", "execution=flat")
        self.optimizer = make_optimizer(run, self.model)
        self.recorder = Recorder(run, self.model, device)
        self.passes = passes_of(run, task, self.model)

    def steps(self, first: int = 0, every: int | None = None) -> Iterator[tuple[int, int | None]]:
        """Train from step ``first`` + 1 to the end of the budget, or to where the run is found to have diverged.

        Yields:
            at every look at the losses, ``every`` steps (CHECK_EVERY) and at the end: the step, and the one at which
            the run has diverged, if it has.
        """
        every = every or CHECK_EVERY
        bound = DIVERGED_ABOVE * self.task.initial_loss
        batches = self.task.batches(self.run.seed, start=first)
        self.model.train()
        for t in range(first + 1, self.run.steps + 1):
            loss = self.passes(next(batches))
            self.recorder.before_step(t, loss)
            self.optimizer.step(loss=loss)
            self.recorder.after_step(t)
            if t % every == 0 or t == self.run.steps:
                diverged = self.recorder.first_bad(bound, t)
                yield t, diverged
                if diverged is not None:
                    return


def train(
    run: Run,
    task: Task,
    device: torch.device,
    store: Store,
    *,
    checkpoint_every: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Train a run to its end, or to where it diverges, on a task that is prepared on the device.

    Identical runs on one device and one version of torch give identical histories: initialisation, data order
    and dropout come from the seed, and arms with the same seed share them.

    Raises:
        Interrupted: out of ``progress``, after a checkpoint was written if checkpoints are on.
        UserError: if the run's decay is refined from a run that is not there; and see runners.loss.
    """
    started = time.perf_counter()
    run_id = run.id(task.fingerprint())
    run = refined(run, store)
    training = Training(run, task, device)
    model, optimizer, recorder = training.model, training.optimizer, training.recorder
    checkpoint = Checkpoint(store.checkpoint(run_id), model, optimizer, recorder)
    first = saved = checkpoint.load() if checkpoint_every else 0
    initialising = time.perf_counter()
    if not first:
        seed = _stream(run.seed, "initialisation")
        run.initialisation.apply(task, model, seed, run.optimizer, run.peak_lr)
        # A stream of its own for dropout, so that an arm that draws more numbers at initialisation changes nothing.
        torch.manual_seed(_stream(run.seed, "training"))
    initialised = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for t, diverged in training.steps(first):
        if diverged is not None:
            break
        if checkpoint_every and t - saved >= checkpoint_every and t < run.steps:
            checkpoint.save(t)
            saved = t
        if progress is not None:
            try:
                progress(t)
            except Interrupted:
                if checkpoint_every and t < run.steps:
                    checkpoint.save(t)
                raise
    if optimizer.execution != run.execution:
        raise UserError(f"execution={run.execution} did not work here, see the warning: use execution=flat")
    trained = time.perf_counter()
    metrics: dict[str, dict[str, float]] = {}
    if diverged is None:
        with contextlib.ExitStack() as stack:
            averaged = stack.enter_context(optimizer.evaluation_weights())
            stack.enter_context(autocast(run, device))
            if averaged:
                stack.enter_context(reestimated(task, model, _stream(run.seed, "evaluation")))
            for split in ("validation", "test"):
                values = task.evaluate(model, split)
                metrics[split] = {name: float(value) for name, value in values.items()}
        if not all(math.isfinite(values["loss"]) for values in metrics.values()):
            # The last step itself broke the weights, after its loss had been looked at.
            diverged, metrics = run.steps, {}
    tables = recorder.tables(diverged or run.steps)
    ended = time.perf_counter()
    summary = {
        "id": run_id,
        "status": "done" if diverged is None else "diverged",
        "diverged_at": diverged,
        "last_finite": _last_finite(tables["history"]) if diverged else None,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "worst": task.worst,
        "metrics": metrics,
        "steps": run.steps,
        "probes": vars_of(run.probes),
        "seconds": {
            "train": trained - started,
            "initialise": initialised - initialising,  # in "train" too
            "evaluate": ended - trained,
            "from_step": first,
        },
        "environment": environment(device),
    }
    config = {**run.science, "probes": vars_of(run.probes)}
    provenance = {
        "data": task.fingerprint(),
        **environment(device),
        **_code(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_mib": _peak_memory(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return Result(summary, config, provenance, tables)


def make_optimizer(run: Run, model: nn.Module) -> Engine:
    """The run's rule over the model's parameters, with and without weight decay as the run says."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if run.weight_decay_on == "matrices":
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    hyper = {k: v for k, v in describe(run.optimizer).items() if k != "name"}
    kind = getattr(optimizers, type(run.optimizer).__name__, None) or engine_of(type(run.optimizer))
    return kind(
        [group for group in groups if group["params"]],
        lr=run.peak_lr,
        weight_decay=run.weight_decay,
        weight_decay_mode=run.weight_decay_mode,
        clip_norm=run.clip_norm,
        warmup=run.warmup,
        decay=run.decay,
        steps=run.steps,
        execution=run.execution,
        **hyper,
    )


class Checkpoint:
    """Everything that a run needs to go on exactly where it was."""

    def __init__(self, path: Path, model: nn.Module, optimizer: Engine, recorder: Recorder) -> None:
        self.path, self.model, self.optimizer, self.recorder = path, model, optimizer, recorder
        self.device = recorder.buffers["loss"].device

    def save(self, t: int) -> None:
        """Write the state after step t, whole or not at all."""
        buffer = io.BytesIO()
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        torch.save(
            {
                "t": t,
                "probes": vars_of(self.recorder.run.probes),
                "environment": environment(self.device),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "recorder": self.recorder.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": cuda,
            },
            buffer,
        )
        write_whole(self.path, buffer.getvalue())

    def load(self) -> int:
        """Restore the last checkpoint; the step it was written after, 0 if there is none that can be used: it
        cannot be read, comes from another device or version, has other parts of the model, or lacks a probe that is now
        asked for."""
        try:
            saved = torch.load(self.path, weights_only=True)
            run = self.recorder.run
            here = saved["environment"] == environment(self.device)
            fits = here and saved["model"].keys() == self.model.state_dict().keys()
            if not (fits and Probes(**saved["probes"]).covers(run.probes, run.steps)):
                return 0
        except (RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
            return 0
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.recorder.load_state_dict(saved["recorder"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        return int(saved["t"])


def prepare(task: Task, place: Place) -> torch.device:
    """Put a task's data on the device and set torch up so that a run can be repeated to the bit.

    On a GPU an operation that cannot be repeated raises RuntimeError when it is used, and says so.
    """
    device = place.torch_device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # one worker a core; and sums do not depend on the machine's number of cores
    if device.type == "cuda":
        # Read when cuBLAS is first used; without it neither it nor cuDNN's LSTM repeats itself.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.cuda.set_device(device)  # graphs and generators are the current device's
        torch.backends.cudnn.allow_tf32 = False  # or float32 has a mantissa of 10 bits in convolutions and LSTMs
        # Nobody reads it, and to fill it takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    try:
        task.prepare(device, place.data)
    except (ValueError, ImportError, OSError) as error:  # a batch larger than the data, no data
        raise UserError(f"task ({name_of(task)}): {first_line(error)}") from error
    return device


def environment(device: torch.device) -> dict[str, str]:
    """What must agree between runs that are compared: device and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "device": device.type,
        "device_name": name,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def vars_of(probes: Any) -> dict[str, Any]:
    """The probes as plain values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(probes).items() if not k.startswith("_")}


def _stream(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:7], "little")


def _last_finite(history: pd.DataFrame) -> dict[str, float] | None:
    finite = history[np.isfinite(history["loss"])]
    if finite.empty:
        return None
    return {"step": int(finite["step"].iloc[-1]), "loss": float(finite["loss"].iloc[-1])}


def _peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of the device's allocator, else of this process over its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache  # a process runs the code that it has loaded, whatever is committed later
def _code() -> dict[str, str | bool]:
    """The revision of the code, and whether it had been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "conf", "optimizers", "tasks", "runners")
        return {"git": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"git": "unknown", "dirty": True}
