"""CIFAR-10 with a CIFAR ResNet: the image task of the papers."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import to_device
from tasks.images import Batch, Images, ImageSet
from tasks.models.resnet import ResNet
from tasks.task import SCHEMA, generator

PAD = 4
CIFAR10 = ImageSet("cifar10", 10, "img", "label", "https://www.cs.toronto.edu/~kriz/cifar.html", "CIFAR10")


@dataclass(config=SCHEMA)
class Cifar10ResNet(Images):
    """Classify the 32x32 colour images of CIFAR-10 (Krizhevsky, 2009) with the ResNet of He et al. (2015).

    Splits: 45,000 train, 5,000 validation (the tenth of the official training images with the smallest hashes), and
    the official 10,000 test images. Nothing is chosen on the test images: the RAdam authors' code, for one, prints
    the best test accuracy over the epochs, which is higher than the last.

    The budget is 186 epochs of the 45,000 in batches of 128 (the RAdam paper's number; its code trains for 164). Its
    other settings belong to a run: ``decay=milestones`` (a tenth of the rate after 81/186 and 122/186) and
    ``weight_decay=1e-4``. Pixels are normalised by their own mean and standard deviation; a widespread recipe divides
    by .2023, .1994, .2010 instead of .2470, .2435, .2616.

    Metric: ``accuracy`` (share, higher is better), which the papers report; also ``loss`` (nats).

    Fields:
        batch_size: images a step; the remainder of an epoch is left out.
        train_all: train on all 50,000. The validation images are then among them: their accuracy is a training
            accuracy, by which nothing must be chosen. Choose on runs without it, and report the test accuracy.
        depth: layers, 6 blocks + 2; 8 is a small one that the paper does not have.
        augment: pad each training image by 4 black pixels, crop 32x32 at one of the 81 places, and mirror half.
        channels_last: lay images and weights out as N, H, W, C, which tensor cores prefer; equal up to rounding.
    """

    steps: ClassVar[int] = 65_286

    depth: Literal[8, 20, 32, 44, 56, 110] = 20
    augment: bool = True
    channels_last: bool = False

    @property
    def source(self) -> ImageSet:
        return CIFAR10

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        super().prepare(device, data_root)
        images, labels = self.data["train"]
        padded = F.pad(images, (PAD, PAD, PAD, PAD))
        self.data["train"] = Batch(padded[:, :, PAD:-PAD, PAD:-PAD], labels)
        # (N, channels, 9, 9, 32, 32), without a copy: a crop is one entry.
        self.crops = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)

    def model(self) -> nn.Module:
        model = ResNet((self.depth - 2) // 6, classes=self.source.classes).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def normalise(self, images: Tensor) -> Tensor:
        images = super().normalise(images)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def augmented(self, indices: Tensor, rows: Tensor, columns: Tensor, mirrored: Tensor) -> Tensor:
        """Training images at ``indices`` (N,), cropped from ``rows`` and ``columns`` on (0 to 8; 4 is the middle)
        and mirrored where ``mirrored`` is true."""
        images = self.crops[indices, :, rows, columns]
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)

    def view(self, seed: int, epoch: int) -> Callable[[Tensor], Tensor]:
        if not self.augment:
            return super().view(seed, epoch)
        # One draw for the whole epoch: a resumed run needs no replay.
        g, size = generator(seed, epoch, 1), len(self.data["train"].labels)
        rows, columns = to_device(torch.randint(2 * PAD + 1, (2, size), generator=g), self.device)
        mirrored = to_device(torch.rand(size, generator=g) < 0.5, self.device)
        return lambda indices: self.augmented(indices, rows[indices], columns[indices], mirrored[indices])
