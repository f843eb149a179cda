"""Measuring side by side: candidates take turns, so that what else the machine does strikes all of them alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

TURN = 0.05
"""Seconds that one turn lasts at least: many calls of something short."""


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device | None = None) -> float:
    """Seconds of one call: the mean over some, after which the device is waited for."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | None = None,
    turn: float = TURN,
) -> dict[str, list[float]]:
    """Seconds of one call of every candidate, in each of some rounds in which all of them take one turn.

    Each is called twice before, to allocate and compile, and then often enough in a turn to fill ``turn`` seconds.
    Python's garbage collector is off meanwhile: it would strike whoever is at work.
    """
    repeats = {}
    for name, call in candidates.items():
        seconds_of(call, 1, device)
        repeats[name] = max(1, math.ceil(turn / max(seconds_of(call, 1, device), 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in candidates.items():
                found[name].append(seconds_of(call, repeats[name], device))
    finally:
        if collecting:
            gc.enable()
    return found


def fastest(seconds: list[float]) -> float:
    """The fastest turn: what the code costs where nothing else runs."""
    return min(seconds)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as long ours takes: the median over the rounds, in each of which the two were neighbours."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
