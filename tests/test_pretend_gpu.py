"""The GPU that is not there refuses what a real one refuses, notes what one waits for, and computes the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.pretend_gpu import GPU, pretend_gpu


def test_it_computes_and_differentiates_as_the_cpu_does() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    there = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    there.load_state_dict(here.state_dict())
    nn.functional.cross_entropy(here(x), y).backward()
    with pretend_gpu():
        there.to(GPU)
        nn.functional.cross_entropy(there(x.to(GPU)), y.to(GPU)).backward()
        assert all(p.is_cuda and p.device == GPU for p in there.parameters())
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None and q.grad.device == GPU
            torch.testing.assert_close(q.grad.cpu(), p.grad)


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    with pretend_gpu():
        model.to(GPU)
        assert model["b"].weight is model["a"].weight


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: there.mul_(here),
        lambda there, here: torch.cat((there, here)),
        lambda there, here: torch._foreach_add([there], [here]),
        lambda there, here: torch.where(there > 0, here, 0.0),
    ],
)
def test_it_refuses_operations_on_tensors_there_and_here(mixed: Callable[[Tensor, Tensor], object]) -> None:
    with pretend_gpu():
        with pytest.raises(RuntimeError, match="same device"):
            mixed(torch.ones(3, device=GPU), torch.ones(3))
        mixed(torch.ones(3, device=GPU), torch.ones(3, device=GPU))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.histc(4),
        lambda x: x.median(dim=0),
        lambda x: nn.functional.adaptive_avg_pool2d(x.requires_grad_().view(1, 1, 4, 4), 2).sum().backward(),
        lambda x: nn.functional.interpolate(
            x.requires_grad_().view(1, 1, 4, 4), scale_factor=2, mode="bilinear"
        ).sum().backward(),
    ],
)  # fmt: skip
def test_it_refuses_what_cannot_be_repeated(other: Callable[[Tensor], object]) -> None:
    with pretend_gpu(), pytest.raises(RuntimeError, match="deterministic"):
        other(torch.arange(16.0).to(GPU))


@pytest.mark.parametrize(
    ("waiting", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.cpu(), "_to_copy from the GPU"),
        (lambda x: x.tolist(), "_to_copy from the GPU"),
        (lambda x: torch.zeros(3).copy_(x), "copy_ from the GPU"),
        (lambda x: torch._foreach_copy_([torch.zeros(3)], [x]), "_foreach_copy_ from the GPU"),
        (lambda x: torch.ones(3).to(GPU), "_to_copy to the GPU"),
        (lambda x: x.copy_(torch.ones(3)), "copy_ to the GPU"),
        (lambda x: torch.tensor(1.0, device=GPU), "_to_copy to the GPU"),
        (lambda x: x.new_tensor([1.0]), "_to_copy to the GPU"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x[torch.tensor([0, 1])], "index"),
    ],
)
def test_it_notes_what_the_host_waits_for(waiting: Callable[[Tensor], object], name: str) -> None:
    with pretend_gpu() as waits:
        waiting(torch.ones(3, device=GPU))
        assert waits == [name]


@pytest.mark.parametrize(
    "free",
    [
        lambda x: x.add_(1.0).clone(),
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.ones(3).pin_memory().to(GPU, non_blocking=True),
        lambda x: x.copy_(torch.ones(3), non_blocking=True),
        lambda x: x.copy_(torch.ones(3, device=GPU)),
        lambda x: x[x.argsort()],
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: torch.zeros_like(x) + x.new_zeros(3) + torch.zeros(3, device=GPU),
    ],
)
def test_it_notes_nothing_else(free: Callable[[Tensor], object]) -> None:
    with pretend_gpu() as waits:
        free(torch.ones(3, device=GPU))
        assert waits == []


def test_everything_is_as_before_afterwards() -> None:
    before = torch.cuda._lazy_init, torch.Tensor.pin_memory
    with pretend_gpu():
        pass
    assert (torch.cuda._lazy_init, torch.Tensor.pin_memory) == before
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert not torch._C._only_lift_cpu_tensors()


# -- graphs ----------------------------------------------------------------------------------------------------


def test_a_graph_repeats_operations_and_not_what_python_does() -> None:
    with pretend_gpu():
        x, total, calls = torch.ones(3, device=GPU), torch.zeros(3, device=GPU), []
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls.append("captured")
            doubled = x[1:] * 2
            total[1:] += doubled
        # Capturing computes nothing.
        assert total.tolist() == [0, 0, 0] and doubled.isnan().all()
        for value in (1.0, 5.0):
            x.fill_(value)
            graph.replay()
            assert doubled.tolist() == [2 * value] * 2
        assert total.tolist() == [0, 12, 12] and calls == ["captured"]


def test_a_graph_draws_new_numbers_each_time() -> None:
    with pretend_gpu():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = nn.functional.dropout(torch.ones(64, device=GPU), 0.5)
        found = []
        for _ in range(2):
            graph.replay()
            found.append(drawn.tolist())
        assert found[0] != found[1] and set(found[0]) == {0.0, 2.0}


def test_waiting_while_capturing_is_an_error() -> None:
    with pretend_gpu() as waits:
        x = torch.ones(3, device=GPU)
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()
        x.sum().item()
        assert waits == ["_local_scalar_dense"]
