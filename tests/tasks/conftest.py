"""Prepared tasks, made once; those on real data where there is a data root, and never by a download."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.task import Task, available

TRANSLATION: dict[str, Any] = {
    "vocabulary": 500, "max_tokens": 512, "layers": 1, "width": 32, "heads": 2, "hidden": 64, "dropout": 0.0,
    "label_smoothing": 0.0, "decode": 4, "beam": 2,
}  # fmt: skip

# Smaller than the defaults, where these would cost seconds; a task that is not here runs as it is.
SMALL: dict[str, dict[str, Any]] = {
    "digits_resnet": {"batch_size": 32},
    "iwslt14_transformer": TRANSLATION,
    "multi30k_transformer": TRANSLATION,
    "phrases_transformer": {"batch_size": 16, "layers": 1, "decode": 20},
    "pydocs_lstm": {"batch_size": 8, "bptt": 10, "width": 32},
}

BESIDE = Path(__file__).parents[3] / "shared" / "data"  # a data root beside the checkout
DATA = os.environ.get("UNTUNED_DATA") or (str(BESIDE) if BESIDE.is_dir() else None)


@pytest.fixture(autouse=True, scope="session")
def no_downloads() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def data_root() -> str | None:
    """The data root that the tests use."""
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
def _prepared(name: str, options: tuple[tuple[str, Any], ...]) -> Task:
    task = available()[name](**{**SMALL.get(name, {}), **dict(options)})
    try:
        task.prepare(torch.device("cpu"), DATA)
    except FileNotFoundError as error:
        pytest.skip(f"no data for {name}: {error}")
    return task


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Any]:
    """The task of a name, prepared on the CPU, with some fields."""

    def get(name: str, **options: Any) -> Any:
        return _prepared(name, tuple(sorted(options.items())))

    return get
