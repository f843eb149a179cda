"""Compiled models train as eager ones do, are compiled once, and know nothing of the runs before.

The whole path without code generation (backend aot_eager) on the embedded tasks; with it (inductor), which takes a
C++ compiler and most of the time, on a small perceptron with dropout.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from runners import loss as losses
from runners.collect import execution
from runners.config import Place, Run, UserError, compose_run
from runners.loss import loss_of
from runners.store import Result, Store
from runners.train import prepare, train
from tasks.task import SCHEMA
from tests.optimizers.test_compiled import no_compiler
from tests.runners.conftest import CPU, tiny_run
from tests.runners.tiny import Tiny

EMBEDDED: dict[str, list[str]] = {
    "digits_resnet": ["task=digits_resnet", "task.width=4", "task.batch_size=16"],
    "pydocs_lstm": [
        "task=pydocs_lstm", "task.width=8", "task.batch_size=4", "task.bptt=5", "task.dropout=.1",
    ],
    "phrases_transformer": [
        "task=phrases_transformer", "task.width=8", "task.hidden=16", "task.layers=1", "task.batch_size=8",
        "task.dropout=.1",
    ],
}  # fmt: skip


@dataclass(config=SCHEMA)
class Small(Tiny):
    """Tiny, whose batches are tensors alone."""

    def batches(self, seed: int, start: int = 0) -> Iterator[Any]:
        for _, x, y in super().batches(seed, start):
            yield x, y

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = (part.to(next(model.parameters()).dtype) for part in batch)
        return (model(x) - y).square().mean()


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = getattr(request, "param", "aot_eager")
    monkeypatch.setattr(losses, "BACKEND", name)
    forget()
    yield name
    forget()


def forget() -> None:
    """As in a new process, but for what is on disk."""
    losses._program.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def programs() -> int:
    """How many were compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def small(**changes: Any) -> Run:
    """A prepared run of a task with tensors alone."""
    run = tiny_run(model_execution="compiled", task=Small(), **changes)
    prepare(run.task, Place(device="cpu"))
    return run


def result(run: Run, store: Store) -> Result:
    return train(run, run.task, CPU, store)


def same(one: Result, other: Result) -> None:
    assert one.summary["metrics"] == other.summary["metrics"]
    pd.testing.assert_frame_equal(one.tables["history"], other.tables["history"], check_exact=True)


def first_losses(run: Run, dtype: torch.dtype = torch.float64, steps: int = 50) -> list[float]:
    """The losses of the first steps of a model of that dtype."""
    torch.manual_seed(1)
    model = run.task.model().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_on = loss_of(run, run.task, model)
    found = []
    for batch in itertools.islice(run.task.batches(1), steps):
        loss = loss_on(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


# -- as eager --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", EMBEDDED)
def test_the_first_fifty_steps_are_those_of_the_eager_model(task: str) -> None:
    eager = compose_run(EMBEDDED[task])[0]
    prepare(eager.task, Place(device="cpu"))
    plain = first_losses(eager)
    assert plain == pytest.approx(first_losses(eager.replace(model_execution="compiled")), rel=1e-11)
    assert programs() == 1 and plain[-1] < plain[0]


@pytest.mark.parametrize("backend", ["inductor"], indirect=True)
def test_and_with_code_generation(store: Store) -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    run = small()
    eager = run.replace(model_execution="eager")
    assert first_losses(run) == pytest.approx(first_losses(eager), rel=1e-11)
    # A whole run in float32, with dropout, and a second one by the same program.
    for seed in (3, 4):
        of_eager, compiled = (result(r.replace(seed=seed), store) for r in (eager, run))
        assert compiled.tables["history"].loss.to_numpy() == pytest.approx(of_eager.tables["history"].loss, rel=1e-4)
    assert programs() == 2  # float64 and float32


def test_bfloat16_is_close(store: Store) -> None:
    run = small(precision="bfloat16", execution="eager")
    losses = [result(r, store).tables["history"].loss.to_numpy() for r in (run, run.replace(model_execution="eager"))]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    exact = result(run.replace(precision="float32"), store).tables["history"].loss.to_numpy()
    assert losses[0] != pytest.approx(exact, rel=1e-4)


# -- compiled once, and whoever was there before -----------------------------------------------------------------


def test_runs_of_a_task_share_a_program_and_no_bit_depends_on_them(store: Store) -> None:
    run = small()
    alone = result(run, store)
    assert programs() == 1
    forget()
    others = (run.replace(seed=9, lr=0.5), small(steps=12), run.replace(precision="bfloat16"), small(clip_norm=0.1))
    for other in others:
        result(other, store)
    same(result(run, store), alone)
    same(result(small(), store), alone)  # the task prepared anew
    assert programs() == 2  # float32 and bfloat16


def test_each_shape_has_a_program_of_its_own(store: Store) -> None:
    """More than the 8 that torch keeps of one piece of code; in whatever order they come, the bits are the same."""
    run = small()
    model = run.task.model().train()
    x, y = next(run.task.batches(0))

    def of(size: int) -> float:
        torch.manual_seed(0)
        return loss_of(run, run.task, model)((x[:size], y[:size])).item()

    rising = {size: of(size) for size in range(2, 12)}
    assert programs() == len(rising)
    forget()
    assert all(of(size) == rising[size] for size in (9, 3, 5))


def test_it_is_part_of_the_id_unless_it_is_the_default() -> None:
    run = small()
    assert run.replace(model_execution="eager").id("x") != run.id("x")
    assert run.science["model_execution"] == "compiled" and run.science["execution"] == "flat"
    eager = run.replace(model_execution="eager")
    assert "model_execution" not in eager.science
    assert execution(run) == "flat with a compiled model" and execution(eager) == "flat"


def test_evaluation_is_eager(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(steps=2)
    inside: list[bool] = []
    evaluate = Small.evaluate

    def look(self: Small, model: nn.Module, split: Any) -> dict[str, Tensor]:
        inside.append(torch.compiler.is_compiling())
        return evaluate(self, model, split)

    monkeypatch.setattr(Small, "evaluate", look)
    result(run, store)
    assert inside == [False, False] and programs() == 1


# -- what cannot be compiled -------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_one_line_and_eager_runs_work(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(losses, "BACKEND", "inductor")
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"^model_execution=compiled needs a C\+\+ compiler \([^\n]*eager$"):
        result(small(), store)
    eager = small().replace(model_execution="eager")
    with pytest.raises(UserError, match=r"^execution=compiled needs a C\+\+ compiler \([^\n]*execution=flat$"):
        result(eager.replace(execution="compiled"), store)
    assert result(eager, store).summary["status"] == "done"


def test_a_task_that_cannot_be_compiled_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(self: Small, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean() * (2.0 if model(batch[0]).mean().item() > 0 else 1.0)

    monkeypatch.setattr(Small, "loss", waits)
    with pytest.raises(UserError, match=r"^model_execution=compiled: test_loss cannot be compiled: [^\n]+$"):
        result(small(), store)
    number = tiny_run(model_execution="compiled")  # Tiny's batches have a number in them, another one each
    prepare(number.task, Place(device="cpu"))
    with pytest.raises(UserError, match=r"^model_execution=compiled: tiny cannot be compiled: [^\n]+$"):
        result(number, store)
