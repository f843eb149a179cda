"""The fast paths agree with eager execution over 50 steps, within a stated tolerance.

Every rule goes through the tracing and functionalisation of torch.compile (backend aot_eager, which takes no C++
compiler); one of each kind of state goes through code generation as well, which takes several times longer.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import Engine, engine, execution, warmups
from optimizers.rule import available
from tests.optimizers.problems import difference, run, start
from tests.pretend_gpu import GPU, pretend_gpu

STEPS = 50
TOLERANCE = 1e-12
"""Of weights around 1 in float64."""

HYPER = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adam2k": {"frozen_steps": 3},
    "adan": {"restart_every": 4},
    "lookahead": {"inner": {"name": "radam"}, "k": 3},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "acprop": {"rectify": True},
    "iterateaveraging": {"inner": {"name": "padam"}, "start": 3, "every": 2},
}


def no_compiler() -> str:
    """Why code cannot be generated here, or nothing."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"torch.compile needs a C++ compiler: {type(error).__name__}"
    return ""


@pytest.fixture(params=["aot_eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs of two places, of which the 4 x 3 matrix takes one where it lies and the vector the other, joined."""
    monkeypatch.setattr(execution, "BACKEND", request.param)
    monkeypatch.setattr(execution, "SLOTS", 2)
    monkeypatch.setattr(engine, "ALONE", 12)
    execution._over_vectors.cache_clear()
    execution._over_shapes.cache_clear()
    yield request.param
    execution._over_vectors.cache_clear()
    execution._over_shapes.cache_clear()


def optimizer_of(name: str, params: list[nn.Parameter], execution: str, **options: object) -> Engine:
    kind = getattr(optimizers, available()[name].__name__)
    return kind(params, lr=0.01, execution=execution, **HYPER.get(name, {}), **options)


def end(name: str, execution: str, last: int, dtype: torch.dtype, **options: object) -> list[Tensor]:
    params = start(dtype)
    return run(optimizer_of(name, params, execution, **options), params, 1, last)


# Past the first adaptive step, restarts, and many steps of Lookahead.
OPTIONS = {"weight_decay": 0.02, "clip_norm": 1.0}


@pytest.mark.parametrize("name", available())
def test_compiled_execution_agrees_with_eager(name: str, backend: str) -> None:
    eager, compiled = (end(name, how, STEPS, torch.float64, **OPTIONS) for how in ("eager", "compiled"))
    assert difference(eager, compiled) < TOLERANCE


@pytest.mark.parametrize("name", available())
def test_flat_execution_agrees_with_eager(name: str) -> None:
    eager, flat = (end(name, how, STEPS, torch.float64, **OPTIONS) for how in ("eager", "flat"))
    assert difference(eager, flat) < TOLERANCE


@pytest.mark.parametrize("backend", ["inductor"], indirect=True)
@pytest.mark.parametrize("name", ["radam", "adan", "lion"])
def test_agrees_with_eager_with_code_generation(name: str, backend: str) -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    eager, compiled = (end(name, how, STEPS, torch.float64, **OPTIONS) for how in ("eager", "compiled"))
    assert difference(eager, compiled) < TOLERANCE


@pytest.mark.parametrize("name", ["adam", "lars"])
def test_without_a_compiler_execution_is_flat_and_says_so(name: str) -> None:
    from torch._inductor import config

    execution._over_vectors.cache_clear()
    execution._over_shapes.cache_clear()
    params = start()
    optimizer = optimizer_of(name, params, "compiled", weight_decay=0.02)
    with (
        config.patch({"cpp.cxx": ("no such compiler",), "fx_graph_cache": False}),
        pytest.warns(UserWarning, match=r"^execution is flat, as torch.compile does not work here: "),
    ):
        run(optimizer, params, 1, 1)
    assert optimizer.execution == "flat"
    run(optimizer, params, 2, 5)  # without another warning, which would be an error
    assert difference([p.detach() for p in params], end(name, "eager", 5, torch.float64, weight_decay=0.02)) < 1e-14


class Untraced:
    """A function in place of the program that torch would make of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.graph = function, self

    def find_nodes(self, op: str) -> list[Any]:
        return []


@pytest.mark.parametrize("name", [name for name, rule in available().items() if rule.elementwise])
def test_on_a_gpu_it_mixes_no_devices_and_waits_for_nothing(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "make_fx", lambda step, tracing_mode: lambda *example: Untraced(step))
    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: lambda graph, inputs: graph.function)
    with pretend_gpu() as waits:
        params = [nn.Parameter(p.detach().to(GPU)) for p in start()]
        optimizer = optimizer_of(name, params, "compiled", **OPTIONS)
        there = [p.cpu() for p in run(optimizer, params, 1, STEPS)]
        waits.clear()
        optimizer.step(loss=torch.zeros(()))
        assert waits == []
    assert difference(there, end(name, "eager", STEPS, torch.float64, **OPTIONS)) < TOLERANCE


def test_agrees_with_eager_in_half_precision(backend: str) -> None:
    eager, compiled = (end("radam", how, 9, torch.bfloat16, weight_decay=0.02) for how in ("eager", "compiled"))
    assert all(p.dtype == torch.bfloat16 for p in compiled)
    assert difference(eager, compiled) < 1e-2


def test_more_programs_than_torch_keeps_of_one_function(backend: str) -> None:
    """Torch gives up after 8 programs of one function; a worker of a sweep meets more rules and models."""
    for size in range(1, 13):
        p = nn.Parameter(torch.ones(size))
        optimizer = optimizers.SGD([p], lr=0.5, execution="compiled")
        p.grad = torch.ones(size)
        optimizer.step()
        assert torch.equal(p.detach(), torch.full((size,), 0.5))


def test_a_program_is_for_all_learning_rates_and_all_models(backend: str) -> None:
    params = start()
    optimizer = optimizer_of("adam", params, "compiled", warmup=warmups.Linear(10.0), weight_decay=0.1)
    run(optimizer, params, 1, 3)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["weight_decay"] = 0.2
    run(optimizer, params, 4, 6)
    others = [
        [nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in sizes] for sizes in ([1], [3, 20, 0], [20] * 5)
    ]
    for many in others:
        optimizer = optimizer_of("adam", many, "compiled", weight_decay=0.3)
        other = copy.deepcopy(many)
        for p in many:
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        for p in other:
            p.grad = torch.full_like(p, 0.1)
        optimizer_of("adam", other, "eager", weight_decay=0.3).step()
        assert difference([p for p in many if p.numel()], [p for p in other if p.numel()]) < 1e-15
    assert execution._over_vectors.cache_info().misses == 1


def test_memory_in_any_order(backend: str) -> None:
    """Channels last, transposed, with gaps; and gradients in another order than the parameter."""
    ends = []
    for how in ("eager", "compiled"):
        torch.manual_seed(0)
        image = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last))
        turned = nn.Parameter(torch.randn(5, 4, dtype=torch.float64).T)
        gaps = nn.Parameter(torch.randn(8, 6, dtype=torch.float64)[::2])
        params = [image, turned, gaps]
        places = [(p.data_ptr(), p.stride()) for p in params]
        optimizer = optimizer_of("adam", params, how, weight_decay=0.1)
        for t in range(4):
            for p in params:
                g = torch.randn(p.shape, dtype=torch.float64)
                p.grad = g if t % 2 else torch.empty_like(p).copy_(g)
            optimizer.step()
            if t == 1:  # a checkpoint of a machine that kept them otherwise
                optimizer.state[image]["m"] = optimizer.state[image]["m"].contiguous()
        assert [(p.data_ptr(), p.stride()) for p in params] == places
        ends.append([p.detach() for p in params])
    assert difference(*ends) < TOLERANCE


def test_parameters_that_were_replaced_are_seen(backend: str) -> None:
    ends = []
    for how in ("eager", "compiled"):
        params = start()
        optimizer = optimizer_of("adam", params, how)
        run(optimizer, params, 1, 3)
        for p in params:
            p.data = p.data * 2
        ends.append(run(optimizer, params, 4, 6))
    assert difference(*ends) < TOLERANCE


def test_a_checkpoint_moves_between_executions(backend: str) -> None:
    params = start()
    optimizer = optimizer_of("adan", params, "compiled")
    run(optimizer, params, 1, 5)
    others = copy.deepcopy(params)
    other = optimizer_of("adan", others, "eager")
    other.load_state_dict(optimizer.state_dict())
    assert difference(run(optimizer, params, 6, 9), run(other, others, 6, 9)) < 1e-13
