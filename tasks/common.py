"""What the tasks share: moving tensors without waiting, shuffling, shapes of batches, and evaluation mode."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tasks.task import generator


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``; the host does not wait for it (a pageable copy would, a pinned one does not)."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Whole batches in ``size`` examples: the remainder is left out, so that every batch has one shape."""
    if batch_size > size:
        raise ValueError(f"batch_size={batch_size} is larger than the training split ({size})")
    return size // batch_size


def shuffled(size: int, batch_size: int, seed: int, start: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(epoch, indices on the device) of steps start+1, start+2, ..., without replacement in an epoch."""
    per_epoch = steps_per_epoch(size, batch_size)
    epoch, first = divmod(start, per_epoch)
    while True:
        order = to_device(torch.randperm(size, generator=generator(seed, epoch)), device)
        for i in range(first, per_epoch):
            yield epoch, order[i * batch_size : (i + 1) * batch_size]
        epoch, first = epoch + 1, 0


def shapes(batch: Any) -> tuple[Any, ...]:
    """The shapes of a batch of tensors, or of whatever it is made of."""
    return tuple(map(shapes, batch)) if isinstance(batch, tuple | list) else tuple(getattr(batch, "shape", ()))


def of_one_shape(batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A task's ``batches``, of which those of the commonest shape alone."""
    ((common, _),) = Counter(map(shapes, itertools.islice(batches(0), 100))).most_common(1)
    return lambda seed, start=0: (batch for batch in batches(seed, start) if shapes(batch) == common)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every submodule is what it was on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
