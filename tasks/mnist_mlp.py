"""MNIST with a multilayer perceptron: for the magnitude of updates."""

from typing import Annotated, ClassVar

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import nn

from tasks.images import Images, ImageSet
from tasks.models.mlp import MLP
from tasks.task import SCHEMA

MNIST = ImageSet("mnist", 10, "image", "label", "https://ossci-datasets.s3.amazonaws.com/mnist/", "MNIST")


@dataclass(config=SCHEMA)
class MnistMLP(Images):
    """Classify the 28x28 grey digits of MNIST (LeCun et al., 1998) with a multilayer perceptron, without augmentation:
    a network small enough to look at every coordinate of every update.

    Splits: 54,000 train, 6,000 validation (the tenth of the official training images with the smallest hashes), and
    the official 10,000 test images. The budget is ten epochs.

    Metric: ``accuracy`` (share, higher is better), which the papers report; also ``loss`` (nats).

    Fields:
        batch_size: images a step; the remainder of an epoch is left out.
        train_all: train on the validation images too; their accuracy is then a training accuracy.
        hidden: units of each hidden layer.
    """

    steps: ClassVar[int] = 4210

    hidden: tuple[Annotated[int, Strict(), Field(ge=1)], ...] = Field(default=(256,), strict=False)

    @property
    def source(self) -> ImageSet:
        return MNIST

    def model(self) -> nn.Module:
        return MLP(self.size.numel(), self.hidden, self.source.classes).to(self.device)
