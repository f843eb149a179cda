"""Compiled execution agrees with eager execution.

Every rule goes through the tracing and functionalisation of torch.compile (backend aot_eager, a second a
rule); one goes through code generation as well, which takes several times longer and a C++ compiler.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import Engine, engine, warmups
from optimizers.rule import available
from tests.optimizers.problems import difference, run, start

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
    monkeypatch.setattr(engine, "BACKEND", request.param)
    engine._compiled.cache_clear()
    yield request.param
    engine._compiled.cache_clear()


def optimizer_of(name: str, params: list[nn.Parameter], execution: str, **options: object) -> Engine:
    kind = getattr(optimizers, available()[name].__name__)
    return kind(params, lr=0.01, execution=execution, **HYPER.get(name, {}), **options)


def end(name: str, execution: str, last: int, dtype: torch.dtype, **options: object) -> list[Tensor]:
    params = start(dtype)
    return run(optimizer_of(name, params, execution, **options), params, 1, last)


@pytest.mark.parametrize("name", available())
def test_agrees_with_eager(name: str, backend: str) -> None:
    # Nine steps: past the first adaptive step, a restart, and a step of Lookahead.
    options = {"weight_decay": 0.02, "clip_norm": 1.0}
    eager, compiled = (end(name, how, 9, torch.float64, **options) for how in ("eager", "compiled"))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["inductor"], indirect=True)
def test_agrees_with_eager_with_code_generation(backend: str) -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    eager, compiled = (end("radam", how, 9, torch.float32, weight_decay=0.02) for how in ("eager", "compiled"))
    assert difference(eager, compiled) < 2e-6


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


def test_a_new_learning_rate_is_not_a_new_program(backend: str) -> None:
    torch._dynamo.utils.counters.clear()
    params = start()
    optimizer = optimizer_of("adam", params, "compiled", warmup=warmups.Linear(10.0), weight_decay=0.1)
    run(optimizer, params, 1, 3)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["weight_decay"] = 0.2
    run(optimizer, params, 4, 6)
    params = start()
    run(optimizer_of("adam", params, "compiled", weight_decay=0.3), params, 1, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_checkpoint_moves_between_executions(backend: str) -> None:
    params = start()
    optimizer = optimizer_of("adan", params, "compiled")
    run(optimizer, params, 1, 5)
    others = copy.deepcopy(params)
    other = optimizer_of("adan", others, "eager")
    other.load_state_dict(optimizer.state_dict())
    assert difference(run(optimizer, params, 6, 9), run(other, others, 6, 9)) < 1e-13
