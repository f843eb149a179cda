"""A task that trains in milliseconds and can be told to go wrong at a step. Importable by worker processes."""

import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import to_device
from tasks.task import SCHEMA, Split, Task, digest, generator


@dataclass(config=SCHEMA)
class Tiny(Task):
    """Linear regression through dropout, in 6 dimensions.

    Fields:
        how, at: what goes wrong at step ``at``: the loss is nan, inf or huge (finite, above the runner's bound);
            the weights become nan though the loss is finite; an exception.
        slow: seconds a step.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    steps: ClassVar[int] = 30
    batch_size: ClassVar[int] = 16

    how: Literal["nothing", "nan", "inf", "huge", "weights", "raise"] = "nothing"
    at: int = 0
    slow: float = 0.0
    salt: int = 0

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        self.device = device
        draws = torch.randn(96, 7, generator=generator(7, self.salt)) / 2
        self.x, self.y = draws[:, :6].to(device), draws[:, 6:].to(device)

    def fingerprint(self) -> str:
        return digest(self.x, self.y)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.1), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Any]:
        t = start
        while True:
            t += 1
            rows = torch.randint(0, 64, (self.batch_size,), generator=generator(seed, t))
            rows = to_device(rows, self.device)
            yield t, self.x[rows], self.y[rows]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        t, x, y = batch
        if self.slow:
            time.sleep(self.slow)
        loss = ((model(x) - y) ** 2).mean()
        if t == self.at:
            if self.how == "raise":
                raise RuntimeError("the task is broken\nin two lines")
            if self.how == "weights":
                return loss + sum((p * 0).sum() for p in model.parameters()).sqrt()
            return loss * {"nothing": 1.0, "nan": torch.nan, "inf": torch.inf, "huge": 1e6}[self.how]
        return loss

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        rows = {"train": slice(64), "validation": slice(64, 80), "test": slice(80, 96)}[split]
        model.eval()
        with torch.no_grad():
            loss = ((model(self.x[rows]) - self.y[rows]) ** 2).mean()
        model.train()
        return {"loss": loss, "root": loss.sqrt()}

    @property
    def worst(self) -> float:
        return 1.0

    @property
    def initial_loss(self) -> float:
        return 1.0
