"""What the tasks share: moving tensors without waiting, seeded shuffling, and evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

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
