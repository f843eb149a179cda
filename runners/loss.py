"""The training loss of a run and its gradient: its precision, and how the model's two passes are run.

Eager, they are torch's kernels, launched one by one. As a CUDA graph, these are launched as a whole, see
runners.graphs.

Compiled, a task's loss and its gradient are one program for each precision and shape of batch, made by torch.compile
when a process first meets it: of the order of a minute, and of some seconds where an earlier process left its code in
torch's cache on disk (TORCHINDUCTOR_CACHE_DIR). All later runs of the task in this process use it, whatever their
seed, optimizer or learning rate: parameters, buffers and data are what the program is called with.

What a program is depends on nothing but its task, precision and shape, so that the bits of a run do not depend on
which runs the process had before. Therefore shapes are never generalised: a program for all shapes would depend on
the shape that came first. Dropout draws the numbers that it draws in eager mode, from torch's generator. Evaluation,
initialisation and the statistics of averaged weights are eager in any case.
"""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from runners.config import Run, UserError, first_line, name_of, plain
from runners.graphs import Graphs
from tasks.common import shapes
from tasks.task import Task

BACKEND = "inductor"
"""The backend of torch.compile."""


def autocast(run: Run, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context, to be entered as often as one likes, in which a model has the run's precision."""
    return torch.autocast(device.type, torch.bfloat16) if run.precision == "bfloat16" else contextlib.nullcontext()


def loss_of(run: Run, task: Task, model: nn.Module) -> Callable[[Any], Tensor]:
    """The training loss as a function of the batch, as the run computes it.

    Raises:
        UserError: if it is to be compiled and this machine or the task does not allow it; for what only shows in
            compiling, when it is called.
    """
    device = next(model.parameters()).device
    if run.model_execution != "compiled":
        compute = task.loss
    else:
        compiler_there(device, BACKEND, "model_execution=compiled", "model_execution=eager")
        compute = functools.partial(_compiled_loss, str(plain(task)), run.precision, task)
    context = autocast(run, device)

    def loss(batch: Any) -> Tensor:
        with context:
            return compute(model, batch)

    return loss


def passes_of(run: Run, task: Task, model: nn.Module) -> Callable[[Any], Tensor]:
    """Forward and backward pass as a function of the batch, as the run computes them: the loss, without its history.
    Gradients are left in the parameters' ``grad``, in place of those that were there.

    Raises:
        UserError: as ``loss_of``.
    """
    loss_on = loss_of(run, task, model)

    def passes(batch: Any) -> Tensor:
        loss = loss_on(batch)
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    if run.model_execution != "cuda_graph":
        return passes
    if next(model.parameters()).device.type != "cuda":
        raise UserError("model_execution=cuda_graph needs a GPU of NVIDIA: use model_execution=eager")
    return Graphs(passes, model, f"model_execution=cuda_graph: {name_of(task)}")


def compiler_there(device: torch.device, backend: str, setting: str, instead: str) -> None:
    """Raise UserError on a CPU without a C++ compiler, which compiled code needs, with the setting to use instead."""
    if device.type != "cpu" or backend != "inductor":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise UserError(
            f"{setting} needs a C++ compiler ({first_line(error)}): install g++ or clang++, or use {instead}"
        ) from None


def _compiled_loss(key: str, precision: str, task: Task, model: nn.Module, batch: Any) -> Tensor:
    program = _program(key, precision, shapes(batch))
    try:
        loss: Tensor = program(task, model, batch)
    except _cannot_compile() as error:
        why = first_line(getattr(error, "inner_exception", error))  # the other's first line names the backend alone
        raise UserError(f"model_execution=compiled: {name_of(task)} cannot be compiled: {why}") from error
    return loss


@functools.lru_cache(maxsize=256)
def _program(key: str, precision: str, shapes: tuple[Any, ...]) -> Callable[..., Tensor]:
    """The loss as one compiled program.

    Each has its own copy of the code: torch keeps 8 programs of one piece of code and then gives up.
    """
    torch._dynamo.config.allow_rnn = True  # an LSTM is unrolled over its time steps
    code = _loss.__code__.replace()
    own = types.FunctionType(code, _loss.__globals__, _loss.__name__)
    options: Any = {"fallback_random": True} if BACKEND == "inductor" else None
    return torch.compile(own, dynamic=False, fullgraph=True, backend=BACKEND, options=options)


def _loss(task: Task, model: nn.Module, batch: Any) -> Tensor:
    return task.loss(model, batch)


def _cannot_compile() -> tuple[type[Exception], ...]:
    """What torch.compile raises for code that it cannot compile."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit
