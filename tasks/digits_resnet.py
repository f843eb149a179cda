"""Handwritten digits with a small ResNet: the embedded image task."""

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import evaluating, shuffled, steps_per_epoch, to_device
from tasks.models.resnet import ResNet
from tasks.task import SCHEMA, Split, Task, digest, generator

CLASSES = 10
SIZE = 8
HELD_OUT = 30  # images of each class in the validation split, and again in the test split


class Batch(NamedTuple):
    """Images (N, 1, 8, 8) and their classes (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(config=SCHEMA)
class DigitsResNet(Task):
    """Classify the 1797 grey 8x8 images of scikit-learn's digits (the test part of UCI's Optical Recognition
    of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998) with the CIFAR ResNet of He et al. (2015).

    Splits: 1197 train, 300 validation, 300 test, with 30 images of each class in either held-out split; which
    ones is decided by a hash of the image, so it depends on no seed or library version. This is not MNIST
    (28x28, 70,000 images), and not UCI's own split by writer: scikit-learn does not say who wrote what, so a
    writer may be in two splits, and accuracies are higher than on unseen writers.

    Metric: ``accuracy`` (share, higher is better); also ``loss`` (nats).

    Fields:
        batch_size: images a step; the remainder of an epoch is left out.
        blocks: residual blocks in each of the three stages (depth 6 blocks + 2).
        width: channels of the first stage.
        augment: shift every training image by -1, 0 or 1 pixels each way, uniformly.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    steps: ClassVar[int] = 600

    batch_size: int = Field(default=64, ge=1)
    blocks: int = Field(default=1, ge=1)
    width: int = Field(default=8, ge=1)
    augment: bool = True

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        splits = read()
        steps_per_epoch(len(splits["train"].labels), self.batch_size)
        self.device = device
        self.digest = digest(*(tensor for split in splits.values() for tensor in split))
        pixels = splits["train"].images.double()
        mean, std = pixels.mean().item(), pixels.std().item()
        # Padded once here, so that a shifted image is only a choice of rows and columns; the padding is the
        # paper's white, which is 0 before the normalisation.
        self.data = {
            name: Batch(
                to_device(((F.pad(images.double(), (1, 1, 1, 1)) - mean) / std).float(), device),
                to_device(labels, device),
            )
            for name, (images, labels) in splits.items()
        }
        self.window = torch.arange(SIZE, device=device)

    def fingerprint(self) -> str:
        return self.digest

    def model(self) -> nn.Module:
        return ResNet(self.blocks, self.width, channels=1, classes=CLASSES).to(self.device)

    def crop(self, split: Split, indices: Tensor, shifts: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) of a split; ``shifts`` (N, 2) is the first row and column, 1 in the middle."""
        rows = (shifts[:, :1] + self.window)[:, :, None]
        columns = (shifts[:, 1:] + self.window)[:, None, :]
        return self.data[split].images[indices[:, None, None], rows, columns].unsqueeze(1)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        labels = self.data["train"].labels
        size = len(labels)
        shifts, of_epoch = torch.ones(size, 2, dtype=torch.long, device=self.device), -1
        for epoch, indices in shuffled(size, self.batch_size, seed, start, self.device):
            if self.augment and epoch != of_epoch:
                # One draw for the whole epoch: a resumed run needs no replay.
                draw = torch.randint(0, 3, (size, 2), generator=generator(seed, epoch, 1))
                shifts, of_epoch = to_device(draw, self.device), epoch
            yield Batch(self.crop("train", indices, shifts[indices]), labels[indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.labels)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        images, labels = self.data[split]
        with evaluating(model):
            logits = model(images[:, None, 1:-1, 1:-1])
            return {
                "loss": F.cross_entropy(logits, labels),
                "accuracy": (logits.argmax(1) == labels).to(torch.promote_types(logits.dtype, torch.float32)).mean(),
            }

    @property
    def worst(self) -> float:
        return 1 / CLASSES

    @property
    def initial_loss(self) -> float:
        return math.log(CLASSES)


@cache
def read() -> dict[Split, Batch]:
    """The three splits: images (N, 8, 8) as integers 0 (white) to 16, and labels (N,)."""
    # From scikit-learn's file, not its loader: importing sklearn.datasets takes several seconds of CPU.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, dtype=np.uint8, delimiter=","))
    images, labels = table[:, :-1].view(-1, SIZE, SIZE), table[:, -1].long()
    ranks = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
    members: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
    for label in range(CLASSES):
        chosen = sorted((i for i in range(len(labels)) if labels[i] == label), key=ranks.__getitem__)
        members["validation"] += chosen[:HELD_OUT]
        members["test"] += chosen[HELD_OUT : 2 * HELD_OUT]
        members["train"] += chosen[2 * HELD_OUT :]
    return {name: Batch(images[rows], labels[rows]) for name, rows in members.items()}
