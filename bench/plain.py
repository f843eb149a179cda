"""The loop that anyone would write: DataLoader, an eager model, torch.optim's fastest AdamW, no logging.

``python -m bench.plain task lr seed steps device [data root]`` trains one run in a process of its own and prints its
test metric. Of this project it imports the task alone, for its raw data, its model and its evaluation.
"""

import importlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tasks.task import Task

BETA2 = 0.98


class PlainTask(Protocol):
    """What a plain loop needs of a task: as runners.plain has it for the papers' tasks."""

    def epoch(self) -> Any:
        """The batches of an epoch."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss of one of them."""


class Digits(Dataset[Any]):
    """Digits that are shifted one by one."""

    def __init__(self, task: Any) -> None:
        self.images, self.labels = task.data["train"]
        self.batch_size, self.size = task.batch_size, self.images.shape[-1] - 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row, column = torch.randint(3, (2,)).tolist()
        return self.images[index, None, row : row + self.size, column : column + self.size], self.labels[index]

    def epoch(self) -> Any:
        return DataLoader(self, self.batch_size, shuffle=True, drop_last=True)

    def loss(self, model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class Topics:
    """The documentation as parallel streams, in windows."""

    def __init__(self, task: Any) -> None:
        self.text, self.streams, self.bptt = task.data["train"], task.batch_size, task.bptt

    def epoch(self) -> Any:
        length = len(self.text) // self.streams
        text = self.text[: length * self.streams].view(self.streams, length).T
        self.state: Tensor | None = None
        starts = range(0, length - self.bptt, self.bptt)
        return [(text[i : i + self.bptt], text[i + 1 : i + 1 + self.bptt]) for i in starts]

    def loss(self, model: Any, batch: Any) -> Tensor:
        state = torch.zeros_like(model.carried) if self.state is None else self.state.detach()
        logits, self.state = model.unroll(batch[0], state)
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


class Phrases:
    """Padded phrases."""

    def __init__(self, task: Any) -> None:
        self.data, self.batch_size = TensorDataset(*task.data["train"]), task.batch_size

    def epoch(self) -> Any:
        return DataLoader(self.data, self.batch_size, shuffle=True, drop_last=True)

    def loss(self, model: Any, batch: Any) -> Tensor:
        source, before, target = batch
        return F.cross_entropy(model(source, before).flatten(0, 1), target.flatten(), ignore_index=model.padding)


EMBEDDED: dict[str, Any] = {"digits_resnet": Digits, "pydocs_lstm": Topics, "phrases_transformer": Phrases}


def loop_of(name: str, task: Any) -> PlainTask:
    """The plain loop of a task that is prepared on the CPU, by the name of its module."""
    if name in EMBEDDED:
        loop: PlainTask = EMBEDDED[name](task)
        return loop
    from runners.plain import LOOPS  # imports much that a plain loop does without

    return LOOPS[name](task)


def train(loop: PlainTask, task: Any, lr: float, seed: int, steps: int) -> float:
    """Train one run on a task that is prepared on its device; its test metric."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, BETA2), weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (1 - BETA2) * (done + 1) / 2))
    epochs: Iterator[Any] = (loop.epoch() for _ in itertools.count())
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), steps):
        optimizer.zero_grad()
        loop.loss(model, [part.to(task.device) for part in batch]).backward()
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
    data_root = next(filter(None, root), None)
    raw, task = kind(**fields), kind(**fields)
    raw.prepare(torch.device("cpu"), data_root)
    if device == "cpu":
        task = raw
    else:
        task.prepare(torch.device(device), data_root)
    print(train(loop_of(name, raw), task, float(lr), int(seed), int(steps)))


if __name__ == "__main__":
    main()
