"""CIFAR-100 with a CIFAR ResNet."""

from pydantic.dataclasses import dataclass

from tasks.cifar10_resnet import Cifar10ResNet
from tasks.images import ImageSet
from tasks.task import SCHEMA

CIFAR100 = ImageSet("cifar100", 100, "img", "fine_label", "https://www.cs.toronto.edu/~kriz/cifar.html", "CIFAR100")


@dataclass(config=SCHEMA)
class Cifar100ResNet(Cifar10ResNet):
    """Classify the 32x32 colour images of CIFAR-100 (Krizhevsky, 2009), in its 100 fine classes, as
    ``cifar10_resnet`` does those of CIFAR-10: the same splits, augmentation, budget and network.

    Metric: ``accuracy`` (share, higher is better); also ``loss`` (nats).

    Fields:
        batch_size: images a step; the remainder of an epoch is left out.
        train_all: train on all 50,000; the validation accuracy is then a training accuracy.
        depth: layers, 6 blocks + 2.
        augment: random crops of the image padded by 4 black pixels, and mirroring.
        channels_last: lay images and weights out as N, H, W, C.
    """

    @property
    def source(self) -> ImageSet:
        return CIFAR100
