"""One step of a rule over tensors: as it stands, and compiled."""

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from optimizers.layout import places
from optimizers.rule import HALF, Rule, Scalars, State, WeightDecayMode

BACKEND = "inductor"
"""The backend of torch.compile in compiled execution."""

SLOTS = 12
"""How many vectors one compiled function of an elementwise rule takes: as many as a ResNet-20 is laid out as. More
take longer to compile, fewer cost more calls."""


class NoCompiler(RuntimeError):
    """Code cannot be generated on this machine."""


def run(
    rule: Rule,
    mode: WeightDecayMode,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    c: Scalars,
    lr: Any,
    decay: Any,
) -> None:
    """One step of one rule over tensors of the same step number, in place."""
    lr = lr * c.get("lr", 1.0)
    c = {**c, "rate": lr}
    if mode == "internal":
        c["weight_decay"] = decay
    c |= rule.gather(params, grads, states, c)
    of_tensors = isinstance(lr, Tensor)
    for p, g, state in zip(params, grads, states, strict=True):
        x = p.float() if p.dtype in HALF else p
        if g.dtype != x.dtype:
            g = g.to(x.dtype)
        if mode == "coupled":
            g = g + x * decay
        elif mode == "decoupled":
            x.mul_(1 - lr * decay)
        direction = rule.update(x, g, state, c)
        if of_tensors:
            x.sub_(direction * lr)
        else:
            x.add_(direction, alpha=-lr)
        if mode == "proximal":
            x.div_(1 + lr * decay)
        if x is not p:
            p.copy_(x)


def run_compiled(
    rule: Rule,
    mode: WeightDecayMode,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    c: dict[str, float],
    lr: float,
    decay: float,
    given: Scalars,
) -> None:
    """The same through torch.compile; the tensors of an elementwise rule are vectors.

    Raises:
        NoCompiler: where code cannot be generated; nothing has been changed then.
    """
    # In a tensor, so that a new value is not a new program.
    device = params[0].device
    scalars = torch.tensor([lr, decay, *c.values()], dtype=torch.float64)
    if _home(device) != scalars.device:  # without waiting for the device
        scalars = scalars.pin_memory().to(device, non_blocking=True)
    if not rule.elementwise or given:
        program = _over_shapes(rule, mode, tuple(p.shape for p in params))
        try:
            program(rule, mode, tuple(c), params, grads, states, scalars, given)
        except RuntimeError as error:
            if type(error).__name__ not in ("BackendCompilerFailed", "InductorError"):
                raise
            raise NoCompiler(_first_line(error)) from error
        return
    names = tuple(states[0])
    # By kind and not by tensor: all parameters, all gradients, all m, ...
    columns = [params, grads, *([state[name] for state in states] for name in names)]
    found = places([tuple(t.dtype for t in tensors) for tensors in zip(*columns, strict=True)])
    # All programs before the first of them runs: what cannot be compiled must not have begun.
    programs = {kind: _over_vectors(rule, mode, tuple(c), device, names, kind) for kind in found}
    for kind, at in found.items():
        program, idle = programs[kind]
        for i in range(0, len(at), SLOTS):
            these = at[i : i + SLOTS]
            pairs = zip(columns, idle, strict=True)
            filled = ([column[j] for j in these] + spare[len(these) :] for column, spare in pairs)
            program(scalars, *itertools.chain.from_iterable(filled))


def _step(
    rule: Rule,
    mode: WeightDecayMode,
    names: tuple[str, ...],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    scalars: Tensor,
    given: Scalars,
) -> None:
    c = {name: scalars[i] for i, name in enumerate(names, start=2)}
    run(rule, mode, params, grads, states, {**c, **given}, scalars[0], scalars[1])


@functools.lru_cache(maxsize=256)
def _over_shapes(rule: Rule, mode: WeightDecayMode, shapes: tuple[torch.Size, ...]) -> Callable[..., None]:
    """The step as one compiled function for a rule, a mode and the shapes of a model.

    Each has its own copy of the code: torch keeps 8 programs of one piece of code and then gives up, and a
    worker of a sweep meets more rules and models than that.
    """
    own = types.FunctionType(_step.__code__.replace(), _step.__globals__, _step.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True, backend=BACKEND)


@functools.lru_cache(maxsize=256)
def _over_vectors(
    rule: Rule,
    mode: WeightDecayMode,
    scalars: tuple[str, ...],
    device: torch.device,
    names: tuple[str, ...],
    kinds: tuple[torch.dtype, ...],
) -> tuple[Callable[..., Any], list[list[Tensor]]]:
    """The step as one compiled function over SLOTS vectors of any lengths, and vectors for places that stay empty.

    It is a rule's program for all models. Its arguments are what ``kinds`` says and are not looked at again, as
    those of torch.compile are at each call: the parameters, the gradients, and then the state by its names.
    """

    def columns(lengths: Sequence[int]) -> list[list[Tensor]]:
        return [[torch.zeros(n, dtype=kind, device=device) for n in lengths] for kind in kinds]

    def step(values: Tensor, *tensors: Tensor) -> tuple[()]:
        params, grads, *state = (tensors[i : i + SLOTS] for i in range(0, len(tensors), SLOTS))
        states = [dict(zip(names, own, strict=True)) for own in zip(*state, strict=True)] or [{}] * SLOTS
        _step(rule, mode, scalars, params, grads, states, values, {})
        return ()

    # Lengths of which no two are equal, or it would be taken for granted that these always are.
    example = itertools.chain.from_iterable(columns([1000 + 10 * i for i in range(SLOTS)]))
    values = torch.zeros(2 + len(scalars), dtype=torch.float64, device=_home(device))
    graph = make_fx(step, tracing_mode="symbolic")(values, *example)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    try:
        from torch._dynamo import lookup_backend  # takes seconds

        program = lookup_backend(BACKEND)(graph, inputs)
    except RuntimeError as error:
        raise NoCompiler(_first_line(error)) from error
    return program, columns([2] * SLOTS)


def _home(device: torch.device) -> torch.device:
    """Where the scalars of a step live: a GPU's kernels would have them from the CPU one by one, each by a call of its
    own; elsewhere on the CPU, which every kernel can read."""
    return device if device.type == "cuda" else torch.device("cpu")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
