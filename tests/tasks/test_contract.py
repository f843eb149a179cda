"""What every task promises: a new one is tested here without a line of its own."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn

from tasks.task import Task, available
from tests.pretend_gpu import GPU, pretend_gpu

CPU = torch.device("cpu")


@pytest.fixture(params=sorted(available()))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def task(name: str, prepared: Callable[..., Any]) -> Task:
    task: Task = prepared(name)
    return task


def leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return [leaf for part in batch for leaf in leaves(part)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def take(task: Task, seed: int, count: int, start: int = 0) -> list[Any]:
    return list(itertools.islice(task.batches(seed, start), count))


def train(task: Task, model: nn.Module, batches: list[Any], lr: float = 1e-3) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_three_embedded_tasks_are_found() -> None:
    assert {"digits_resnet", "phrases_transformer", "pydocs_lstm"} <= set(available())


def test_class_attributes(name: str) -> None:
    kind = available()[name]
    assert kind.revision >= 1 and kind.steps >= 1
    assert isinstance(kind.metric, str) and isinstance(kind.higher_is_better, bool)
    assert kind.__doc__ and kind.metric in kind.__doc__


def test_an_unknown_field_is_an_error(name: str) -> None:
    kind: Any = available()[name]
    with pytest.raises(pydantic.ValidationError, match="no_such_field"):
        kind(no_such_field=1)


def test_every_field_is_in_the_documentation(name: str) -> None:
    kind = available()[name]
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        assert f"{field.name}:" in (kind.__doc__ or "")


def test_the_fingerprint_is_of_the_data(name: str, task: Task, data_root: Callable[[str], str | None]) -> None:
    again = copy.copy(task)
    again.prepare(CPU, data_root(name))
    assert again.fingerprint() == task.fingerprint()
    assert len(task.fingerprint()) == 16 and int(task.fingerprint(), 16) >= 0


def test_batches_depend_on_seed_and_step_alone(task: Task) -> None:
    before = torch.get_rng_state()
    first = take(task, 1, 5)
    torch.rand(7)
    assert all(map(same, first, take(task, 1, 5)))
    assert not any(same(a, b) for a, b in zip(first, take(task, 2, 5), strict=True))
    assert not any(same(a, b) for a, b in itertools.combinations(first, 2))
    torch.set_rng_state(before)
    take(task, 1, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [1, 2, 36, 37, 38, 500])
def test_batches_resume_exactly(task: Task, start: int) -> None:
    assert all(map(same, take(task, 3, start + 3)[start:], take(task, 3, 3, start)))


def test_batches_have_one_shape_or_few(task: Task) -> None:
    shapes = {tuple((leaf.shape, leaf.dtype) for leaf in leaves(batch)) for batch in take(task, 0, 200)}
    assert len(shapes) == 1 if task.one_shape else 1 < len(shapes) < 20


def test_the_model_is_a_function_of_the_global_seed(task: Task) -> None:
    def initial(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = task.model()
        assert model.training
        return model.state_dict()

    first, again, other = initial(1), initial(1), initial(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    assert all(value.dtype == torch.float32 for value in first.values() if value.is_floating_point())


def test_the_loss_at_initialisation(task: Task) -> None:
    (batch,) = take(task, 0, 1)
    loss = task.loss(task.model(), batch)
    assert loss.shape == () and loss.dtype == torch.float32
    assert abs(loss.item() - task.initial_loss) < 0.7


def test_the_worst_value_is_that_of_a_uniform_prediction(task: Task) -> None:
    assert math.isfinite(task.worst)
    if task.metric == "loss":
        assert task.worst == task.initial_loss and not task.higher_is_better
    if task.metric == "accuracy":
        assert task.worst == pytest.approx(math.exp(-task.initial_loss)) and task.higher_is_better


def test_every_parameter_gets_a_gradient(task: Task) -> None:
    model = task.model()
    (batch,) = take(task, 0, 1)
    task.loss(model, batch).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


def test_one_batch_can_be_overfitted(task: Task) -> None:
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    (batch,) = take(task, 0, 1)
    first = task.loss(model, batch).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        if loss.item() < 0.2 * first:
            return
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss went only from {first:.3f} to {loss.item():.3f}")


def test_double_precision_agrees_with_single(task: Task) -> None:
    model = task.model()
    double = copy.deepcopy(model).double()
    (batch,) = take(task, 0, 1)
    loss = task.loss(double, batch)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(task.loss(model, batch).item(), rel=1e-5)


def test_a_checkpoint_resumes_exactly(task: Task) -> None:
    model = task.model()
    train(task, model, take(task, 0, 3))
    torch.manual_seed(99)
    restored = task.model()
    restored.load_state_dict(copy.deepcopy(model.state_dict()))
    rest = take(task, 0, 3, start=3)
    assert train(task, model, rest) == train(task, restored, rest)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_evaluation_gives_the_metrics_and_touches_nothing(task: Task, split: Any) -> None:
    model = task.model()
    train(task, model, take(task, 0, 2))
    model.zero_grad()
    # One part that someone froze has to stay as it was.
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    metrics = task.evaluate(model, split)
    assert {"loss", task.metric} <= set(metrics)
    for value in metrics.values():
        assert value.shape == () and value.is_floating_point() and value.isfinite() and not value.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    if split == "validation":
        again = task.evaluate(model, split)
        assert all(torch.equal(again[key], metrics[key]) for key in metrics)


def test_training_helps_on_held_out_data(task: Task) -> None:
    model = task.model()
    before = task.evaluate(model, "validation")["loss"]
    train(task, model, take(task, 0, 40), lr=0.003)
    assert task.evaluate(model, "validation")["loss"] < before


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # a DataLoader's, which looks for a real one
def test_training_on_a_gpu_mixes_no_devices_and_waits_for_nothing(
    name: str, task: Task, data_root: Callable[[str], str | None]
) -> None:
    def trained(task: Task, waits: list[str]) -> tuple[list[float], dict[str, float]]:
        torch.manual_seed(0)
        model, batches = task.model(), task.batches(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        waits.clear()
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(task.loss(model, next(batches)))
            losses[-1].backward()
            optimizer.step()
        # How many words each cluster of an adaptive softmax has is not known beforehand.
        assert not waits or any(isinstance(module, nn.AdaptiveLogSoftmaxWithLoss) for module in model.modules())
        metrics = task.evaluate(model, "validation")
        assert {value.device for value in (*losses, *metrics.values())} == {task.device}  # type: ignore[attr-defined]
        return [loss.item() for loss in losses], {key: value.item() for key, value in metrics.items()}

    losses, metrics = trained(task, [])
    there = copy.copy(task)
    with pretend_gpu() as waits:
        there.prepare(GPU, data_root(name))
        on_gpu = trained(there, waits)
    assert on_gpu[0] == pytest.approx(losses, rel=1e-5)
    assert on_gpu[1] == pytest.approx(metrics, rel=1e-5)
