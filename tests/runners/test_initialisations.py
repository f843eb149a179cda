"""GradInit against closed forms and the authors' recurrence; and as a step of a run."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from optimizers.adam import Adam
from optimizers.lars import LARS
from optimizers.lion import Lion
from optimizers.lookahead import Lookahead
from optimizers.normalized_sgd import NormalizedSGD
from optimizers.sgd import SGD
from runners import train as training
from runners.config import compose_run
from runners.forward import TaskLoss
from runners.initialisations import GradInit, Initialisation, Search, _twice_differentiable, norm_of
from runners.store import Store
from tasks.task import SCHEMA
from tests.runners.conftest import tiny_run, trained
from tests.runners.tiny import Tiny

ETA = 0.05
Batch = tuple[np.ndarray, np.ndarray]


def in_float64() -> tuple[Tiny, nn.Module]:
    task = Tiny()
    task.prepare(torch.device("cpu"), None)
    task.x, task.y = task.x.double(), task.y.double()
    torch.manual_seed(3)
    return task, task.model().double()


def loss_of(weights: list[np.ndarray], *batches: Batch) -> float:
    """The tiny task's loss, by hand and without dropout."""
    w1, b1, w2, b2 = weights
    return float(np.mean([((np.tanh(x @ w1.T + b1) @ w2.T + b2 - y) ** 2).mean() for x, y in batches]))


def gradients_of(weights: list[np.ndarray], *batches: Batch) -> list[np.ndarray]:
    w1, b1, w2, b2 = weights
    total = [np.zeros_like(w) for w in weights]
    for x, y in batches:
        h = np.tanh(x @ w1.T + b1)
        d = 2 * (h @ w2.T + b2 - y) / len(x)
        inner = (d @ w2) * (1 - h**2)
        parts = (inner.T @ x, inner.sum(0), d.T @ h, d.sum(0))
        total = [t + part / len(batches) for t, part in zip(total, parts, strict=True)]
    return total


def size_of(gradients: list[np.ndarray], norm: str) -> float:
    flat = np.concatenate([g.flatten() for g in gradients])
    return float(np.abs(flat).sum() if norm == "l1" else np.sqrt((flat**2).sum()))


def slopes(f: Callable[[np.ndarray], float], at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    return np.array([(f(at + h * e) - f(at - h * e)) / (2 * h) for e in np.eye(len(at))])


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("above", [True, False])
def test_an_iteration_descends_on_what_the_paper_says(norm: Any, above: bool) -> None:
    task, model = in_float64()
    theta = [p.detach().numpy() for p in model.parameters()]
    at = np.array([0.9, 1.2, 0.7, 1.1])
    first, second, third = ((x.numpy(), y.numpy()) for _, x, y in itertools.islice(task.batches(5), 3))

    def scaled(s: np.ndarray) -> list[np.ndarray]:
        return [w * scale for w, scale in zip(theta, s, strict=True)]

    gradients = gradients_of(scaled(at), first, second)
    size = size_of(gradients, norm)
    # The direction is a constant to the derivative.
    step = [ETA * (np.sign(g) if norm == "l1" else g / size) for g in gradients]

    def after_a_step(s: np.ndarray) -> float:
        return loss_of([w - d for w, d in zip(scaled(s), step, strict=True)], first, third) / ETA

    def norm_at(s: np.ndarray) -> float:
        return size_of(gradients_of(scaled(s), first, second), norm)

    gamma = size * (1 - 1e-9) if above else size * (1 + 1e-9)
    search = Search(GradInit(gamma=gamma), TaskLoss(task, model), norm, ETA)
    search.scales.data = torch.tensor(at)
    with _twice_differentiable(model):
        kind, value = search.objective(task.batches(5))
    (gradient,) = torch.autograd.grad(value, [search.scales])
    f = norm_at if above else after_a_step
    assert kind == ("norm" if above else "loss")
    assert value.item() == pytest.approx(f(at), rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), slopes(f, at), rtol=1e-6, atol=1e-8)


def test_the_scalars_follow_the_authors_recurrence() -> None:
    """RescaleAdam: each kind of iteration has its own moments and step count, the gradient is clipped at 1."""
    task, model = in_float64()
    settings = GradInit(lr=0.3, clip=1.0, min_scale=0.2)
    search = Search(settings, TaskLoss(task, model), "l1", ETA)
    script = [("loss", 0.3), ("loss", -0.1), ("norm", 5.0), ("loss", 0.2), ("norm", 0.4), ("norm", 0.9), ("loss", 2.0)]
    slope = torch.tensor([1.0, -0.5, 3.0, 0.0], dtype=torch.float64)
    moments = {kind: [0, np.zeros(4), np.zeros(4)] for kind in ("loss", "norm")}
    alpha = np.ones(4)
    for kind, size in script:
        search.objective = lambda _, k=kind, s=size: (k, s * (slope * search.scales).sum())  # type: ignore[method-assign]
        search.iterate(iter(()))
        g = np.clip(size * slope.numpy(), -1, 1)
        t, m, v = moments[kind]
        t, m, v = moments[kind] = [t + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g]
        alpha = np.maximum(alpha - 0.3 / (1 - 0.9**t) * m / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), 0.2)
        np.testing.assert_allclose(search.scales.detach().numpy(), alpha, rtol=1e-9)
    assert alpha.min() == 0.2 and alpha[3] == 1 and len(set(alpha)) > 2


# -- in a run ------------------------------------------------------------------------------------------------

FEW = {"iterations": 4, "lr": 0.03}


@dataclass(config=SCHEMA)
class Large(Tiny):
    """The tiny task with a last layer that is ten times too large."""

    def model(self) -> nn.Module:
        model: Any = super().model()
        model[3].weight.data.mul_(10)
        return model

    @property
    def initial_loss(self) -> float:
        return 100.0


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=["sgd", "adam"])
def test_a_badly_scaled_network_trains_better(rule: Any, store: Store) -> None:
    def last(initialisation: Initialisation) -> float:
        run = tiny_run(task=Large(), optimizer=rule, initialisation=initialisation, steps=25, lr=0.01)
        return float(trained(run, store).tables["history"].loss[-10:].mean())

    assert last(GradInit(iterations=40, lr=0.05)) < 0.5 * last(Initialisation())


def test_it_changes_the_weights_and_nothing_else_of_a_run(store: Store) -> None:
    """Data order and dropout are what they are without it: learned at a rate of nearly 0 it changes no bit."""
    without, idle, real = (
        trained(tiny_run(initialisation=i), store)
        for i in (Initialisation(), GradInit(lr=1e-30, iterations=4), GradInit(**FEW))
    )
    pd.testing.assert_frame_equal(idle.tables["history"], without.tables["history"], check_exact=True)
    assert not np.isclose(real.tables["history"].loss, without.tables["history"].loss).any()
    assert 0 < real.summary["seconds"]["initialise"] < real.summary["seconds"]["train"]
    assert len({r.summary["id"] for r in (without, idle, real)}) == 3
    assert "initialisation" not in without.config
    assert real.config["initialisation"]["iterations"] == 4


def test_a_resumed_run_is_not_initialised_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    run = tiny_run(initialisation=GradInit(**FEW))
    straight = trained(run, store)

    def stop(t: int) -> None:
        raise training.Interrupted

    with pytest.raises(training.Interrupted):
        trained(run, store, checkpoint_every=2, progress=stop)
    monkeypatch.setattr(GradInit, "apply", lambda *_: pytest.fail("again"))
    resumed = trained(run, store, checkpoint_every=2)
    pd.testing.assert_frame_equal(resumed.tables["history"], straight.tables["history"], check_exact=True)


TASKS = {
    "digits": ["task=digits_resnet", "task.width=4", "task.batch_size=8"],
    "lstm": ["task=pydocs_lstm", "task.batch_size=4", "task.bptt=5", "task.width=8", "task.layers=2"],
    "post-LN": ["task=phrases_transformer", "task.batch_size=4", "task.layers=1", "task.width=8", "task.dropout=.3"],
}  # fmt: skip


@pytest.mark.parametrize("gamma", [1e-6, 1e6])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_initialised(name: str, gamma: float) -> None:
    """Through BatchNorm, recurrence, attention and tied weights; only the weights change, each by one factor."""
    run = compose_run(TASKS[name])[0]
    run.task.prepare(torch.device("cpu"), None)
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        torch.manual_seed(1)
        model = run.task.model()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        torch.rand(len(found))  # the state of the global generator does not matter
        GradInit(gamma=gamma, iterations=2).apply(run.task, model, 9, run.optimizer, 0.01)
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][k]) for k, value in found[0].items())
    assert all(module.training for module in model.modules())
    weights = {k for k, _ in model.named_parameters(remove_duplicate=False)}
    for k, value in found[0].items():
        if k not in weights or not before[k].any():
            assert torch.equal(value, before[k]), k
        else:
            ratio = (value / before[k])[before[k] != 0]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)
            assert 0.97 < ratio[0] < 1.03 and ratio[0] != 1, k


def test_the_norm_is_the_rules() -> None:
    given = [SGD(), NormalizedSGD(), LARS(), Lookahead(inner=SGD()), Adam(), Lion(), Lookahead()]
    assert [norm_of(rule) for rule in given] == ["l2"] * 4 + ["l1"] * 3


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def test_a_kernel_without_second_derivatives_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = in_float64()

    def loss(self: Tiny, model: nn.Module, batch: Any) -> Tensor:
        return Once.apply(model(batch[1])).square().mean()

    monkeypatch.setattr(Tiny, "loss", loss)
    with pytest.raises(RuntimeError, match=r"^GradInit needs second derivatives, which this model has not: "):
        GradInit(gamma=1e-6, iterations=1).apply(task, model, 1, Adam(), 0.01)
    assert all(module.training for module in model.modules())
