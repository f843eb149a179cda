"""Runs, stores and sweeps over the tiny task, in this process."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from optimizers import decays, warmups
from optimizers.adam import Adam
from runners import experiment as experiments
from runners import sweep as sweeps
from runners.config import Place, Probes, Run, build, compose_run
from runners.experiment import Claim, Design, Experiment, TaskPlan
from runners.store import Result, Store
from runners.train import prepare, train
from runners.worker import Event, Job, carry_out
from tests.runners.tiny import Tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def tiny_run(**changes: Any) -> Run:
    """A run of the tiny task; ``task`` may be a mapping of its fields."""
    values: dict[str, Any] = {
        "optimizer": Adam(), "warmup": warmups.Warmup(), "decay": decays.Linear(), "task": {},
        "lr": 0.01, "seed": 1, "steps": 30, **changes,
    }  # fmt: skip
    if isinstance(values["task"], dict):
        values["task"] = Tiny(**values["task"])
    if isinstance(values.get("probes"), dict):
        values["probes"] = Probes(**values["probes"])
    return build(Run, values, "")


def trained(run: Run, store: Store, **options: Any) -> Result:
    """The result of a run, not published."""
    prepare(run.task, Place(device="cpu"))
    return train(run, run.task, CPU, store, **options)


def result_of(run_id: str, loss: float = 0.5) -> Result:
    """A made-up result."""
    import pandas as pd

    summary = {
        "id": run_id, "status": "done", "diverged_at": None, "last_finite": None, "metric": "loss",
        "higher_is_better": False, "worst": 1.0, "steps": 3,
        "metrics": {s: {"loss": loss} for s in ("validation", "test")},
        "probes": {"norms": "default", "update_quantiles": [], "gradient_histogram": []},
        "seconds": {"train": 1.0, "evaluate": 0.1, "from_step": 0},
        "environment": {"device": "cpu", "device_name": "x", "torch": "2", "python": "3"},
    }  # fmt: skip
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, loss]})
    return Result(summary, {"lr": 0.1, "execution": "flat"}, {"data": "abc"}, {"history": history})


class InProcess:
    """The pool's interface without processes: a job is carried out when events are asked for."""

    started: list[Job] = []  # noqa: RUF012 - cleared by the fixture
    stop_after: int | None = None
    """Raise KeyboardInterrupt, as Ctrl-C would, after so many jobs."""

    status = ""

    def __init__(self, place: Place, count: int, patience: float = 0.0) -> None:
        self.place, self.count = place, count
        self.queue: list[Job] = []
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def idle(self) -> int:
        return self.count - len(self.queue)

    @property
    def busy(self) -> list[Job]:
        return list(self.queue)

    def start(self, job: Job) -> None:
        assert self.idle
        self.queue.append(job)

    def events(self, timeout: float) -> list[Event]:
        if not self.queue:
            return []
        if InProcess.stop_after is not None and len(InProcess.started) >= InProcess.stop_after:
            raise KeyboardInterrupt
        InProcess.started.append(self.queue[0])
        event = carry_out(self.queue[0], self.place, self.tasks)
        self.queue.pop(0)
        return [event]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    """Sweeps of this test train in this process."""
    monkeypatch.setattr(sweeps, "Pool", InProcess)
    monkeypatch.setattr(InProcess, "started", [])
    monkeypatch.setattr(InProcess, "stop_after", None)
    return InProcess


ARMS: dict[str, tuple[str, ...]] = {
    "none": ("optimizer=adam",), "warm": ("optimizer=adam", "warmup=linear", "warmup.tau=5.0"),
    "radam": ("optimizer=radam",),
}  # fmt: skip
PLAN: dict[str, Any] = {
    "lrs": (0.003, 0.03), "tuning_seeds": 1, "pilot_seeds": 2, "test_seeds": 2, "own_seeds": 1, "control_seeds": 2,
}  # fmt: skip
MakeExperiment = Callable[..., Experiment]


@pytest.fixture
def tiny_experiment(monkeypatch: pytest.MonkeyPatch) -> MakeExperiment:
    """An experiment over the tiny task, which Hydra does not know: ``task.x=y`` sets its fields."""

    def compose(words: list[str], where: str = "") -> tuple[Run, Place]:
        fields = {w.partition("=")[0]: yaml.safe_load(w.partition("=")[2]) for w in words if w.startswith("task.")}
        run, place = compose_run([w for w in words if not w.startswith("task")], where)
        return run.replace(task=Tiny(**{k.removeprefix("task."): v for k, v in fields.items()})), place

    monkeypatch.setattr(experiments, "compose_run", compose)

    def make(arms: dict[str, tuple[str, ...]] = ARMS, plan: dict[str, Any] = PLAN, **changes: Any) -> Experiment:
        values: dict[str, Any] = {
            "name": "tiny", "question": "Does it?", "source": "none", "cost": "nothing", "arms": arms,
            "reference": "warm", "tasks": {"tiny": TaskPlan(**plan)}, "overrides": ("steps=10",),
            "claims": {"warmup": Claim(hypothesis="It matters", kind="sensitivity", arm="none")}, **changes,
        }  # fmt: skip
        return Experiment(**values)

    return make


def sweep_of(experiment: Experiment, store: Store, **place: Any) -> sweeps.Sweep:
    console = Console(file=io.StringIO(), width=200)
    return sweeps.Sweep(Design(experiment), store, Place(device="cpu", store=str(store.root), **place), console)
