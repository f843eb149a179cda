"""The mirror in Weights & Biases: off unless asked for, always finished, and never able to lose a result."""

import sys
import types
from typing import Any

import pytest
import torch

from runners import loggers
from runners.config import Place, Run, UserError, compose_run
from runners.loggers import logger_for
from runners.store import Store
from runners.worker import Event, Job, carry_out
from tests.runners.conftest import tiny_run


class Recorder(types.ModuleType):
    """In place of the package: remembers what it was told."""

    def __init__(self, api_key: str | None = None, breaks: str = "") -> None:
        super().__init__("wandb")
        self.api = types.SimpleNamespace(api_key=api_key)
        self.breaks = breaks
        self.options: dict[str, Any] = {}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.finished = 0

    def init(self, **options: Any) -> "Recorder":
        self._may_break("init")
        self.options = options
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        self._may_break("log")
        self.rows.append((step, row))

    def finish(self, *_: Any) -> None:
        self.finished += 1
        self._may_break("finish")

    def _may_break(self, where: str) -> None:
        if self.breaks == where:
            raise ConnectionError("no network\nat all")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(**options: Any) -> Recorder:
        recorder = Recorder(**options)
        monkeypatch.setitem(sys.modules, "wandb", recorder)
        return recorder

    monkeypatch.delenv("WANDB_MODE", raising=False)
    return use


def carried_out(store: Store, run: Run) -> tuple[Event, str]:
    run.task.prepare(torch.device("cpu"), None)
    job = Job(run.id(run.task.fingerprint()), run)
    return carry_out(job, Place(device="cpu", store=str(store.root), logger="wandb"), {}), job.run_id


def test_off_by_default_and_then_not_even_imported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place().logger == compose_run([])[1].logger == "none"
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    with logger_for(Place(), tiny_run(), "id") as log:
        log(None)  # type: ignore[arg-type]


def test_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install"), logger_for(Place(logger="wandb"), tiny_run(), "id"):
        pass


@pytest.mark.parametrize(("key", "mode"), [(None, "offline"), ("secret", "online")])
def test_it_mirrors_the_history(store: Store, wandb: Any, key: str | None, mode: str) -> None:
    recorder = wandb(api_key=key)
    event, run_id = carried_out(store, tiny_run(probes={"norms": [2]}))
    assert event.kind == "done" and recorder.finished == 1
    assert recorder.options["mode"] == mode and recorder.options["id"] == run_id
    assert recorder.options["dir"] == str(store.root) and recorder.options["group"] == "tiny"
    assert [step for step, _ in recorder.rows] == list(range(1, 31))
    assert recorder.rows[0][1].keys() == {"step", "lr", "warmup", "loss"}  # what was not measured is left out
    assert "update_rms" in recorder.rows[1][1]
    assert recorder.summary["status"] == "done" and recorder.summary["test"].keys() == {"loss", "root"}


def test_the_environment_decides_the_mode(store: Store, wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recorder = wandb(api_key="secret")
    carried_out(store, tiny_run())
    assert recorder.options["mode"] == "disabled"


def test_it_is_finished_after_an_exception_too(store: Store, wandb: Any) -> None:
    recorder = wandb()
    event, _ = carried_out(store, tiny_run(task={"how": "raise", "at": 3}))
    assert event.kind == "error" and recorder.finished == 1 and not recorder.rows


@pytest.mark.parametrize("where", ["log", "finish"])
def test_its_failure_loses_no_result(where: str, store: Store, wandb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = wandb(breaks=where)
    event, run_id = carried_out(store, tiny_run())
    assert event.kind == "done" and store.status(run_id) == "done" and recorder.finished == 1
    told = capsys.readouterr().err
    assert "no network" in told and told.count("\n") == 1


def test_its_failure_before_training_stops_the_sweep(store: Store, wandb: Any) -> None:
    wandb(breaks="init")
    event, run_id = carried_out(store, tiny_run())
    assert event.kind == "failed" and "no network" in event.text and "\n" not in event.text
    assert store.status(run_id) == "incomplete"


def test_the_module_needs_no_wandb() -> None:
    assert not hasattr(loggers, "wandb")
