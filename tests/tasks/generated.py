"""Tiny data sets in the form of the real ones: noisy images of one pattern a class."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def images(count: int, classes: int, size: int, stream: int, grey: bool = False) -> tuple[Tensor, Tensor]:
    """Images (N, size, size, 3), or (N, size, size) if grey, as uint8, and their classes (N,)."""
    channels = 1 if grey else 3
    patterns = torch.rand(classes, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    noise = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(stream))
    values = 0.8 * F.interpolate(patterns, size=(size, size))[labels] + 0.2 * noise
    pixels = (255 * values).byte().permute(0, 2, 3, 1)
    return (pixels.squeeze(3) if grey else pixels), labels


def write_images(folder: Path, image: str, label: str, classes: int, grey: bool = False) -> None:
    """600 training images in two files and 100 test images, as parquet in the hub's form."""
    folder.mkdir(parents=True)
    for stream, (part, count) in enumerate((("train", 600), ("test", 100)), start=1):
        pixels, labels = images(count, classes, 28 if grey else 32, stream, grey)
        rows = []
        for array in pixels.numpy():
            file = io.BytesIO()
            Image.fromarray(array).save(file, "png")
            rows.append({"bytes": file.getvalue(), "path": None})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({image: pa.array(rows, kind), label: labels.numpy()})
        shards = 2 if part == "train" else 1
        for i in range(shards):
            rows_a_shard = count // shards
            name = f"{part}-{i:05}-of-{shards:05}.parquet"
            pyarrow.parquet.write_table(table.slice(i * rows_a_shard, rows_a_shard), folder / name)


def write_image_folder(folder: Path, classes: int) -> None:
    """Twelve training and three validation images of each class, of different sizes."""
    for stream, (part, each) in enumerate((("train", 12), ("val", 3)), start=1):
        pixels, labels = images(each * classes, classes, 48, stream)
        for i, (array, label) in enumerate(zip(pixels.numpy(), labels.tolist(), strict=True)):
            file = folder / part / f"n{label:03}" / f"{part}_{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array[: 40 + i % 5]).save(file)
