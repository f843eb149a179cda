"""Small images that live on the device whole: where they come from, their splits, and what their tasks share."""

import abc
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as default
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass as schema
from torch import Tensor, nn

from tasks.common import evaluating, shuffled, steps_per_epoch, to_device
from tasks.sources import Missing, cached, downloaded, find, optional
from tasks.task import SCHEMA, Split, Task, digest

CHUNK = 1000  # images evaluated at a time


class Batch(NamedTuple):
    """Images (N, channels, H, W) and their classes (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """A data set of small images.

    Attributes:
        folder: under the data root. It holds parquet files ``train*.parquet`` and ``test*.parquet`` as on the
            Hugging Face hub (a column of encoded images, a column of labels from 0), or what torchvision keeps.
        classes: how many.
        image: the parquet column of the images: ``{"bytes": PNG or JPEG}``.
        label: the parquet column of the classes.
        url: a server from which torchvision downloads it.
        torchvision: its class in ``torchvision.datasets``, which checks MD5 sums.
        options: arguments of that class.
        first: the label of the first class there.
        transposed: whether the images there have rows and columns exchanged.
    """

    folder: str
    classes: int
    image: str
    label: str
    url: str
    torchvision: str
    options: Mapping[str, Any] = default(default_factory=dict)
    first: int = 0
    transposed: bool = False


def read(source: ImageSet, root: str | None) -> dict[Split, Batch]:
    """The official training and test images (uint8) and classes (int64), in their order.

    From parquet files under the data root, else from torchvision's files there, else downloaded by torchvision.

    Raises:
        Missing: if none of them has the images.
        ValueError: if a label is not one of the classes.
    """
    try:
        files = find(source.folder, root, {"train": "train*.parquet", "test": "test*.parquet"})
    except Missing as missing:
        parts = _torchvision(source, root, missing)
    else:
        parts = {
            part: cached("images-1", found, [source.image, source.label], partial(_decode, found, source))
            for part, found in files.items()
        }
    for part, (_, labels) in parts.items():
        if not 0 <= int(labels.min()) <= int(labels.max()) < source.classes:
            raise ValueError(f"{source.folder}: the {part} labels are not 0 to {source.classes - 1}")
    return {"train": Batch(*parts["train"]), "test": Batch(*parts["test"])}


def _decode(files: list[Path], source: ImageSet) -> list[Tensor]:
    from PIL import Image

    images, labels = [], []
    for file in files:
        table = pyarrow.parquet.read_table(file, columns=[source.image, source.label])
        images += [np.asarray(Image.open(io.BytesIO(v["bytes"]))) for v in table[source.image].to_pylist()]
        labels += table[source.label].to_pylist()
    return [_channels_first(torch.from_numpy(np.stack(images))), torch.tensor(labels)]


def _torchvision(source: ImageSet, root: str | None, missing: Missing) -> dict[str, list[Tensor]]:
    try:
        kind = getattr(optional("torchvision.datasets"), source.torchvision)
    except Missing as absent:
        raise Missing(f"{missing}; {absent}") from None

    def load(folder: Path, download: bool = False) -> dict[str, list[Tensor]]:
        parts = {}
        for part in ("train", "test"):
            data = kind(folder, train=part == "train", download=download, **source.options)
            images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets).long()
            if source.transposed:
                images = images.transpose(1, 2)
            parts[part] = [_channels_first(images), labels - source.first]
        return parts

    if root is not None:
        try:
            return load(Path(root) / source.folder)
        except RuntimeError:
            pass  # torchvision's word for files that are not there or not as they should be

    def fill(folder: Path) -> None:
        load(folder, download=True)

    try:
        return load(downloaded(f"torchvision-{source.torchvision}", source.url, fill))
    except Missing as remote:
        raise Missing(f"{missing}; {remote}") from None


def _channels_first(images: Tensor) -> Tensor:
    return (images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous()


def held_out(images: Tensor) -> Tensor:
    """Which images are held out for validation: the tenth with the smallest SHA-256 of their pixels.

    So it depends on no seed, order or library version; it is a random tenth, not one of each class.
    """
    ranks = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
    mask = torch.zeros(len(images), dtype=torch.bool)
    mask[sorted(range(len(images)), key=ranks.__getitem__)[: len(images) // 10]] = True
    return mask


@schema(config=SCHEMA)
class Images(Task):
    """Classify small images that all lie on the device, as bytes; a batch is normalised when it is drawn, by the
    mean and standard deviation of each channel over the official training images.

    A task adds the data set, a model, and, in ``view``, its augmentation.

    Metric: ``accuracy`` (share, higher is better), which the papers report; also ``loss`` (nats), which says little
    about a network that is sure of its mistakes.
    """

    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    batch_size: int = Field(default=128, ge=1)
    train_all: bool = False

    @property
    @abc.abstractmethod
    def source(self) -> ImageSet:
        """The data set."""

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        """Load the images, split them, and put them on the device as uint8."""
        official = read(self.source, data_root)
        images, labels = official["train"]
        mask = held_out(images)
        self.digest = digest(*(tensor for part in official.values() for tensor in part))
        splits: dict[Split, Batch] = {
            "train": official["train"] if self.train_all else Batch(images[~mask], labels[~mask]),
            "validation": Batch(images[mask], labels[mask]),
            "test": official["test"],
        }
        steps_per_epoch(len(splits["train"].labels), self.batch_size)
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
        shares = counts / counts.sum(1, keepdim=True)
        mean = shares @ values
        std = (shares @ values**2 - mean**2).sqrt()
        self.device, self.size = device, images.shape[1:]
        self.mean, self.std = (to_device(v.float()[:, None, None], device) for v in (mean, std))
        self.data = {name: Batch(*(to_device(part, device) for part in split)) for name, split in splits.items()}

    def fingerprint(self) -> str:
        return self.digest

    def normalise(self, images: Tensor) -> Tensor:
        """Float32 images of mean 0 and variance 1 in each channel."""
        return (images.float() - self.mean) / self.std

    def view(self, seed: int, epoch: int) -> Callable[[Tensor], Tensor]:
        """The training images (uint8) at given indices as one epoch shows them."""
        return self.data["train"].images.__getitem__

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        labels, of_epoch = self.data["train"].labels, -1
        for epoch, indices in shuffled(len(labels), self.batch_size, seed, start, self.device):
            if epoch != of_epoch:
                view, of_epoch = self.view(seed, epoch), epoch
            yield Batch(self.normalise(view(indices)), labels[indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.labels)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        images, labels = self.data[split]
        loss, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with evaluating(model):
            for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
                logits = model(self.normalise(x))
                loss = loss + F.cross_entropy(logits, y, reduction="sum")
                right = right + (logits.argmax(1) == y).sum()
        return {"loss": loss / len(labels), "accuracy": right / len(labels)}

    @property
    def worst(self) -> float:
        return 1 / self.source.classes

    @property
    def initial_loss(self) -> float:
        return math.log(self.source.classes)
