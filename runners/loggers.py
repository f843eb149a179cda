"""Mirrors of a finished run. The store is the truth; a mirror can be switched off without losing anything."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runners.config import Place, Run, UserError, first_line
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
    try:
        session = wandb.init(
            project="untuned", id=run_id, name=run_id, group=run.science["task"]["name"], config=run.science, mode=mode,
            dir=place.store, resume=None if mode == "offline" else "allow",
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"logger=wandb: {first_line(error)}; WANDB_MODE=offline needs no network") from error

    def log(result: Result) -> None:
        with _only_told():
            for row in result.tables["history"].to_dict("records"):
                session.log({str(k): v for k, v in row.items() if v == v}, step=int(row["step"]))
            session.summary.update({"status": result.summary["status"], **result.summary["metrics"]})

    try:
        yield log
    finally:
        with _only_told():
            session.finish()


@contextmanager
def _only_told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        print(f"wandb: {first_line(error)}; the result is in the store", file=sys.stderr)
