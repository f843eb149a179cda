"""The loop that anyone would write: DataLoader, an eager model, torch.optim's fastest AdamW, no logging.

``python -m bench.plain task lr seed steps device [data root]`` trains one run in a process of its own and prints its
test metric. Of this project it imports the task alone, for its raw data, its model, its loss and its evaluation.
"""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tasks.task import Task

BETA2 = 0.98


def digits(task: Any) -> Callable[[], Any]:
    """Images shifted one by one, as a transform of a data set does it."""
    from tasks.digits_resnet import SIZE, Batch

    images, labels = task.data["train"]

    def collate(pairs: list[tuple[Tensor, Tensor]]) -> Batch:
        shifts = torch.randint(3, (len(pairs), 2)).tolist()
        shifted = [image[i : i + SIZE, j : j + SIZE] for (image, _), (i, j) in zip(pairs, shifts, strict=True)]
        return Batch(torch.stack(shifted)[:, None], torch.stack([label for _, label in pairs]))

    return lambda: DataLoader(
        TensorDataset(images, labels), task.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )


def pydocs(task: Any) -> Callable[[], Any]:
    """Windows over parallel streams of the text."""
    from tasks.text import Batch

    streams = task.data["train"]
    length = len(streams) // task.batch_size
    streams = streams[: length * task.batch_size].view(task.batch_size, length).T

    def epoch() -> Iterator[Any]:
        for i in range(0, length - task.bptt, task.bptt):
            window = streams[i : i + task.bptt + 1]
            yield Batch(window[:-1], window[1:], torch.tensor(i == 0))

    return epoch


def phrases(task: Any) -> Callable[[], Any]:
    """Padded pairs."""
    from tasks.phrases_transformer import Batch

    def collate(rows: list[tuple[Tensor, ...]]) -> Batch:
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))

    return lambda: DataLoader(
        TensorDataset(*task.data["train"]), task.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )


def cifar(task: Any) -> Callable[[], Any]:
    """Images cropped and mirrored one by one by torchvision."""
    from runners.plain import Images
    from tasks.images import Batch

    loop = Images(task)
    return lambda: (Batch(*pair) for pair in loop.epoch())


EPOCHS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "digits_resnet": digits, "pydocs_lstm": pydocs, "phrases_transformer": phrases, "cifar10_resnet": cifar,
}  # fmt: skip
"""What gives the batches of an epoch, by task."""


def endless(task: Any, name: str) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    epoch = EPOCHS[name](task)
    return itertools.chain.from_iterable(epoch() for _ in itertools.count())


def train(name: str, data: Any, task: Any, lr: float, seed: int, steps: int) -> float:
    """Train one run on a task that is prepared on its device, with the batches of one that is prepared on the CPU; its
    test metric."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, BETA2), weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (1 - BETA2) * (done + 1) / 2))
    for batch in itertools.islice(endless(data, name), steps):
        optimizer.zero_grad()
        task.loss(model, type(batch)(*(part.to(task.device) for part in batch))).backward()
        optimizer.step()
        scheduler.step()
    task.evaluate(model, "validation")
    return float(task.evaluate(model, "test")[task.metric])


def main() -> None:
    """One run in this process."""
    name, lr, seed, steps, device, *root = sys.argv[1:]
    kind: Any = next(
        value
        for value in vars(importlib.import_module(f"tasks.{name}")).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == f"tasks.{name}"
    )
    fields = {"depth": 8} if name == "cifar10_resnet" else {}
    data, task = kind(**fields), kind(**fields)
    data.prepare(torch.device("cpu"), next(filter(None, root), None))
    if device == "cpu":
        task = data
    else:
        task.prepare(torch.device(device), next(filter(None, root), None))
    print(train(name, data, task, float(lr), int(seed), int(steps)))


if __name__ == "__main__":
    main()
