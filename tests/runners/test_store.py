"""The store: a result is whole or not there, is never there twice, and a claim has one owner."""

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners import store as stores
from runners.config import UserError
from runners.store import ABANDONED, STALE, Damaged, Store, write_whole
from tests.runners.conftest import result_of

FULL = OSError(errno.ENOSPC, "No space left on device")
ID = "0123456789abcdef"


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def failing(*_: Any, **__: Any) -> Any:
    raise FULL


# -- results -------------------------------------------------------------------------------------------------


def test_what_is_published_can_be_read(store: Store) -> None:
    given = result_of(ID)
    assert store.status(ID) == "incomplete" and store.summary(ID) is None
    assert store.publish(given) is True
    found = store.result(ID)
    assert {**found.summary, "digests": 0} == {**given.summary, "digests": 0}
    assert (found.config, found.provenance) == (given.config, given.provenance)
    pd.testing.assert_frame_equal(found.tables["history"], given.tables["history"], check_exact=True)
    assert store.status(ID) == "done" and store.ids() == [ID]


def test_a_second_result_is_refused_and_the_first_stays(store: Store) -> None:
    assert store.publish(result_of(ID, loss=0.5)) is True
    assert store.publish(result_of(ID, loss=0.7)) is False
    assert store.result(ID).summary["metrics"]["test"]["loss"] == 0.5
    assert not list((store.root / ".building").iterdir())


STAGES = {
    "tables": (pd.DataFrame, "to_parquet", FULL),
    "texts": (Path, "write_text", FULL),
    "sync": (os, "fsync", OSError(errno.EIO, "Input/output error")),
    "rename": (os, "rename", FULL),
    "without a number": (pd.DataFrame, "to_parquet", OSError("no space, says the library")),
    "interrupted": (os, "fsync", KeyboardInterrupt()),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("before", [False, True], ids=["empty", "published"])
def test_publishing_fails_without_a_trace(
    store: Store, monkeypatch: pytest.MonkeyPatch, stage: str, before: bool
) -> None:
    if before:
        store.publish(result_of(ID, loss=0.5))
    there = files(store.root)
    owner, name, error = STAGES[stage]

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            store.publish(result_of(ID, loss=0.7))
    if isinstance(error, OSError):
        assert (error.strerror or "no space") in str(caught.value) and "\n" not in str(caught.value)
    assert files(store.root) == there and not list((store.root / ".building").iterdir())
    assert store.publish(result_of(ID, loss=0.7)) is not before
    assert store.result(ID).summary["metrics"]["test"]["loss"] == (0.5 if before else 0.7)


def test_a_result_ends_error_and_checkpoint(store: Store) -> None:
    store.record_error(ID, "trace\nlast line", {"lr": 1.0})
    store.checkpoint(ID).write_bytes(b"x")
    assert store.status(ID) == "error" and store.error(ID) == "trace\nlast line"
    (store.root / ".errors" / f"{ID}.json").unlink()
    assert store.status(ID) == "interrupted" and store.error(ID) == "unknown"
    store.record_error(ID, "again", {})
    store.publish(result_of(ID))
    assert store.status(ID) == "done" and not store.checkpoint(ID).exists()
    assert files(store.root) == {
        f"{ID}/{n}" for n in ("summary.json", "config.yaml", "provenance.json", "history.parquet")
    }


def damage(folder: Path, how: str) -> None:
    summary = folder / "summary.json"
    if how == "no summary":
        summary.unlink()
    elif how == "truncated summary":
        summary.write_text(summary.read_text()[:40])
    elif how == "other summary":
        summary.write_text(json.dumps({**json.loads(summary.read_text()), "id": "f" * 16}))
    elif how == "list for summary":
        summary.write_text("[]")
    elif how == "binary summary":
        summary.write_bytes(b"\xff\xfe\x00")
    elif how == "summary without metrics":
        summary.write_text(json.dumps({k: v for k, v in json.loads(summary.read_text()).items() if k != "metrics"}))
    elif how == "no history":
        (folder / "history.parquet").unlink()
    elif how == "altered history":
        data = bytearray((folder / "history.parquet").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "history.parquet").write_bytes(data)
    elif how == "altered config":
        (folder / "config.yaml").write_text("lr: 7\n")


IN_SUMMARY = [
    "no summary",
    "truncated summary",
    "other summary",
    "list for summary",
    "binary summary",
    "summary without metrics",
]


@pytest.mark.parametrize("how", [*IN_SUMMARY, "no history", "altered history", "altered config"])
def test_damage_is_found_named_and_set_aside(store: Store, how: str) -> None:
    store.publish(result_of(ID))
    damage(store.root / ID, how)
    with pytest.raises(Damaged) as caught:
        store.summary(ID) if how in IN_SUMMARY else store.result(ID)
    name = {"no history": "history.parquet", "altered history": "history.parquet", "altered config": "config.yaml"}
    assert str(caught.value) == str(store.root / ID / name.get(how, "summary.json"))
    aside = store.set_aside(ID)
    assert aside.is_dir() and store.status(ID) == "incomplete"
    store.set_aside(ID)  # another sweep did it first: nothing happens
    assert store.publish(result_of(ID)) is True
    store.result(ID)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^cannot write to the store [^\n]*: Not a directory$"):
        Store(tmp_path / "file" / "store")


# -- claims --------------------------------------------------------------------------------------------------


def claim_file(store: Store) -> Path:
    return store.root / ".claims" / ID


def test_a_claim_is_exclusive_and_released(store: Store) -> None:
    other = Store(store.root)
    with store.claim(ID) as mine:
        assert mine and other.claimed(ID)
        with other.claim(ID) as theirs:
            assert not theirs
        assert claim_file(store).exists()  # the loser leaves it alone
        with other.claim("f" * 16) as another:
            assert another
    assert not store.claimed(ID) and not claim_file(store).exists()
    with other.claim(ID) as theirs:
        assert theirs


def test_a_claim_is_released_after_an_exception(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.claim(ID):
        raise ZeroDivisionError
    assert not claim_file(store).exists()


def dead_pid() -> int:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    return child


def test_the_claim_of_a_dead_process_of_this_machine_is_taken_over(store: Store) -> None:
    claim_file(store).write_text(f"{stores.socket.gethostname()}:{dead_pid()}:abc")
    assert not store.claimed(ID)
    with store.claim(ID) as mine:
        assert mine
    assert not list((store.root / ".building").iterdir())


@pytest.mark.parametrize(("age", "stale"), [(0.0, False), (STALE - 30, False), (STALE + 30, True)])
def test_the_claim_of_another_machine_stands_while_its_heart_beats(store: Store, age: float, stale: bool) -> None:
    path = claim_file(store)
    path.write_text("elsewhere:1:abc")
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    assert store.claimed(ID) is not stale
    with store.claim(ID) as mine:
        assert mine is stale
    assert path.exists() is not stale


def test_the_claim_of_a_living_process_of_this_machine_stands(store: Store) -> None:
    claim_file(store).write_text(f"{stores.socket.gethostname()}:{os.getppid()}:abc")
    with store.claim(ID) as mine:
        assert not mine


def test_the_heart_beats(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "HEARTBEAT", 0.01)
    touched = threading.Event()
    utime = os.utime
    monkeypatch.setattr(os, "utime", lambda path: (utime(path), touched.set()))
    with store.claim(ID):
        assert touched.wait(10)


def test_who_lost_his_claim_does_not_release_anothers(store: Store) -> None:
    with store.claim(ID) as mine:
        assert mine
        claim_file(store).write_text("elsewhere:1:abc")  # taken over while this process was suspended
    assert claim_file(store).read_text() == "elsewhere:1:abc"


def test_a_claim_on_a_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115
        file.close()

        class Full:
            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: object) -> None:
                pass

            write = failing

        return Full()

    monkeypatch.setattr(stores, "open", opened, raising=False)
    with pytest.raises(UserError, match="No space left on device"), store.claim(ID):
        pass
    assert not claim_file(store).exists()


@pytest.mark.parametrize("attempt", range(20))
def test_of_two_who_take_over_at_once_at_most_one_owns(store: Store, attempt: int) -> None:
    claim_file(store).write_text("elsewhere:1:abc")
    os.utime(claim_file(store), (1, 1))
    barrier, over = threading.Barrier(2), threading.Barrier(2)
    owned: list[bool] = []

    def take() -> None:
        mine = Store(store.root)
        barrier.wait()
        with mine.claim(ID) as got:
            owned.append(got)
            over.wait()  # nobody releases before both have tried

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(owned) <= 1 and len(owned) == 2
    with store.claim(ID) as mine:
        assert mine


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.one_of(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs"]), max_size=200)))
def test_a_file_is_written_whole(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    path = tmp_path_factory.mktemp("whole") / "new" / "file"
    write_whole(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert files(path.parent) == {"file"}


@pytest.mark.parametrize(("owner", "name"), [(Path, "write_bytes"), (os, "fsync"), (os, "replace")])
def test_the_old_file_stays_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(UserError, match=f"^cannot write {path}: No space left on device$"):
        write_whole(path, "new")
    assert path.read_text() == "old" and files(tmp_path) == {"file"}


def test_what_a_killed_process_left_unpublished_is_removed_in_time(store: Store) -> None:
    building = store.root / ".building"
    for name, age in (("old", ABANDONED + 60), ("new", 60.0)):
        (building / name).mkdir()
        (building / name / "history.parquet").touch()
        then = time.time() - age
        os.utime(building / name, (then, then))
    Store(store.root)
    assert [entry.name for entry in building.iterdir()] == ["new"]
