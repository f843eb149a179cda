"""Prepared tasks, made once; those on real data where there is a data root, and never by a download."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.task import Task, available
from tests.tasks.corpora import write_billion, write_parallel, write_text
from tests.tasks.generated import write_image_folder, write_images

TRANSLATION: dict[str, Any] = {
    "vocabulary": 500, "max_tokens": 512, "layers": 1, "width": 32, "heads": 2, "hidden": 64, "dropout": 0.0,
    "label_smoothing": 0.0, "decode": 4, "beam": 2,
}  # fmt: skip

# Smaller than the defaults, where these would cost seconds; a task that is not here runs as it is.
SMALL: dict[str, dict[str, Any]] = {
    "cifar100_resnet": {"batch_size": 16, "depth": 8},
    "cifar10_resnet": {"batch_size": 16, "depth": 8},
    "digits_resnet": {"batch_size": 32},
    "emnist_mlp": {"batch_size": 32, "hidden": (32,)},
    "imagenet_resnet": {"batch_size": 8, "crop": 32, "resize": 36, "held_out": 0.25, "workers": 0},
    "mnist_mlp": {"batch_size": 32, "hidden": (32,)},
    "one_billion_word_lstm": {
        "batch_size": 8, "bptt": 8, "embedding": 16, "width": 32, "cutoffs": (8, 20), "dropout": 0.0, "min_count": 2
    },
    "iwslt14_transformer": TRANSLATION,
    "multi30k_transformer": TRANSLATION,
    "phrases_transformer": {"batch_size": 16, "layers": 1, "decode": 20},
    "ptb_lstm": {
        "batch_size": 8, "bptt": 6, "layers": 2, "embedding": 24, "hidden": 32, "dropout": 0.0, "dropout_input": 0.0,
        "dropout_hidden": 0.0, "dropout_embedding": 0.0, "weight_drop": 0.0, "ar": 0.0, "tar": 0.0
    },
    "pydocs_lstm": {"batch_size": 8, "bptt": 10, "width": 32},
    "wikitext_transformer": {
        "batch_size": 8, "context": 12, "layers": 1, "width": 32, "heads": 2, "hidden": 64, "dropout": 0.0,
        "tied": False,
    },
}  # fmt: skip

BESIDE = Path(__file__).parents[3] / "shared" / "data"  # a data root beside the checkout
DATA = os.environ.get("UNTUNED_DATA") or (str(BESIDE) if BESIDE.is_dir() else None)


# Held to the contract on generated data, in the real data's form: it is small, and there on every machine.
GENERATED: dict[str, Callable[[Path], None]] = {
    "cifar100_resnet": lambda root: write_images(root / "cifar100", "img", "fine_label", classes=10),
    "cifar10_resnet": lambda root: write_images(root / "cifar10", "img", "label", classes=10),
    "emnist_mlp": lambda root: write_images(root / "emnist-digits", "image", "label", classes=10, grey=True),
    "imagenet_resnet": lambda root: write_image_folder(root / "imagenet", classes=4),
    "iwslt14_transformer": lambda root: write_parallel(root / "iwslt14", "train", "valid", "test"),
    "mnist_mlp": lambda root: write_images(root / "mnist", "image", "label", classes=10, grey=True),
    "multi30k_transformer": lambda root: write_parallel(root / "multi30k", "train", "val", "test"),
    "one_billion_word_lstm": lambda root: write_billion(root / "one_billion_word"),
    "ptb_lstm": lambda root: write_text(root / "ptb", "ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    "wikitext_transformer": lambda root: write_text(root / "wikitext2", "train.txt", "valid.txt", "test.txt"),
}


@pytest.fixture(autouse=True, scope="session")
def no_downloads(pytestconfig: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("UNTUNED_CACHE", str(pytestconfig.rootpath / ".pytest_cache" / "untuned"))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str | None]:
    """The data root that the tests of a task use."""

    @cache
    def get(name: str) -> str | None:
        if name not in GENERATED:
            return DATA
        root = tmp_path_factory.mktemp(name)
        GENERATED[name](root)
        return str(root)

    return get


@pytest.fixture(scope="session")
def real_data() -> str:
    """The root of the real data."""
    if DATA is None:
        pytest.skip("no real data: UNTUNED_DATA is not set")
    return DATA


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Several would be slower on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@cache
def _prepared(name: str, options: tuple[tuple[str, Any], ...], root: str | None) -> Task:
    task = available()[name](**{**SMALL.get(name, {}), **dict(options)})
    try:
        task.prepare(torch.device("cpu"), root)
    except FileNotFoundError as error:
        pytest.skip(f"no data for {name}: {error}")
    return task


@pytest.fixture(scope="session")
def prepared(data_root: Callable[[str], str | None]) -> Callable[..., Any]:
    """The task of a name, prepared on the CPU, with some fields."""

    def get(name: str, **options: Any) -> Any:
        return _prepared(name, tuple(sorted(options.items())), data_root(name))

    return get
