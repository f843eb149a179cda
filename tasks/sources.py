"""Where real data comes from: files under the data root, read and tokenised once, then from a cache."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Missing(FileNotFoundError):
    """Data that is nowhere to be had; the text says in one line what was looked for, where, and what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


def find(folder: str, root: str | None, wanted: Mapping[str, str]) -> dict[str, list[Path]]:
    """The files of a data set under the data root.

    Args:
        folder: the data set's folder under the root.
        root: the data root in force, None if none is set.
        wanted: a glob pattern for each part, ``{"train": "train-*.parquet"}``.

    Raises:
        Missing: if a part has no file.
    """
    if root is None:
        raise Missing(f"no data root is set: set data_root or UNTUNED_DATA to a folder that has {folder}/")
    found = {part: sorted((Path(root) / folder).glob(pattern)) for part, pattern in wanted.items()}
    for part, files in found.items():
        if not files:
            raise Missing(f"no {wanted[part]} in {Path(root) / folder}")
    return found


def cached(purpose: str, inputs: list[Path], options: Any, build: Callable[[], Any]) -> Any:
    """What ``build`` makes of the input files, from the cache if it was made before.

    The key is the content of the files, the purpose (which should name a version of the code that builds) and the
    options. The cache is the folder UNTUNED_CACHE, else ``untuned`` in the user's cache folder; where nothing can
    be written, or what is there cannot be read, the value is built anew.

    Args:
        build: returns what ``torch.load(weights_only=True)`` reads: tensors and plain values in dicts and lists.
    """
    h = hashlib.sha256(repr((purpose, options)).encode())
    for path in inputs:
        with path.open("rb") as file:
            h.update(hashlib.file_digest(file, "sha256").digest())
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("UNTUNED_CACHE") or user / "untuned") / f"{purpose}-{h.hexdigest()[:16]}.pt"
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        value = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                torch.save(value, file)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except (OSError, RuntimeError):
        pass  # a full or read-only disk: slower, not wrong
    return value
