"""What a task is: data on the device, a model, a loss and a metric.

A task is one file here plus one YAML in conf/task/. Its fields are the schema of that YAML: types and
ranges are checked when it is built. It knows nothing of optimizers or runs.
"""

import abc
import dataclasses
import hashlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

Split = Literal["train", "validation", "test"]

# Every task is a pydantic dataclass with this configuration: an unknown key, a wrong type or a value out
# of range is an error when the task is built, before any data is read.
SCHEMA = ConfigDict(extra="forbid", strict=True)


class Task(abc.ABC):
    """Data + model + loss + metric, with every random choice a function of a seed.

    Use: ``task = Digits(batch_size=64); task.prepare(torch.device("cpu"), data_root=None)``, then
    ``torch.manual_seed(seed); model = task.model()`` and, for step t = 1, 2, ...,
    ``task.loss(model, batch).backward()`` with the batches of ``task.batches(seed)``.

    tests/tasks/test_contract.py holds every task to this page, and to what makes it fit for a study: batches of
    one shape (or of few, see ``one_shape``), a loss at initialisation within 0.7 nats of ``initial_loss``, one
    batch can be overfitted, a model made ``.double()`` works on the same batches (it casts its inputs to the dtype of
    its weights), and the docstring names the metric and describes every field as ``name: ...``.

    Attributes:
        revision: raised when the mathematics or the data preparation changes, so that old results are not
            mistaken for new ones.
        later: fields that were added after results were committed: at its default such a field is left out of a
            run's id, so that the old results stay.
        metric: the key of ``evaluate`` that tables and verdicts use.
        higher_is_better: direction of ``metric``.
        steps: default budget of a run, in optimizer steps.
        one_shape: false where batches differ in shape by their nature, as sentences of similar lengths do: then they
            have few shapes, so that a compiled model is compiled a few times.
    """

    revision: ClassVar[int] = 1
    later: ClassVar[tuple[str, ...]] = ()
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    steps: ClassVar[int]
    one_shape: ClassVar[bool] = True

    def __getstate__(self) -> dict[str, Any]:
        # Pickles as its fields alone: the data is large and prepared anew where it is needed.
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @abc.abstractmethod
    def prepare(self, device: torch.device, data_root: str | None) -> None:
        """Load the data and put all of it on ``device`` as tensors. Must be called once, before the rest."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short digest of the prepared data (its content, not its location): part of a run's id."""

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """A new model on the device, initialised from torch's global generator (the runner seeds it)."""

    @abc.abstractmethod
    def batches(self, seed: int, start: int = 0) -> Iterator[Any]:
        """The training batches of steps start+1, start+2, ... without end.

        The batch of a step is a function of (seed, step) alone, so a resumed run sees what an uninterrupted
        one would have seen. Nothing here waits for the device.
        """

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of one batch: a scalar tensor, in nats where it is a cross-entropy."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        """Every metric over a whole split (never a mean of batch means), as scalar tensors.

        Contains ``loss`` and ``self.metric``. Leaves the model in training mode and its state untouched.
        """

    @property
    @abc.abstractmethod
    def worst(self) -> float:
        """The value of ``metric`` that counts for a diverged run, and that caps every other: chance accuracy,
        or the loss at initialisation (a uniform prediction)."""

    @property
    @abc.abstractmethod
    def initial_loss(self) -> float:
        """Training loss of a uniform prediction, in nats: the runner calls a run diverged far above it."""


def digest(*parts: Tensor | str) -> str:
    """A short content hash of tensors (values, shape, dtype) and strings, the same on every machine."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            h.update(f"{part.dtype}{tuple(part.shape)}".encode())
            h.update(part.detach().cpu().contiguous().numpy().tobytes())
        else:
            h.update(part.encode())
        h.update(b"\0")
    return h.hexdigest()[:16]


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator for one purpose of one run: distinct streams of one seed are independent.

    The numbers are hashed, so neighbouring seeds or epochs do not give related sequences.
    """
    key = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def available() -> dict[str, type[Task]]:
    """Every task by its name: the name of its module, e.g. ``digits_resnet``. Found from the files."""
    found: dict[str, type[Task]] = {}
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{__package__}.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Task)
                and value.__module__ == module.__name__
                and not getattr(value, "__abstractmethods__", None)
            ):
                found[info.name] = value
    return found
