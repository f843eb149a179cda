"""Where real data comes from: files under the data root, else a download; read and tokenised once, then from a cache.

Three sources, in this order: ``find`` looks under the data root; ``fetch`` goes on to the Hugging Face hub (and
tasks/images.py to torchvision's archives); where neither is to be had, ``Missing`` says so in one line. Nothing is
downloaded while HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set.
"""

import functools
import hashlib
import importlib
import os
import pickle
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HUB = "https://huggingface.co"
PATIENCE = 5.0
"""Seconds until a server that does not answer counts as out of reach."""


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
        names = ", ".join(wanted.values())
        raise Missing(f"no data root is set: set data_root or UNTUNED_DATA to a folder that has {folder}/ with {names}")
    found = {part: sorted((Path(root) / folder).glob(pattern)) for part, pattern in wanted.items()}
    for part, files in found.items():
        if not files:
            raise Missing(f"no {wanted[part]} in {Path(root) / folder}: put it there, or set another data root")
    return found


@dataclass(frozen=True)
class Hub:
    """A data set of text on the Hugging Face hub, at one revision.

    Attributes:
        repo: its name there, or a local folder in the hub's layout.
        revision: the commit; a branch will do where ``sha256`` pins every part.
        splits: the hub's split for each part, ``{"train": "train", "valid": "validation"}``.
        line: how a row stands in a local file of the data set, with its line break: what is downloaded is written
            in that form, so that a task reads one form only.
        options: further arguments of ``datasets.load_dataset``, as the configuration (``name``) or ``data_files``.
        sha256: of a part written so; a part that differs is not used.
    """

    repo: str
    revision: str
    splits: Mapping[str, str]
    line: Callable[[Mapping[str, Any]], str]
    options: Mapping[str, Any] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Download every part into ``folder``, one file named after the part."""
        datasets = optional("datasets")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # the library's own copy is not kept
            for part, split in self.splits.items():
                rows = datasets.load_dataset(
                    self.repo, split=split, revision=self.revision, cache_dir=scratch, **self.options
                )
                content = "".join(map(self.line, rows)).encode()
                found = hashlib.sha256(content).hexdigest()
                if found != self.sha256.get(part, found):
                    raise ValueError(f"{part} has SHA-256 {found}, not {self.sha256[part]}")
                (folder / part).write_bytes(content)


def fetch(folder: str, root: str | None, wanted: Mapping[str, str], hub: Hub) -> dict[str, list[Path]]:
    """The files of a data set: those under the data root (as ``find``), else the hub's, once for all in the cache.

    Raises:
        Missing: if neither has them.
    """
    try:
        return find(folder, root, wanted)
    except Missing as local:
        try:
            here = downloaded(f"{folder}-{hub.revision.replace('/', '-')}", HUB, hub.write)
        except Missing as remote:
            raise Missing(f"{local}; {remote}") from None
        return {part: [here / part] for part in wanted}


def downloaded(name: str, url: str, fill: Callable[[Path], None]) -> Path:
    """The folder of downloads of this name, which ``fill`` fills the first time: whole, or not there at all.

    Raises:
        Missing: if it is not there and cannot be had from ``url``: downloads are off, there is no network, or
            ``fill`` fails.
    """
    path = cache_folder() / name
    if path.is_dir():
        return path
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise Missing(f"{name} is not downloaded from {url}, as {switch} is set")
    if reason := unreachable(url):
        raise Missing(f"{name} cannot be downloaded from {url} ({reason})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            fill(whole)
            try:
                whole.rename(path)
            except OSError:
                if not path.is_dir():  # else another process was faster
                    raise
    except Exception as error:  # whatever the libraries raise
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Missing(f"{name} cannot be downloaded from {url} ({text})") from error
    return path


@functools.cache
def unreachable(url: str) -> str:
    """Why a server does not answer; empty if it does. Asked once a process: the libraries try for minutes."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError as error:
        error.close()  # an answer all the same
    except OSError as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def optional(name: str) -> Any:
    """A module of the extra ``data``.

    Raises:
        Missing: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed: pip install {name}, or this project with [data]") from error


def cache_folder() -> Path:
    """The folder UNTUNED_CACHE, else ``untuned`` in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("UNTUNED_CACHE") or user / "untuned")


def cached(purpose: str, inputs: list[Path], options: Any, build: Callable[[], Any]) -> Any:
    """What ``build`` makes of the input files, from the cache if it was made before.

    The key is the content of the files, the purpose (which should name a version of the code that builds) and the
    options. Where nothing can be written, or what is there cannot be read, the value is built anew.

    Args:
        build: returns what ``torch.load(weights_only=True)`` reads: tensors and plain values in dicts and lists.
    """
    h = hashlib.sha256(repr((purpose, options)).encode())
    for path in inputs:
        with path.open("rb") as file:
            h.update(hashlib.file_digest(file, "sha256").digest())
    path = cache_folder() / f"{purpose}-{h.hexdigest()[:16]}.pt"
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
