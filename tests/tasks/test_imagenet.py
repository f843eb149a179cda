"""The image folder: its order, its augmentation, and what identifies it."""

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tasks.imagenet_resnet import MEAN, STD, ImagenetResNet
from tasks.sources import Missing
from tasks.task import generator
from tests.tasks import generated

transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"batch_size": 8, "crop": 32, "resize": 36, "held_out": 0.25}


@pytest.fixture
def task(prepared: Callable[..., Any]) -> ImagenetResNet:
    task: ImagenetResNet = prepared("imagenet_resnet")
    return copy.copy(task)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generated.write_image_folder(tmp_path / "imagenet", classes=4)
    return tmp_path / "imagenet"


def fingerprint(folder: Path) -> str:
    task = ImagenetResNet(**SMALL)
    task.prepare(CPU, str(folder.parent))
    return task.fingerprint()


def pixels(images: Tensor) -> Tensor:
    """The bytes before they were normalised."""
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (MEAN, STD))
    return (images * std + mean).round().byte()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later, where torch has threads
def test_order_and_augmentation_do_not_depend_on_the_workers(task: ImagenetResNet) -> None:
    alone = list(itertools.islice(task.batches(3), 7))  # into the second epoch of 36 images
    task.workers = 2
    assert task.fingerprint()
    for start in (0, 5):
        together = list(itertools.islice(task.batches(3, start), 7 - start))
        for a, b in zip(alone[start:], together, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_a_sweeps_worker_reads_by_itself(task: ImagenetResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    expected = next(task.batches(0)).images
    task.workers = 2
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert torch.equal(next(task.batches(0)).images, expected)


def test_an_image_is_augmented_with_its_own_seed(task: ImagenetResNet) -> None:
    augment = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()])
    to_tensor = transforms.PILToTensor()
    (batch,) = itertools.islice(task.batches(7, start=4), 1)  # the first of the second epoch
    order = torch.randperm(len(task.samples["train"]), generator=generator(7, 1)).tolist()
    for seen, label, i in zip(pixels(batch.images), batch.labels, order[:8], strict=True):
        file, expected_label = task.samples["train"][i]
        torch.manual_seed(generator(7, 1, 1, i).initial_seed())
        assert torch.equal(seen, to_tensor(augment(Image.open(file)))) and label == expected_label


def test_held_out_images_are_cut_from_the_middle(task: ImagenetResNet) -> None:
    (batch,) = task.stream("test", [[(i, None) for i in range(12)]])
    for seen, (file, _) in zip(pixels(batch.images), task.samples["test"], strict=True):
        image = transforms.functional.center_crop(transforms.functional.resize(Image.open(file), 36), [32, 32])
        assert torch.equal(seen, transforms.functional.pil_to_tensor(image))


def test_splits_share_no_file(task: ImagenetResNet) -> None:
    assert {name: len(samples) for name, samples in task.samples.items()} == {"train": 36, "validation": 12, "test": 12}
    files = [file for samples in task.samples.values() for file, _ in samples]
    assert len(set(files)) == 60
    assert all(Path(file).parent.name == f"n{label:03}" for samples in task.samples.values() for file, label in samples)
    assert {Path(file).parent.parent.name for file, _ in task.samples["test"]} == {"val"}


def test_evaluation_is_over_the_whole_split(task: ImagenetResNet) -> None:
    model = task.model().double()
    metrics = task.evaluate(model, "test")  # 12 images in batches of 8
    task.batch_size = 12
    whole = task.evaluate(model, "test")
    assert metrics["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-9)
    assert metrics["accuracy"] == whole["accuracy"]


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (50, 25_557_032)])
def test_sizes_are_torchvisions(task: ImagenetResNet, depth: Any, parameters: int) -> None:
    task.depth, task.classes, task.device = depth, 1000, torch.device("meta")
    assert sum(p.numel() for p in task.model().parameters()) == parameters


def test_the_fingerprint_is_of_names_and_sizes(folder: Path) -> None:
    first = fingerprint(folder)
    file = folder / "train" / "n000" / "train_000.png"
    os.utime(file, (0, 0))
    assert fingerprint(folder) == first
    moved = folder.parent / "elsewhere" / "imagenet"
    moved.parent.mkdir()
    folder.rename(moved)
    assert fingerprint(moved) == first
    file = moved / "train" / "n000" / "train_000.png"
    file.write_bytes(file.read_bytes() + b"\0")
    second = fingerprint(moved)
    file.rename(file.with_name("train_999.png"))
    assert len({first, second, fingerprint(moved)}) == 3


def test_a_wrong_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Missing, match=r"no train/\*/ in .*nowhere.imagenet: put it there"):
        ImagenetResNet().prepare(CPU, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="batch_size=256 is larger than the training split"):
        ImagenetResNet(held_out=0.25).prepare(CPU, str(tmp_path))
    with pytest.raises(ValueError, match="resize=40 is smaller than crop=224"):
        ImagenetResNet(resize=40).prepare(CPU, str(tmp_path))
    (folder / "val" / "n000").rename(folder / "val" / "n009")
    with pytest.raises(ValueError, match="train/ and val/ have different class folders"):
        ImagenetResNet(**SMALL).prepare(CPU, str(tmp_path))
