"""MNIST and EMNIST: where they come from, and the perceptron."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from torch import nn

from tasks.emnist_mlp import EmnistMLP
from tasks.images import read
from tasks.mnist_mlp import MNIST, MnistMLP
from tasks.models.mlp import MLP
from tests.tasks import generated

CPU = torch.device("cpu")


def test_the_network_is_its_formula() -> None:
    model = MLP(12, (5, 7), 3).double()
    x = torch.randn(4, 3, 2, 2)
    y = x.double().flatten(1)
    linears = [module for module in model if isinstance(module, nn.Linear)]
    for i, linear in enumerate(linears):
        y = y @ linear.weight.T + linear.bias
        y = y.clamp(min=0) if i < 2 else y
    torch.testing.assert_close(model(x), y)
    assert sum(p.numel() for p in model.parameters()) == 12 * 5 + 5 + 5 * 7 + 7 + 7 * 3 + 3
    assert len(MLP(12, (), 3)) == 2  # flatten, linear: softmax regression


def test_bfloat16_agrees_loosely(prepared: Callable[..., Any]) -> None:
    task = prepared("mnist_mlp")
    model, batch = task.model(), next(task.batches(0))
    with torch.autocast("cpu", torch.bfloat16):
        half, metrics = task.loss(model, batch), task.evaluate(model, "test")
    assert half.dtype == metrics["loss"].dtype == torch.float32
    assert half.item() == pytest.approx(task.loss(model, batch).item(), rel=0.02)


@pytest.mark.parametrize("fields", [{"hidden": (0,)}, {"hidden": (1.5,)}, {"batch_size": 0}, {"part": "byclass"}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        EmnistMLP(**fields)


def write_idx(file: Path, values: torch.Tensor) -> None:
    """The format of MNIST's own files: type and rank, sizes as big-endian integers, bytes."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">i4").tobytes()
    file.write_bytes(header + values.byte().numpy().tobytes())


@pytest.mark.parametrize(("part", "classes", "first"), [("digits", 10, 0), ("letters", 26, 1), ("balanced", 47, 0)])
def test_emnist_from_torchvisions_files(tmp_path: Path, part: Any, classes: int, first: int) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    raw = tmp_path / f"emnist-{part}" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for stream, (name, count) in enumerate((("train", 470), ("test", 94)), start=1):
        images, labels = generated.images(count, classes, 28, stream, grey=True)
        write_idx(raw / f"emnist-{part}-{name}-images-idx3-ubyte", images.transpose(1, 2).contiguous())
        write_idx(raw / f"emnist-{part}-{name}-labels-idx1-ubyte", labels + first)
    task = EmnistMLP(part=part, batch_size=32)
    task.prepare(CPU, str(tmp_path))
    images, labels = generated.images(94, classes, 28, 2, grey=True)
    assert torch.equal(task.data["test"].images, images[:, None]) and torch.equal(task.data["test"].labels, labels)
    assert len(task.data["train"].labels) == 423 and task.worst == 1 / classes
    assert task.loss(task.model(), next(task.batches(0))).isfinite()


def test_emnist_from_parquet_is_the_same(tmp_path: Path) -> None:
    generated.write_images(tmp_path / "emnist-letters", "image", "label", classes=26, grey=True)
    task = EmnistMLP(part="letters")
    task.prepare(CPU, str(tmp_path))
    images, labels = generated.images(100, 26, 28, 2, grey=True)
    assert torch.equal(task.data["test"].images, images[:, None]) and torch.equal(task.data["test"].labels, labels)


@pytest.fixture(scope="module")
def real(real_data: str) -> MnistMLP:
    task = MnistMLP()
    try:
        task.prepare(CPU, real_data)
    except FileNotFoundError as error:
        pytest.skip(f"no real data: {error}")
    return task


def test_the_real_images_are_mnists(real: MnistMLP, real_data: str) -> None:
    official = read(MNIST, real_data)
    assert official["train"].labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert official["test"].labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert {name: len(split.labels) for name, split in real.data.items()} == {
        "train": 54_000,
        "validation": 6_000,
        "test": 10_000,
    }
    assert real.mean.item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert real.std.item() / 255 == pytest.approx(0.3081, abs=5e-5)
    assert real.fingerprint() == "FINGERPRINT"  # of the exact images: the same whichever source they come from


def test_the_perceptron_learns_the_real_images(real: MnistMLP) -> None:
    model = real.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for batch in itertools.islice(real.batches(0), 200):
        optimizer.zero_grad()
        real.loss(model, batch).backward()
        optimizer.step()
    assert real.evaluate(model, "test")["accuracy"] > 0.92
