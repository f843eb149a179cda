"""Reading an experiment's committed tables: everything in analysis starts here and nothing here trains."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from analysis.figures import results
from runners.collect import CURVES, STEP_TIMES, records_of
from runners.config import UserError
from runners.experiment import Experiment
from runners.experiment import load as load_experiment


@dataclass(frozen=True)
class Results:
    """The tables of one experiment.

    Attributes:
        name: of the experiment.
        experiment: its YAML, as checked.
        folder: results/<name>.
        runs: one row a cell of the design, see runners.collect.row.
    """

    name: str
    experiment: Experiment
    folder: Path
    runs: pd.DataFrame

    @cached_property
    def curves(self) -> pd.DataFrame:
        """One row a run and step: run, step, lr, warmup, loss, gradient_norm, update_rms."""
        return pd.read_parquet(self.folder / CURVES)

    @cached_property
    def quantiles(self) -> pd.DataFrame:
        """One row a run and measured step: run, step, and quantiles of |update| / peak lr (q10 ... q90).

        Raises:
            UserError: if the experiment does not ask for them.
        """
        try:
            return pd.read_parquet(self.folder / "quantiles.parquet")
        except FileNotFoundError:
            raise UserError(f"{self.name} has no quantiles of updates: set probes.update_quantiles in it") from None

    @cached_property
    def step_times(self) -> pd.DataFrame:
        """One row a task and arm: task, arm, step_ms (see runners.timing).

        Raises:
            UserError: if they were not measured.
        """
        try:
            return pd.read_csv(self.folder / STEP_TIMES)
        except FileNotFoundError:
            raise UserError(f"{self.name} has no {STEP_TIMES}: make sweep EXPERIMENT={self.name}") from None

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The whole configuration of each run."""
        records = records_of(pq.read_schema(self.folder / CURVES))
        return {record["summary"]["id"]: record["config"] for record in records}

    def primary_lr(self, task: str) -> float:
        """The lr at which the claims of a task are tested."""
        tested = self.runs[(self.runs.task == task) & (self.runs.stage == "test")]
        if tested.empty:
            raise UserError(f"{self.name} has no test runs of {task}: make sweep EXPERIMENT={self.name}")
        return float(tested.lr.iloc[0])


def load(name: str) -> Results:
    """The committed results of an experiment.

    Raises:
        UserError: if there are none, naming the command that makes them.
    """
    experiment = load_experiment(name)
    folder = results(name)
    try:
        runs = pd.read_csv(folder / "runs.csv")
    except FileNotFoundError:
        raise UserError(f"{name} has no results yet: make sweep EXPERIMENT={name}") from None
    except pd.errors.EmptyDataError:
        raise UserError(f"{folder / 'runs.csv'} is empty: make sweep EXPERIMENT={name}") from None
    return Results(name, experiment, folder, runs)


def collected() -> list[str]:
    """The experiments that have results, in order of name."""
    return sorted(path.parent.name for path in results().glob("*/runs.csv"))
