"""ImageNet with torchvision's ResNet, streamed from an image folder."""

import hashlib
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tasks.common import evaluating, shuffled, steps_per_epoch
from tasks.images import Batch
from tasks.sources import find, optional
from tasks.task import SCHEMA, Split, Task, digest, generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the training set, as everybody rounds them

Sample = tuple[str, int]  # file and class
Item = tuple[int, int | None]  # which sample, and the seed of its augmentation (None: the middle)


@dataclass(config=SCHEMA)
class ImagenetResNet(Task):
    """Classify the images of ImageNet (ILSVRC 2012; Russakovsky et al., 2015) with torchvision's ResNet.

    Under the data root: ``imagenet/train/<class>/*`` and ``imagenet/val/<class>/*``, as torchvision's ImageFolder has
    them; any image folder of this form will do. It is too large to lie on the device and cannot be downloaded, so it
    is streamed. What a step sees is a function of (seed, step) all the same: each image is augmented with the seed
    (seed, epoch, image), whichever worker does it.

    Splits: the official validation images are ``test``, as in the papers' tables; ``validation`` is a share of the
    training images, those with the smallest SHA-256 of their names.

    Fingerprint: of the names and sizes of all files, as hashing 150 GB would take longer than it is worth: a file
    that changes and keeps its size is not noticed.

    The budget is 90 epochs in batches of 256. Training images are cropped at random (RandomResizedCrop: 8 to 100 % of
    the area, 3/4 to 4/3 of the shape) and mirrored by half; the others are resized and cropped in the middle.
    Initialisation is torchvision's: convolutions normal with variance 2/fan-out, the last BatchNorm of a block 1.

    Metric: ``accuracy`` (top 1, share, higher is better), which the papers report; also ``loss`` (nats).

    Fields:
        batch_size: images a step; the remainder of an epoch is left out.
        depth: layers, 18 or 50.
        crop: side of the images that the network sees.
        resize: shorter side of a held-out image before its middle is cut out.
        held_out: share of the training images that is the validation split.
        workers: processes that read images. The result does not depend on it, but a run's id does: leave it be
            within a study. The workers of a sweep may not start processes, and read by themselves.
        channels_last: lay images and weights out as N, H, W, C, which tensor cores prefer; equal up to rounding.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    steps: ClassVar[int] = 441_360

    batch_size: int = Field(default=256, ge=1)
    depth: Literal[18, 50] = 18
    crop: int = Field(default=224, ge=32)
    resize: int = Field(default=256, ge=32)
    held_out: float = Field(default=0.02, gt=0, lt=1)
    workers: int = Field(default=8, ge=0)
    channels_last: bool = False

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        """List the files: nothing else is kept in memory."""
        if self.resize < self.crop:
            raise ValueError(f"resize={self.resize} is smaller than crop={self.crop}")
        parts = find("imagenet", data_root, {"train": "train/*/", "val": "val/*/"})
        folders = {part: optional("torchvision.datasets").ImageFolder(found[0].parent) for part, found in parts.items()}
        if folders["train"].classes != folders["val"].classes:
            raise ValueError("imagenet: train/ and val/ have different class folders")
        roots = {part: Path(folder.root) for part, folder in folders.items()}
        named = {
            part: sorted(
                (Path(file).relative_to(roots[part]).as_posix(), file, label) for file, label in folder.samples
            )
            for part, folder in folders.items()
        }
        lines = (f"{part}/{name} {Path(file).stat().st_size}" for part in named for name, file, _ in named[part])
        self.digest = digest(*lines)
        ranked = sorted(named["train"], key=lambda entry: hashlib.sha256(entry[0].encode()).digest())
        count = max(1, int(self.held_out * len(ranked)))
        self.samples: dict[Split, list[Sample]] = {
            "train": [(file, label) for _, file, label in sorted(ranked[count:])],
            "validation": [(file, label) for _, file, label in sorted(ranked[:count])],
            "test": [(file, label) for _, file, label in named["val"]],
        }
        steps_per_epoch(len(self.samples["train"]), self.batch_size)
        self.device, self.classes = device, len(folders["train"].classes)
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (MEAN, STD))

    def fingerprint(self) -> str:
        return self.digest

    def model(self) -> nn.Module:
        models = optional("torchvision.models")
        model: nn.Module = getattr(models, f"resnet{self.depth}")(num_classes=self.classes).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def stream(self, split: Split, plan: Iterable[list[Item]]) -> Iterator[Batch]:
        """The batches of a plan, on the device; nothing waits for it."""
        daemon = multiprocessing.current_process().daemon  # which may not have children
        cuda = self.device.type == "cuda"
        loader = DataLoader(
            Views(self.samples[split], self.crop, self.resize),
            batch_sampler=plan,
            num_workers=0 if daemon else self.workers,
            pin_memory=cuda,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for images, labels in loader:
            images, labels = (part.to(self.device, non_blocking=cuda) for part in (images, labels))
            yield Batch(((images.float() - self.mean) / self.std).contiguous(memory_format=layout), labels)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        order = shuffled(len(self.samples["train"]), self.batch_size, seed, start, torch.device("cpu"))
        plan: Iterator[list[Item]] = (
            [(i, generator(seed, epoch, 1, i).initial_seed()) for i in rows.tolist()] for epoch, rows in order
        )
        return self.stream("train", plan)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.images.to(next(model.parameters()).dtype)), batch.labels)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        size = len(self.samples[split])
        plan: list[list[Item]] = [[(int(i), None) for i in rows] for rows in torch.arange(size).split(self.batch_size)]
        loss, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with evaluating(model):
            for images, labels in self.stream(split, plan):
                logits = model(images.to(next(model.parameters()).dtype))
                loss = loss + F.cross_entropy(logits, labels, reduction="sum")
                right = right + (logits.argmax(1) == labels).sum()
        return {"loss": loss / size, "accuracy": right / size}

    @property
    def worst(self) -> float:
        return 1 / self.classes

    @property
    def initial_loss(self) -> float:
        return math.log(self.classes)


class Views(Dataset[tuple[Tensor, int]]):
    """Images (uint8) by (index, seed): cropped and mirrored at random from that seed, or the middle without one."""

    def __init__(self, samples: list[Sample], crop: int, resize: int) -> None:
        t = optional("torchvision.transforms")
        self.samples, self.load = samples, optional("torchvision.datasets.folder").default_loader
        steps: list[Callable[[Any], Any]] = [t.RandomResizedCrop(crop), t.RandomHorizontalFlip(), t.PILToTensor()]
        self.augment = t.Compose(steps)
        self.middle = t.Compose([t.Resize(resize), t.CenterCrop(crop), t.PILToTensor()])

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        index, seed = item
        file, label = self.samples[index]
        image = self.load(file)
        if seed is None:
            return self.middle(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torchvision draws from the global generator
            return self.augment(image), label
