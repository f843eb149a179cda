"""Mirrors of a finished run. The store is the truth; a mirror can be switched off without losing anything."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runners.config import Place, Run, UserError
from runners.store import Result


@contextmanager
def logger_for(place: Place, run: Run, run_id: str) -> Iterator[Callable[[Result], None]]:
    """What to call with the result: nothing, or Weights & Biases (``logger=wandb``).

    wandb is offline unless the user is logged in (WANDB_API_KEY or ~/.netrc) or sets WANDB_MODE, and is
    finished whatever happens.

    Raises:
        UserError: if wandb is asked for and not installed.
    """
    if place.logger == "none":
        yield lambda result: None
        return
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs the package wandb: pip install 'untuned[wandb]'") from None
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    session = wandb.init(
        project="untuned", id=run_id, name=run_id, group=run.science["task"]["name"], config=run.science, mode=mode,
        dir=place.store, resume="allow",
    )  # fmt: skip

    def log(result: Result) -> None:
        for row in result.tables["history"].to_dict("records"):
            session.log({str(k): v for k, v in row.items() if v == v}, step=int(row["step"]))
        session.summary.update({"status": result.summary["status"], **result.summary["metrics"]})

    try:
        yield log
    finally:
        session.finish()
