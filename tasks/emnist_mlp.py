"""EMNIST with a multilayer perceptron: the update-magnitude analysis of Ma and Yarats (2021)."""

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from tasks.images import ImageSet
from tasks.mnist_mlp import MnistMLP
from tasks.task import SCHEMA

CLASSES = {"digits": 10, "letters": 26, "balanced": 47}


@dataclass(config=SCHEMA)
class EmnistMLP(MnistMLP):
    """Classify the 28x28 grey characters of EMNIST (Cohen et al., 2017) as ``mnist_mlp`` does MNIST's digits.

    Of the official training images (digits 240,000, letters 124,800, balanced 112,800) the tenth with the smallest
    hashes is for validation; the test images are the official ones (40,000, 20,800, 18,800). The budget is about two
    and a half epochs of the digits. Local parquet files lie in ``emnist-<part>/``, upright, with labels from 0;
    torchvision's own files (in ``emnist-<part>/EMNIST/raw``) are transposed, and its letters start at 1.

    Metric: ``accuracy`` (share, higher is better), which the papers report; also ``loss`` (nats).

    Fields:
        batch_size: images a step; the remainder of an epoch is left out.
        train_all: train on the validation images too; their accuracy is then a training accuracy.
        hidden: units of each hidden layer.
        part: digits (10 classes), letters (26, upper and lower case together) or balanced (47).
    """

    steps: ClassVar[int] = 4210

    part: Literal["digits", "letters", "balanced"] = "digits"

    @property
    def source(self) -> ImageSet:
        return ImageSet(
            f"emnist-{self.part}",
            CLASSES[self.part],
            "image",
            "label",
            "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
            "EMNIST",
            {"split": self.part},
            first=int(self.part == "letters"),
            transposed=True,
        )
