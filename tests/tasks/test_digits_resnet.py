"""Digits: the splits, the shifts, and the ResNet."""

import itertools
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.digits_resnet import DigitsResNet, read
from tasks.models.resnet import Block, ResNet


def test_splits_are_disjoint_and_stratified() -> None:
    splits = read()
    images = [image.numpy().tobytes() for split in splits.values() for image in split.images]
    assert len(images) == len(set(images)) == 1797
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 1197,
        "validation": 300,
        "test": 300,
    }
    for name in ("validation", "test"):
        assert torch.bincount(splits[name].labels).tolist() == [30] * 10


def test_the_data_is_scikit_learns(prepared: Callable[..., Any]) -> None:
    # The file is part of scikit-learn and has not changed in years: the same on every machine.
    assert prepared("digits_resnet").fingerprint() == "09a9bb547c58c999"


def test_training_pixels_are_normalised(prepared: Callable[..., Any]) -> None:
    images = prepared("digits_resnet").data["train"].images[:, 1:-1, 1:-1]
    assert images.mean().abs() < 1e-5 and (images.std() - 1).abs() < 1e-5


def test_shifts_are_uniform_and_labels_stay(prepared: Callable[..., Any]) -> None:
    task = prepared("digits_resnet")
    padded, labels = task.data["train"]
    known = {
        padded[i, r : r + 8, c : c + 8].numpy().tobytes(): (i, r, c)
        for i, r, c in itertools.product(range(len(labels)), range(3), range(3))
    }
    counts = dict.fromkeys(itertools.product(range(3), range(3)), 0)
    batches = itertools.islice(task.batches(0), 300)
    for images, classes in batches:
        for image, label in zip(images, classes, strict=True):
            i, r, c = known[image.numpy().tobytes()]
            assert label == labels[i]
            counts[r, c] += 1
    total = sum(counts.values())
    statistic = sum((count - total / 9) ** 2 / (total / 9) for count in counts.values())
    assert statistic < 26.1  # chi-squared, 8 degrees of freedom, p = .001


def test_an_epoch_without_augmentation_is_the_images_once(prepared: Callable[..., Any]) -> None:
    task = prepared("digits_resnet", augment=False)
    known = {image.numpy().tobytes() for image in task.data["train"].images[:, 1:-1, 1:-1].contiguous()}
    batches = list(itertools.islice(task.batches(0), 1197 // 32))
    seen = [image.numpy().tobytes() for batch in batches for image in batch.images]
    assert len(seen) == len(set(seen)) and set(seen) <= known


def test_evaluation_equals_one_image_at_a_time(prepared: Callable[..., Any]) -> None:
    task = prepared("digits_resnet")
    model = task.model().double()
    for batch in itertools.islice(task.batches(0), 3):
        model(batch.images)  # moves the statistics of BatchNorm
    metrics = task.evaluate(model, "test")
    losses, right = [], []
    model.eval()
    for image, label in zip(*task.data["test"], strict=True):
        logits = model(image[None, None, 1:-1, 1:-1])
        losses.append(F.cross_entropy(logits, label[None]).item())
        right.append(logits.argmax().item() == label.item())
    assert metrics["loss"].item() == pytest.approx(sum(losses) / 300, rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(sum(right) / 300)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"width": 0}, {"blocks": "two"}, {"augment": 3}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        DigitsResNet(**fields)


def test_a_batch_larger_than_the_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size=1198 is larger than the training split"):
        DigitsResNet(batch_size=1198).prepare(torch.device("cpu"), None)


def test_resnet20_is_the_papers() -> None:
    model = ResNet(blocks=3)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 19
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    for convolution in convolutions:
        std = (2 / (9 * convolution.out_channels)) ** 0.5
        assert convolution.weight.std().item() == pytest.approx(std, rel=0.15)


def test_the_shortcut_is_option_a() -> None:
    block = Block(4, 8, stride=2)
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()
