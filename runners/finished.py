"""The finished runs of a store, as a sweep knows them."""

import functools
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from runners.config import Probes, Run
from runners.store import FINISHED, Damaged, Store


@dataclass(frozen=True)
class _Known:
    summary: dict[str, Any]
    probes: Probes


class Finished:
    """The summaries of a store's finished runs. Each is read when it is first asked for, and again only if ``look``
    finds another directory in its place: however often a sweep of ten thousand runs asks, it reads what is new."""

    def __init__(self, store: Store, console: Console) -> None:
        self.store, self.console = store, console
        self._directories = store.directories()
        self._known: dict[str, _Known | None] = {}

    def look(self) -> set[str]:
        """See what is in the store now; the ids of the results that have come, gone or been replaced since."""
        before, self._directories = self._directories, self.store.directories()
        changed = {run_id for run_id, _ in before.items() ^ self._directories.items()}
        for run_id in changed:
            self._known.pop(run_id, None)
        return changed

    def summary(self, run_id: str, run: Run) -> dict[str, Any] | None:
        """The summary of a finished run that recorded all that is asked for; a damaged one is set aside."""
        if run_id not in self._directories:
            return None
        if run_id not in self._known:
            self._known[run_id] = self._read(run_id)
        known = self._known[run_id]
        return known.summary if known is not None and _covers(known.probes, run.probes, run.steps) else None

    def _read(self, run_id: str) -> _Known | None:
        try:
            found = self.store.summary(run_id)
        except Damaged as damaged:
            aside = self.store.set_aside(run_id)
            self.console.print(f"{damaged} cannot be read: set aside as {aside}, the run is made again")
            return None
        if found is None or found["status"] not in FINISHED:
            return None
        return _Known(found, Probes(**found["probes"]))


@functools.lru_cache(maxsize=1024)
def _covers(recorded: Probes, wanted: Probes, steps: int) -> bool:
    return recorded.covers(wanted, steps)
