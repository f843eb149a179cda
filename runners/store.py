"""The store of results: one directory a run, published whole.

    <store>/<id>/            a finished run: done or diverged
        summary.json         status, metrics, what planning reads; with digests of the other files
        config.yaml          the resolved config
        provenance.json      code, versions, device, data fingerprint
        history.parquet      one row a step
    <store>/.claims/<id>     somebody trains this run: an exclusively created file, touched as a heartbeat
    <store>/.errors/<id>.json       the last attempt failed; it will be tried again
    <store>/.checkpoints/<id>.pt    where an interrupted run goes on
    <store>/.aside/          results set aside: they could not be read, or lacked a probe
    <store>/.building/       directories not yet published

A result appears by one rename of a finished, fsynced directory, which fails if the result exists. So a result
is never half there and never there twice, on a network file system too and however many sweeps share it.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from runners.config import UserError

Status = Literal["incomplete", "done", "diverged", "error", "interrupted"]
FINISHED: tuple[Status, ...] = ("done", "diverged")

HEARTBEAT = 10.0
"""Seconds between touches of a claim."""
STALE = 120.0
"""Seconds without a heartbeat after which a claim is taken over: its owner is dead or cut off."""

ABANDONED = 24 * 3600.0
"""Seconds after which a directory that was never published is removed."""

_SUMMARY_KEYS = {"id", "status", "metrics", "metric", "worst", "higher_is_better", "steps", "probes", "digests"}


class Damaged(Exception):
    """A result that cannot be read; the text names the file."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its summary and history, and what describes it."""

    summary: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]
    tables: dict[str, pd.DataFrame]


class Store:
    """The run directories under one folder.

    Raises:
        UserError: if the folder cannot be written, when it is opened.
    """

    def __init__(self, folder: str | Path) -> None:
        self.root = Path(folder).resolve()
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        try:
            for name in (".claims", ".errors", ".checkpoints", ".aside", ".building"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / ".building" / f"probe.{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to the store {self.root}: {error.strerror}") from None
        for entry in os.scandir(self.root / ".building"):  # left by processes that were killed while publishing
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > ABANDONED:
                    shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)

    # -- results ---------------------------------------------------------------------------------------------

    def summary(self, run_id: str) -> dict[str, Any] | None:
        """The summary of a finished run, or None.

        Raises:
            Damaged: if it is there but cannot be read.
        """
        folder = f"{self.root}/{run_id}"  # a Path takes as long to make as the file to read
        path = f"{folder}/summary.json"
        try:
            with open(path, "rb") as file:
                value = json.loads(file.read())
        except FileNotFoundError:
            if os.path.exists(folder):
                raise Damaged(path) from None
            return None
        except (OSError, ValueError):
            raise Damaged(path) from None
        if not isinstance(value, dict) or not value.keys() >= _SUMMARY_KEYS or value["id"] != run_id:
            raise Damaged(path)
        return value

    def status(self, run_id: str) -> Status:
        """Where a run stands. ``incomplete`` is one that was never finished and never failed."""
        summary = self.summary(run_id)
        if summary is not None:
            return summary["status"]
        if (self.root / ".errors" / f"{run_id}.json").exists():
            return "error"
        if (self.root / ".checkpoints" / f"{run_id}.pt").exists():
            return "interrupted"
        return "incomplete"

    def result(self, run_id: str) -> Result:
        """Everything a finished run left, checked against the digests in its summary.

        Raises:
            Damaged: if a file is missing or not what was written.
        """
        summary, files = self.files(run_id)
        tables = {
            name.removesuffix(".parquet"): pd.read_parquet(io.BytesIO(content))
            for name, content in files.items()
            if name.endswith(".parquet")
        }
        return Result(summary, config_of(files["config.yaml"]), json.loads(files["provenance.json"]), tables)

    def files(self, run_id: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        """A finished run's summary and what its other files hold, as ``result`` but not taken apart.

        Raises:
            Damaged: as ``result``.
        """
        folder = self.root / run_id
        summary = self.summary(run_id)
        if summary is None:
            raise Damaged(str(folder))
        files: dict[str, bytes] = {}
        for name, digest in summary["digests"].items():
            try:
                files[name] = (folder / name).read_bytes()
            except OSError:
                raise Damaged(str(folder / name)) from None
            if hashlib.sha256(files[name]).hexdigest() != digest:
                raise Damaged(str(folder / name))
        return summary, files

    def publish(self, result: Result) -> bool:
        """Write a finished run; False if somebody else already had (theirs is kept).

        Raises:
            UserError: if it cannot be written (a full disk, say); nothing is left behind then.
        """
        run_id = result.summary["id"]
        building = self.root / ".building" / f"{run_id}.{secrets.token_hex(4)}"
        try:
            building.mkdir()
            for name, table in result.tables.items():
                table.to_parquet(building / f"{name}.parquet", index=False)
            (building / "config.yaml").write_text(yaml.safe_dump(result.config, sort_keys=False))
            (building / "provenance.json").write_text(json.dumps(result.provenance, indent=1))
            digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(building.iterdir())}
            summary = {**result.summary, "digests": digests}
            (building / "summary.json").write_text(json.dumps(summary, indent=1))
            for path in [*building.iterdir(), building]:
                _fsync(path)
            os.rename(building, self.root / run_id)
            _fsync(self.root)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise UserError(f"cannot write the result of {run_id} to {self.root}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(building, ignore_errors=True)  # gone already when all went well
        for leftover in (self.root / ".errors" / f"{run_id}.json", self.checkpoint(run_id)):
            leftover.unlink(missing_ok=True)
        return True

    def set_aside(self, run_id: str) -> Path:
        """Move a damaged (or outdated) result out of the way, so that the run is made again; where it went."""
        target = self.root / ".aside" / f"{run_id}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):  # another sweep did it first
            os.rename(self.root / run_id, target)
        return target

    def record_error(self, run_id: str, text: str, config: dict[str, Any]) -> None:
        """Keep what went wrong in the last attempt."""
        write_whole(self.root / ".errors" / f"{run_id}.json", json.dumps({"error": text, "config": config}, indent=1))

    def error(self, run_id: str) -> str:
        """What went wrong in the last attempt."""
        try:
            return str(json.loads((self.root / ".errors" / f"{run_id}.json").read_text())["error"])
        except (OSError, ValueError, KeyError):
            return "unknown"

    def checkpoint(self, run_id: str) -> Path:
        """Where a run keeps its checkpoint."""
        return self.root / ".checkpoints" / f"{run_id}.pt"

    def ids(self) -> list[str]:
        """The ids of all finished runs."""
        return sorted(self.directories())

    def directories(self) -> dict[str, int]:
        """The inode of every finished run's directory, by id: of a result that was replaced it is another."""
        with os.scandir(self.root) as entries:
            return {entry.name: entry.inode() for entry in entries if not entry.name.startswith(".")}

    # -- claims ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, run_id: str) -> Iterator[bool]:
        """Claim a run for the length of the context; False if somebody else has it.

        A stale claim is taken over. Should two ever train the same run, that is wasteful but harmless:
        ``publish`` keeps one result.
        """
        path = self.root / ".claims" / run_id
        if not self._acquire(path):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            if _read(path) == self._owner:  # it may have been taken over while this process was suspended
                path.unlink(missing_ok=True)

    def claimed(self, run_id: str) -> bool:
        """Whether somebody alive is at this run."""
        path = self.root / ".claims" / run_id
        owner = _read(path)
        return owner is not None and not self._stale(path, owner)

    def _acquire(self, path: Path) -> bool:
        for _ in range(2):
            try:
                file = open(path, "x")  # noqa: SIM115 - closed below, and removed if it could not be written
                try:
                    with file:
                        file.write(self._owner)
                except OSError:
                    path.unlink(missing_ok=True)  # an empty claim would stand until it is stale
                    raise
                return True
            except FileExistsError:
                owner = _read(path)
                if owner is None:
                    continue  # released a moment ago
                if not self._stale(path, owner):
                    return False
                # Only one of those who try gets to rename the stale claim.
                grave = self.root / ".building" / f"claim.{secrets.token_hex(4)}"
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, grave)
                    if _read(grave) != owner:  # it was not the stale one any more: give it back
                        with contextlib.suppress(OSError):
                            os.link(grave, path)
                        grave.unlink()
                        return False
                    grave.unlink()
            except OSError as error:
                raise UserError(f"cannot write to the store {self.root}: {error.strerror}") from None
        return False

    def _stale(self, path: Path, owner: str) -> bool:
        host, _, rest = owner.partition(":")
        pid = rest.partition(":")[0]
        if host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
            return True
        try:
            # The file server's clock on both sides: the clocks of two machines may differ.
            probe = self.root / ".building" / f"clock.{secrets.token_hex(4)}"
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
            return now - path.stat().st_mtime > STALE
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"cannot write to the store {self.root}: {error.strerror}") from None

    def _beat(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if _read(path) == self._owner:
                    os.utime(path)


def config_of(text: bytes) -> dict[str, Any]:
    """The config in a run's config.yaml; read by libyaml where there is one, which takes a tenth of the time."""
    config: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return config


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part: beside it, fsynced, renamed.

    Raises:
        UserError: if it cannot be written; the old file is untouched then.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text if isinstance(text, bytes) else text.encode())
        _fsync(part)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
