"""The gradient norms of a finished run, for a decay that is refined from them."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from optimizers.decays import Norm, Refined
from runners.config import ROOT, Run, UserError
from runners.store import Damaged, Store

PROBES: dict[Norm, tuple[str, str]] = {"l1": ("l1_norms", "gradient_l1"), "l2": ("norms", "gradient_norm")}
"""The probe that measures a norm, and the column of the history that holds it."""


def refined(run: Run, store: Store) -> Run:
    """The run, with the gradient norms that its decay is refined from if it is.

    Raises:
        UserError: if the run that the decay names is not there, did not reach its end, or did not record its norms.
    """
    decay = run.decay
    if not isinstance(decay, Refined) or decay.known:
        return run
    try:
        return run.replace(decay=decay.from_norms(_norms(decay.run, decay.norm, store).tolist()))
    except (ValueError, Damaged) as error:
        why = f"{error} cannot be read" if isinstance(error, Damaged) else error
        raise UserError(f"decay (refined): run {decay.run}: {why}") from None


def _norms(run_id: str, norm: Norm, store: Store) -> np.ndarray:
    """The norm of the gradient at every step of a run in the store, else of one in a committed table."""
    summary = store.summary(run_id)
    if summary is not None:
        status, history = summary["status"], store.result(run_id).tables["history"]
    else:
        status, history = _committed(run_id)
    if status != "done":
        raise ValueError(f"it {status}, and only a run that reached its end can be refined from")
    probe, column = PROBES[norm]
    norms = history[column].to_numpy(np.float64) if column in history else np.full(len(history), np.nan)
    if missing := int(np.isnan(norms).sum()):
        raise ValueError(
            f"it has {norm} norms of its gradient at {len(norms) - missing} of its {len(norms)} steps: "
            f"run it again with probes.{probe}=all"
        )
    return norms


def _committed(run_id: str) -> tuple[str, pd.DataFrame]:
    """Status and history of a run in results/*/."""
    root = Path(os.environ.get("UNTUNED_RESULTS") or ROOT / "results")
    for path in sorted(root.glob("*/runs.csv")):
        runs = pd.read_csv(path, usecols=["run", "status"], dtype=str)
        found = runs.status[runs.run == run_id]
        if len(found):
            histories = pq.read_table(path.with_name("curves.parquet"), filters=[("run", "==", run_id)])
            return found.iloc[0], histories.to_pandas().sort_values("step")
    raise ValueError(f"it is neither finished in the store nor in {root.name}/*/runs.csv")
