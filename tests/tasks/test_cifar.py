"""CIFAR: where it comes from, the splits, the augmentation, and the ResNets."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import images as module
from tasks import sources
from tasks.cifar10_resnet import CIFAR10, Cifar10ResNet
from tasks.cifar100_resnet import CIFAR100, Cifar100ResNet
from tasks.images import Batch, held_out, read
from tasks.models.resnet import ResNet
from tasks.sources import Missing
from tests.tasks import generated

CPU = torch.device("cpu")


@pytest.fixture
def task(prepared: Callable[..., Any]) -> Cifar10ResNet:
    task: Cifar10ResNet = prepared("cifar10_resnet")
    return copy.copy(task)


def keys(images: Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in images]


# The network.


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_depths_have_the_papers_sizes(task: Cifar10ResNet, depth: Any, parameters: int) -> None:
    model = Cifar10ResNet.model(_with(task, depth=depth))
    assert sum(p.numel() for p in model.parameters()) == parameters  # He et al.: .27, .46, .66, .85, 1.7 million
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    assert isinstance(model, ResNet) and model.stem.weight.shape == (16, 3, 3, 3)


def test_a_hundred_classes(prepared: Callable[..., Any]) -> None:
    task = prepared("cifar100_resnet", depth=20)
    assert isinstance(task, Cifar100ResNet) and task.worst == 0.01
    assert sum(p.numel() for p in task.model().parameters()) == 269_722 + 90 * 65


def _with(task: Cifar10ResNet, **fields: Any) -> Cifar10ResNet:
    changed = copy.copy(task)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


# The splits.


def test_splits_share_no_image(task: Cifar10ResNet, prepared: Callable[..., Any]) -> None:
    splits = {name: keys(split.images) for name, split in task.data.items()}
    assert {name: len(split) for name, split in splits.items()} == {"train": 540, "validation": 60, "test": 100}
    assert len({key for split in splits.values() for key in split}) == 700
    everything = prepared("cifar10_resnet", train_all=True)
    assert sorted(keys(everything.data["train"].images)) == sorted(splits["train"] + splits["validation"])
    assert keys(everything.data["validation"].images) == splits["validation"]
    assert everything.fingerprint() == task.fingerprint()


def test_the_split_does_not_depend_on_the_order() -> None:
    images, _ = generated.images(50, 5, 8, stream=1)
    order = torch.randperm(50)
    first, second = images[held_out(images)], images[order][held_out(images[order])]
    assert len(first) == 5 and sorted(keys(first)) == sorted(keys(second))


# The augmentation.


def test_crops_and_mirrors_are_torchs(task: Cifar10ResNet) -> None:
    images = task.data["train"].images[:3]
    padded = F.pad(images, (4, 4, 4, 4))
    indices = torch.arange(3)
    for row, column, mirrored in itertools.product(range(9), range(9), (False, True)):
        expected = padded[:, :, row : row + 32, column : column + 32]
        if mirrored:
            expected = expected.flip(-1)
        filled = [torch.full((3,), value) for value in (row, column, mirrored)]
        assert torch.equal(task.augmented(indices, *filled), expected)


def test_offsets_and_mirrors_are_uniform(task: Cifar10ResNet) -> None:
    # Images that say where a pixel was: its row and its column from 1 on, in two channels; 0 is the padding.
    size = len(task.data["train"].labels)
    places = torch.arange(1, 33, dtype=torch.uint8)
    image = torch.stack((places[:, None].expand(32, 32), places[None].expand(32, 32), torch.zeros(32, 32)))
    padded = F.pad(image.byte(), (4, 4, 4, 4)).expand(size, 3, 40, 40)
    task.crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)
    counts = torch.zeros(9, 9, 2)
    for epoch in range(30):
        seen = task.view(5, epoch)(torch.arange(size))
        mirrored = (seen[:, 1, 16, 16] > seen[:, 1, 16, 17]).long()
        rows = seen[:, 0, 16, 16].long() - 13
        columns = torch.where(mirrored.bool(), seen[:, 1, 16, 15], seen[:, 1, 16, 16]).long() - 13
        counts.index_put_((rows, columns, mirrored), torch.ones(size), accumulate=True)
    expected = 30 * size / 162
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < scipy.stats.chi2.ppf(0.999, 161)


def test_labels_stay_and_an_epoch_is_every_image_once(prepared: Callable[..., Any]) -> None:
    task = prepared("cifar10_resnet", augment=False)
    of = dict(zip(keys(task.normalise(task.data["train"].images)), task.data["train"].labels.tolist(), strict=True))
    batches = list(itertools.islice(task.batches(0), 540 // 16))
    seen = [key for batch in batches for key in keys(batch.images)]
    assert len(seen) == len(set(seen)) == 528
    assert [of[key] for key in seen] == [label for batch in batches for label in batch.labels.tolist()]


def test_pixels_are_normalised_by_all_official_training_images(prepared: Callable[..., Any]) -> None:
    task = prepared("cifar10_resnet", train_all=True)
    pixels = task.normalise(task.data["train"].images).double()
    for channel in pixels.unbind(1):
        assert abs(channel.mean()) < 1e-6 and abs(channel.var(correction=0) - 1) < 1e-6


# Loss and evaluation.


def test_evaluation_equals_one_image_at_a_time(task: Cifar10ResNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 37)  # the last part is shorter
    model = task.model().double()
    for batch in itertools.islice(task.batches(0), 3):
        model(batch.images)  # moves the statistics of BatchNorm
    metrics = task.evaluate(model, "test")
    model.eval()
    logits = [model(task.normalise(image[None])) for image in task.data["test"].images]
    labels = task.data["test"].labels
    losses = [F.cross_entropy(row, label[None]).item() for row, label in zip(logits, labels, strict=True)]
    assert metrics["loss"].item() == pytest.approx(sum(losses) / 100, rel=1e-9)
    right = [row.argmax().item() == label.item() for row, label in zip(logits, labels, strict=True)]
    assert metrics["accuracy"].item() == pytest.approx(sum(right) / 100)


def test_bfloat16_agrees_loosely(task: Cifar10ResNet) -> None:
    model = task.model()
    batch = next(task.batches(0))
    loss = task.loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half, metrics = task.loss(model, batch), task.evaluate(model, "test")
    assert half.dtype == metrics["loss"].dtype == metrics["accuracy"].dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), rel=0.02) and half != loss
    assert metrics["loss"].item() == pytest.approx(task.evaluate(model, "test")["loss"].item(), rel=0.02)


def test_channels_last_is_only_a_layout(task: Cifar10ResNet, prepared: Callable[..., Any]) -> None:
    other = prepared("cifar10_resnet", channels_last=True)
    model = task.model()
    twin = other.model()
    twin.load_state_dict(model.state_dict())
    batch, laid_out = next(task.batches(0)), next(other.batches(0))
    assert torch.equal(batch.images, laid_out.images)
    for tensor in (laid_out.images, twin.stem.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    model.double(), twin.double()
    losses = [t.loss(m, b) for t, m, b in ((task, model, batch), (other, twin, laid_out))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for loss in losses:
        loss.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


# Where the images come from.


def test_bad_fields() -> None:
    for fields in ({"depth": 21}, {"batch_size": 0}, {"train_all": 1}, {"channels_last": "yes"}):
        with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
            Cifar10ResNet(**fields)  # type: ignore[arg-type]


def test_labels_of_another_data_set_are_an_error(tmp_path: Path) -> None:
    generated.write_images(tmp_path / "cifar10", "img", "label", classes=11)
    with pytest.raises(ValueError, match="cifar10: the train labels are not 0 to 9"):
        Cifar10ResNet().prepare(CPU, str(tmp_path))


class Archive:
    """Stands for torchvision's CIFAR10: it has what was downloaded into its folder, and nothing else."""

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        if download:
            (root / "archive").touch()
        if not (root / "archive").exists():
            raise RuntimeError("Dataset not found or corrupted")
        images, labels = generated.images(60 if train else 20, 10, 32, stream=train)
        self.data, self.targets = images.numpy(), labels.tolist()


def test_torchvisions_files_come_second_and_a_download_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")
    monkeypatch.setattr(datasets, "CIFAR10", Archive)
    monkeypatch.setenv("UNTUNED_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    (root / "cifar10").mkdir(parents=True)
    with pytest.raises(Missing) as error:
        read(CIFAR10, str(root))
    assert str(error.value) == (
        f"no train*.parquet in {root / 'cifar10'}: put it there, or set another data root; torchvision-CIFAR10 is "
        f"not downloaded from {CIFAR10.url}, as HF_HUB_OFFLINE is set"
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(sources, "unreachable", lambda url: "")
    expected = generated.images(60, 10, 32, stream=1)[0].permute(0, 3, 1, 2)
    for data_root in (None, str(root)):
        assert torch.equal(read(CIFAR10, data_root)["train"].images, expected)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["torchvision-CIFAR10"]
    (root / "cifar10" / "archive").touch()
    monkeypatch.setattr(module, "downloaded", None)  # not needed any more
    parts = read(CIFAR10, str(root))
    assert torch.equal(parts["train"].images, expected)
    assert parts["test"].labels.dtype == torch.int64 and len(parts["test"].labels) == 20


def test_parquet_images_are_what_was_written(prepared: Callable[..., Any], data_root: Callable[[str], str]) -> None:
    for source in (CIFAR10, CIFAR100):
        parts = read(source, data_root(f"{source.folder}_resnet"))
        for stream, (part, count) in enumerate((("train", 600), ("test", 100)), start=1):
            images, labels = generated.images(count, 10, 32, stream)
            assert torch.equal(parts[part].images, images.permute(0, 3, 1, 2))  # type: ignore[index]
            assert torch.equal(parts[part].labels, labels)  # type: ignore[index]


@pytest.fixture(scope="module")
def real(real_data: str) -> Cifar10ResNet:
    task = Cifar10ResNet(depth=8, batch_size=32)
    try:
        task.prepare(CPU, real_data)
    except FileNotFoundError as error:
        pytest.skip(f"no real data: {error}")
    return task


def test_the_real_images_are_cifar10s(real: Cifar10ResNet) -> None:
    assert {name: len(split.labels) for name, split in real.data.items()} == {
        "train": 45_000,
        "validation": 5_000,
        "test": 10_000,
    }
    counts = {name: torch.bincount(split.labels) for name, split in real.data.items()}
    assert counts["test"].tolist() == [1000] * 10
    assert (counts["train"] + counts["validation"]).tolist() == [5000] * 10
    assert counts["validation"].min() > 430  # of 500 expected, ±3.3 standard deviations
    assert real.data["test"].labels[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, aeroplane, frog
    # The means and deviations that everybody uses.
    assert (real.mean.flatten() / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert (real.std.flatten() / 255).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)


def test_resnet8_learns_on_the_real_images(real: Cifar10ResNet) -> None:
    model = real.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for batch in itertools.islice(real.batches(0), 60):
        optimizer.zero_grad()
        loss = real.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 2.05
    real = copy.copy(real)
    real.data = {**real.data, "test": Batch(*(part[:500] for part in real.data["test"]))}
    assert real.evaluate(model, "test")["accuracy"] > 0.2
