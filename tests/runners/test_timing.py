"""Step times: all arms take turns, and what was measured is not measured again."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from runners import timing
from runners.collect import STEP_TIMES
from runners.store import Store
from runners.timing import Stepper, write_step_times
from tests.runners.conftest import MakeExperiment, sweep_of

CPU = torch.device("cpu")
PLAN = {"lrs": (0.1, 1.0), "tuning_seeds": 1, "test_seeds": 1}
ARMS = {"adam": ("optimizer=adam",), "koala": ("optimizer=koalav",)}


def test_every_arm_is_timed_once_in_turn_and_the_fastest_turn_counts(
    tiny_experiment: MakeExperiment, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []

    def seconds(self: Stepper, steps: int) -> float:
        turns.append(type(self.optimizer).__name__)
        return {"Adam": 0.002, "KoalaV": 0.003}[turns[-1]] * (1 + len(turns))  # the machine slows down

    monkeypatch.setattr(Stepper, "seconds", seconds)
    design = sweep_of(tiny_experiment(ARMS, PLAN, reference=None, claims={}), store).design
    write_step_times(design, CPU, tmp_path)
    table = pd.read_csv(tmp_path / STEP_TIMES)
    assert list(table.arm) == ["adam", "koala"] and set(table.task) == {"tiny"}
    assert turns[2:] == ["Adam", "KoalaV"] * timing.ROUNDS  # after one to warm up, each
    assert list(table.step_ms) == pytest.approx([1000 * 0.002 * 4, 1000 * 0.003 * 5])
    turns.clear()
    write_step_times(design, CPU, tmp_path)
    assert not turns
    more = tiny_experiment(
        {**ARMS, "again": ("optimizer=adam", "optimizer.beta2=0.9")}, PLAN, reference=None, claims={}
    )
    write_step_times(sweep_of(more, store).design, CPU, tmp_path)  # an arm is new: all are timed again, side by side
    assert len(pd.read_csv(tmp_path / STEP_TIMES)) == 3


def test_a_stepper_trains(tiny_experiment: MakeExperiment, store: Store) -> None:
    run = sweep_of(tiny_experiment(ARMS, PLAN, reference=None, claims={}), store).design.base["adam", "tiny"]
    stepper = Stepper(run)
    before = [p.detach().clone() for p in stepper.model.parameters()]
    assert stepper.seconds(3) > 0
    assert not any(torch.equal(p, old) for p, old in zip(stepper.model.parameters(), before, strict=True))
    assert {stepper.optimizer.state[p]["step"] for p in stepper.model.parameters()} == {5}


def test_the_table_says_where_it_was_measured(tiny_experiment: MakeExperiment, store: Store, tmp_path: Path) -> None:
    sweep = sweep_of(tiny_experiment(ARMS, PLAN, reference=None, claims={}), store)
    write_step_times(sweep.design, CPU, tmp_path)
    table = pd.read_csv(tmp_path / STEP_TIMES)
    assert (table.step_ms > 0).all() and set(table.columns) == {"task", "arm", "step_ms", "device_name", "torch"}
