"""From run directories to tables that are committed, and back.

results/<experiment>/runs.csv        one row a cell of the design: what the analysis reads
results/<experiment>/curves.parquet  one row a run and step; its metadata holds every run's summary, config and
                                     provenance, so that ``restore`` can put the runs into a store again
results/<experiment>/step_times.csv  without a reference arm: how long a step of each arm takes (runners.timing)
results/<experiment>/<probe>.parquet the same for a listed probe (quantiles, histogram)
"""

import base64
import io
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from runners.config import UserError
from runners.experiment import Cell, Design, value
from runners.store import Damaged, Result, Store, write_whole

RECORDS = b"untuned.records"
CURVES = "curves.parquet"
STEP_TIMES = "step_times.csv"


def collect(
    design: Design, cells: Iterable[tuple[Cell, str]], store: Store, folder: Path, whole: bool = True
) -> list[str]:
    """Write an experiment's tables from the store; cells come with their run's id. If they are not the whole of it,
    there is no runs.csv, so that the analysis does not see it, and all the rest, from which it can be restored.

    Returns:
        the files that could not be read: their runs have been set aside and must be made again.
    """
    rows: list[dict[str, Any]] = []
    results: dict[str, Result] = {}
    damaged: list[str] = []
    for cell, run_id in cells:
        try:
            if run_id not in results:
                results[run_id] = store.result(run_id)
            rows.append(row(cell, run_id, results[run_id]))
        except Damaged as error:
            damaged.append(str(error))
            store.set_aside(run_id)
    if whole:
        _write(folder / "runs.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.9g").encode())
    names = {name for result in results.values() for name in result.tables}
    for name in sorted(names):
        parts = [result.tables[name].assign(run=run_id) for run_id, result in results.items() if name in result.tables]
        table = pd.concat(parts, ignore_index=True)
        is_history = name == "history"
        records = [
            {"summary": r.summary, "config": r.config, "provenance": r.provenance} for r in results.values()
        ] if is_history else []  # fmt: skip
        _write(folder / (CURVES if is_history else f"{name}.parquet"), _parquet(table, records))
    return damaged


def row(cell: Cell, run_id: str, result: Result) -> dict[str, Any]:
    """A cell's row of runs.csv. ``validation`` and ``test`` are the metric of record, capped at the worst value."""
    summary = result.summary
    raw = {
        f"{split}_{name}": summary["metrics"].get(split, {}).get(name, np.nan)
        for split in ("validation", "test")
        for name in sorted(summary["metrics"].get(split, {}))
    }
    return {
        "stage": cell.stage,
        "task": cell.task,
        "arm": cell.arm,
        "lr": cell.lr,
        "seed": cell.seed,
        "status": summary["status"],
        "diverged_at": summary["diverged_at"],
        "metric": summary["metric"],
        "higher_is_better": summary["higher_is_better"],
        "worst": summary["worst"],
        "validation": value(summary, "validation"),
        "test": value(summary, "test"),
        **raw,
        "steps": summary["steps"],
        "beta2": cell.run.optimizer.second_moment_beta,
        "seconds": round(summary["seconds"]["train"], 3),
        **{k: summary["environment"][k] for k in ("device", "device_name", "torch")},
        "execution": execution(result.config),
        "precision": result.config["precision"],
        "run": run_id,
    }


def execution(config: dict[str, Any]) -> str:
    """How a run was executed, in words: the optimizer's step, and the model where it was not run eagerly."""
    model = config.get("model_execution", "eager")
    return str(config["execution"]) if model == "eager" else f"{config['execution']} with a {model} model"


def restore(folder: Path, store: Store) -> tuple[int, int]:
    """Put the collected runs of an experiment into a store.

    Returns:
        how many were put there, and how many it had already.

    Raises:
        UserError: if there are no collected tables, or they cannot be read.
    """
    path = folder / CURVES
    try:
        histories = pq.read_table(path)
        records = records_of(histories.schema)
    except FileNotFoundError:
        raise UserError(f"nothing to restore: {path} is not there") from None
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError, zlib.error) as error:
        raise UserError(f"cannot restore from {path}: {str(error).splitlines()[0]}") from None
    tables = {"history": histories.to_pandas()}
    for other in sorted(folder.glob("*.parquet")):
        if other.name != CURVES:
            tables[other.stem] = pd.read_parquet(other)
    groups = {name: dict(list(table.groupby("run"))) for name, table in tables.items()}
    put = 0
    for record in records:
        run_id = record["summary"]["id"]
        own = {
            name: group[run_id].drop(columns="run").reset_index(drop=True)
            for name, group in groups.items()
            if run_id in group
        }
        try:
            if store.summary(run_id) is not None:
                continue
        except Damaged:
            store.set_aside(run_id)
        put += store.publish(Result(record["summary"], record["config"], record["provenance"], own))
    return put, len(records) - put


def records_of(schema: pa.Schema) -> list[dict[str, Any]]:
    """Summary, config and provenance of every run, from the schema of its curves.parquet."""
    records: list[dict[str, Any]] = json.loads(zlib.decompress(base64.b64decode(schema.metadata[RECORDS])))
    return records


def _write(path: Path, content: bytes) -> None:
    """Write a table unless it says the same already: its age then tells whether figures are out of date."""
    if not (path.exists() and path.read_bytes() == content):
        write_whole(path, content)


def _parquet(table: pd.DataFrame, records: list[dict[str, Any]]) -> bytes:
    """Compact and deterministic bytes."""
    whole = pa.Table.from_pandas(table, preserve_index=False)
    if records:
        packed = base64.b64encode(zlib.compress(json.dumps(records).encode(), 9))
        whole = whole.replace_schema_metadata({**(whole.schema.metadata or {}), RECORDS: packed})
    buffer = io.BytesIO()
    pq.write_table(whole, buffer, compression="zstd", compression_level=12)
    return buffer.getvalue()
