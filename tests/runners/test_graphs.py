"""Passes that are replayed as CUDA graphs train as eager ones do, to the bit; on a pretended GPU."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from runners import graphs
from runners import train as training
from runners.collect import execution
from runners.config import Place, Probes, Run, UserError, compose_run
from runners.graphs import WARMUP, Graphs
from runners.loss import passes_of
from runners.store import Store
from runners.timing import Stepper
from runners.train import Training, prepare, train
from tasks.common import shapes
from tasks.task import SCHEMA
from tests.pretend_gpu import GPU, pretend_gpu
from tests.runners.conftest import CPU, tiny_run
from tests.runners.test_loss import EMBEDDED, Small
from tests.runners.tiny import Tiny

STEPS = 15
WORDS = ["lr=.01", f"steps={STEPS}"]
RUNS = {
    **{name: (*words, *WORDS) for name, words in EMBEDDED.items()},
    "lookahead": (*EMBEDDED["digits_resnet"], *WORDS, "optimizer=lookahead", "optimizer.k=3", "clip_norm=.5"),
    "koala, which needs the loss": (*EMBEDDED["digits_resnet"], *WORDS, "optimizer=koalam"),
    "gradinit": (*EMBEDDED["digits_resnet"], *WORDS, "initialisation=gradinit", "initialisation.iterations=3"),
}


@dataclass(config=SCHEMA)
class Shapes(Small):
    """Small with batches of three shapes, in turn."""

    def batches(self, seed: int, start: int = 0) -> Iterator[Any]:
        for i, (x, y) in enumerate(super().batches(seed, start)):
            size = 4 + 4 * (i % 3)
            yield x[:size], y[:size]


@dataclass(config=SCHEMA)
class Waiting(Small):
    """Small with a loss that the host looks at."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        return loss if loss.item() > 0 else -loss


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks of CUDA beside computing."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")


def counted(monkeypatch: pytest.MonkeyPatch, task: Any) -> list[Any]:
    """The shapes of the batches whose loss Python computes, as they come."""
    computed: list[Any] = []
    loss = type(task).loss

    def look(self: Any, model: nn.Module, batch: Any) -> Tensor:
        computed.append(shapes(batch))
        return loss(self, model, batch)

    monkeypatch.setattr(type(task), "loss", look)
    return computed


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_eager_one_to_the_bit(name: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = compose_run([*RUNS[name], "model_execution=cuda_graph"])
    run = run.replace(probes=Probes(norms="all", update_quantiles=(3, 9), gradient_histogram=(8,)))
    monkeypatch.setattr(training, "CHECK_EVERY", WARMUP)
    looks: list[tuple[int, list[str]]] = []
    with pretend_gpu() as waits:
        run.task.prepare(GPU, None)
        eager = train(run.replace(model_execution="eager"), run.task, GPU, store)
        computed = counted(monkeypatch, run.task)

        def look(t: int) -> None:
            looks.append((len(computed) - looks[0][0] if looks else len(computed), waits[:]))
            waits.clear()

        graphed = train(run, run.task, GPU, store, progress=look)
    # One more, to be captured, and none from then on.
    assert looks[1:] == [(1, ["_to_copy from the GPU"])] * (STEPS // WARMUP - 1)
    assert graphed.summary["metrics"] == eager.summary["metrics"]
    assert graphed.tables.keys() == eager.tables.keys()
    for key, table in eager.tables.items():
        pd.testing.assert_frame_equal(graphed.tables[key], table, check_exact=True)


@pytest.mark.parametrize(("most", "uncaptured"), [(3, 0), (2, 10 - WARMUP - 1)])
def test_each_shape_has_a_graph_of_its_own_while_there_is_room(
    most: int, uncaptured: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST", most)
    run = tiny_run(model_execution="cuda_graph", task=Shapes(), steps=30)
    with pretend_gpu():
        run.task.prepare(GPU, None)
        eager = train(run.replace(model_execution="eager"), run.task, GPU, store)
        computed = counted(monkeypatch, run.task)
        graphed = train(run, run.task, GPU, store)
    assert len(computed) == 3 * (WARMUP + 1) + uncaptured and len(set(computed)) == 3
    pd.testing.assert_frame_equal(graphed.tables["history"], eager.tables["history"], check_exact=True)


def test_a_step_is_timed_by_batches_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(model_execution="cuda_graph", task=Shapes(), steps=30)
    with pretend_gpu():
        run.task.prepare(GPU, None)
        computed = counted(monkeypatch, run.task)
        Stepper(run).seconds(5)
    assert len(computed) == WARMUP + 1 and len(set(computed)) == 1


def test_no_bit_depends_on_the_runs_before(store: Store) -> None:
    run = tiny_run(model_execution="cuda_graph", task=Small())
    with pretend_gpu():
        run.task.prepare(GPU, None)
        alone = train(run, run.task, GPU, store)
        train(run.replace(seed=9, lr=0.5), run.task, GPU, store)
        again = train(run, run.task, GPU, store)
    pd.testing.assert_frame_equal(again.tables["history"], alone.tables["history"], check_exact=True)


def test_gradients_are_those_of_the_batch_and_replace_what_was_there() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))

    def passes_over(model: nn.Module) -> Any:
        def passes(batch: Any) -> Tensor:
            loss = (model(batch["x"][0]) - batch["y"]).square().mean()
            model.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach()

        return passes

    with pretend_gpu():
        there = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
        there.load_state_dict(here.state_dict())
        there.to(GPU)
        frozen = there[0].bias.requires_grad_(False)
        graphs = Graphs(passes_over(there), there, "here")
        plain = passes_over(here)
        for _ in range(WARMUP + 3):
            x, y = torch.randn(5, 3), torch.randn(5, 1)
            for p in there.parameters():
                p.grad = None if p is frozen else torch.full_like(p, 7.0)
            loss = graphs({"x": (x.to(GPU),), "y": y.to(GPU)})
            torch.testing.assert_close(loss.cpu(), plain({"x": (x,), "y": y}))
            assert not loss.requires_grad and frozen.grad is None
            for p, q in zip(there.parameters(), here.parameters(), strict=True):
                if p is not frozen:
                    assert p.grad is not None and q.grad is not None
                    torch.testing.assert_close(p.grad.cpu(), q.grad)


# -- what cannot be captured -------------------------------------------------------------------------------------


def failure(run: Run) -> str:
    with pretend_gpu():
        run.task.prepare(GPU, None)
        steps = Training(run, run.task, GPU).steps()
        with pytest.raises(UserError) as caught:
            next(steps)
    return str(caught.value)


def test_what_the_host_waits_for_cannot_be_captured() -> None:
    said = failure(tiny_run(model_execution="cuda_graph", task=Waiting()))
    assert said.startswith("model_execution=cuda_graph: test_graphs cannot be captured: _local_scalar_dense: operation")
    assert "\n" not in said


def test_batches_are_tensors_alone() -> None:
    said = failure(tiny_run(model_execution="cuda_graph", task=Tiny()))  # whose batches have a number in them
    assert said == "model_execution=cuda_graph: tiny needs batches of nothing but tensors on the GPU"


def test_without_a_gpu_it_is_one_line(store: Store) -> None:
    run = tiny_run(model_execution="cuda_graph", task=Small())
    prepare(run.task, Place(device="cpu"))
    with pytest.raises(UserError, match=r"^model_execution=cuda_graph needs a GPU of NVIDIA: use [^\n]+eager$"):
        train(run, run.task, CPU, store)
    assert passes_of(run.replace(model_execution="eager"), run.task, run.task.model())


def test_it_is_part_of_the_id() -> None:
    run = tiny_run(task=Small())
    graphed = run.replace(model_execution="cuda_graph")
    assert graphed.science["model_execution"] == "cuda_graph" and graphed.id("x") != run.id("x")
    assert execution(graphed) == "flat with the model as a CUDA graph"
