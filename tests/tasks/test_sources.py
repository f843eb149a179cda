"""Where data comes from: the data root, the hub, the cache, and the one line where there is nothing."""

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import sources
from tasks.sources import Hub, Missing, cached, downloaded, fetch, find, optional, unreachable

PARTS = {"train": "train*.txt", "valid": "valid.txt"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and no network: every server is out of reach."""
    monkeypatch.setenv("UNTUNED_CACHE", str(tmp_path / "cache"))
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(switch, raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    unreachable.cache_clear()
    yield tmp_path / "cache"
    unreachable.cache_clear()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Files under the data root.


def test_files_are_found_in_order(tmp_path: Path) -> None:
    files = [write(tmp_path / "text" / name, "") for name in ("train-1.txt", "train-0.txt", "valid.txt")]
    assert find("text", str(tmp_path), PARTS) == {"train": [files[1], files[0]], "valid": [files[2]]}


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "text" / "train.txt", "")
    with pytest.raises(Missing) as error:
        find("text", str(tmp_path), PARTS)
    assert str(error.value) == f"no valid.txt in {tmp_path / 'text'}: put it there, or set another data root"
    with pytest.raises(FileNotFoundError) as unset:
        find("text", None, PARTS)
    assert str(unset.value) == (
        "no data root is set: set data_root or UNTUNED_DATA to a folder that has text/ with train*.txt, valid.txt"
    )


# The hub.


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """A data set in the hub's layout, in a local folder."""
    for split, rows in {"train": ["one two", "three"], "validation": ["four"]}.items():
        write(tmp_path / "repo" / f"{split}.jsonl", "".join(json.dumps({"text": row}) + "\n" for row in rows))
    return Hub(
        str(tmp_path / "repo"),
        "0123abc",
        {"train": "train", "valid": "validation"},
        lambda row: f" {row['text']} \n",
        {"data_files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
        {"valid": "1c90ff9a5c2dbb0f7f9d1a2a1c6f5a6e7a3ae2b6ae5b4e3f3b9c0f0f4f5f6a7b"},
    )


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "unreachable", lambda url: "")


@pytest.mark.usefixtures("reachable")
def test_the_hub_is_written_in_the_local_form(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(**{**vars(hub), "sha256": {}})
    files = fetch("text", None, PARTS, hub)
    assert {part: [f.read_text() for f in found] for part, found in files.items()} == {
        "train": [" one two \n three \n"],
        "valid": [" four \n"],
    }
    assert [entry.name for entry in cache.iterdir()] == ["text-0123abc"]
    assert sorted(entry.name for entry in (cache / "text-0123abc").iterdir()) == ["train", "valid"]
    monkeypatch.setattr(Hub, "write", None)  # what is there is not downloaded again
    assert fetch("text", None, PARTS, hub) == files


@pytest.mark.usefixtures("reachable")
def test_a_wrong_checksum_leaves_nothing(hub: Hub, cache: Path) -> None:
    with pytest.raises(
        Missing, match=r"text-0123abc cannot be downloaded from .* \(valid has SHA-256 [0-9a-f]{64}, not"
    ):
        fetch("text", None, PARTS, hub)
    assert list(cache.iterdir()) == []


def test_local_files_come_first(tmp_path: Path, hub: Hub, cache: Path) -> None:
    for name in ("train.txt", "valid.txt"):
        write(tmp_path / "text" / name, "local")
    assert fetch("text", str(tmp_path), PARTS, hub) == find("text", str(tmp_path), PARTS)
    assert not cache.exists()


def test_neither_source_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Missing) as error:
        fetch("text", None, PARTS, hub)
    assert str(error.value).startswith("no data root is set: ")
    assert str(error.value).endswith("; text-0123abc cannot be downloaded from https://huggingface.co (no network)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Missing, match=r"not downloaded from https://huggingface.co, as HF_HUB_OFFLINE is set"):
        fetch("text", None, PARTS, hub)


def test_a_server_is_asked_once_and_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def late(request: urllib.request.Request, timeout: float) -> None:
        asked.append((request.full_url, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", late)
    assert [unreachable("https://nowhere.test") for _ in range(3)] == ["timed out"] * 3
    assert asked == [("https://nowhere.test", sources.PATIENCE)]


def test_an_answer_of_any_kind_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(request: urllib.request.Request, timeout: float) -> None:
        raise urllib.error.HTTPError(request.full_url, 403, "forbidden", {}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(urllib.request, "urlopen", forbid)
    assert unreachable("https://somewhere.test") == ""


@pytest.mark.usefixtures("reachable")
def test_a_download_is_whole_or_not_there(cache: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "first").write_text("1")
        raise OSError("disk full\nand more")

    with pytest.raises(Missing, match=r"thing cannot be downloaded from https://u.test \(disk full\)$"):
        downloaded("thing", "https://u.test", half)
    assert list(cache.iterdir()) == []

    def other_is_faster(folder: Path) -> None:
        write(cache / "thing" / "first", "theirs")
        (folder / "first").write_text("ours")

    assert (downloaded("thing", "https://u.test", other_is_faster) / "first").read_text() == "theirs"


def test_a_package_that_is_not_installed_is_one_line() -> None:
    with pytest.raises(Missing, match=r"^no_such_package is not installed: pip install no_such_package, or"):
        optional("no_such_package")
    assert optional("json") is json


# The cache.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "input.txt", "content")


class Build:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Any:
        self.calls += 1
        return {"tokens": torch.arange(5), "words": ["a", "b"], "call": self.calls}


def test_a_value_is_built_once(file: Path, cache: Path) -> None:
    build = Build()
    first = cached("test-1", [file], {"size": 3}, build)
    again = cached("test-1", [file], {"size": 3}, build)
    assert build.calls == 1 and torch.equal(first["tokens"], again["tokens"])
    assert first["words"] == again["words"]
    (entry,) = cache.iterdir()  # and no temporary file
    assert entry.name.startswith("test-1-") and entry.suffix == ".pt"


def test_the_key_is_the_content_the_purpose_and_the_options(file: Path, tmp_path: Path) -> None:
    build = Build()

    def get(purpose: str = "test-1", size: int = 3, inputs: tuple[Path, ...] = (file,)) -> int:
        return int(cached(purpose, list(inputs), {"size": size}, build)["call"])

    assert get() == 1
    assert [get("test-2"), get(size=4), get(inputs=(file, file))] == [2, 3, 4]
    moved = write(tmp_path / "elsewhere" / "renamed.txt", "content")
    assert get(inputs=(moved,)) == 1
    file.write_text("other")
    assert get() == 5
    file.write_text("content")
    assert get() == 1


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00.", None])
def test_an_entry_that_cannot_be_read_is_built_anew(file: Path, cache: Path, damage: bytes | None) -> None:
    build = Build()
    cached("test-1", [file], None, build)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:200] if damage is None else damage)
    assert cached("test-1", [file], None, build)["call"] == 2
    assert cached("test-1", [file], None, build)["call"] == 2  # mended
    assert list(cache.iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_is_only_slower(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Build()
    write(cache, "a file where the folder should be")
    assert [cached("test-1", [file], None, build)["call"] for _ in range(2)] == [1, 2]
    cache.unlink()

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    assert cached("test-1", [file], None, build)["call"] == 3
    monkeypatch.undo()
    monkeypatch.setenv("UNTUNED_CACHE", str(cache))
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert cached("test-1", [file], None, build)["call"] == 4
    assert list(cache.iterdir()) == []
