"""Forward passes over training batches outside of training, for any task."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tasks.task import Task

BATCHES = 100
"""Training batches from which statistics of BatchNorm are estimated anew."""


class TaskLoss(nn.Module):
    """A task's loss as a module of the batch: for what torch does with modules."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch)


@contextlib.contextmanager
def reestimated(task: Task, model: nn.Module, seed: int) -> Iterator[None]:
    """Within this context BatchNorm's running statistics are those of the weights that the model has now, as they
    must be when an average of weights is evaluated; afterwards every buffer is again what it was, to the bit.

    The statistics are torch.optim.swa_utils.update_bn's: means over ``BATCHES`` batches in training mode. Batches
    and dropout come from ``seed``; the state of torch's generators is left alone.
    """
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batches = itertools.islice(task.batches(seed), BATCHES)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            torch.manual_seed(seed)
            # A batch in a tuple, as update_bn takes the first of whatever is a tuple: it means (inputs, targets).
            update_bn(((batch,) for batch in batches), TaskLoss(task, model))
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
