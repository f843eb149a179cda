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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from runners.config import Run, UserError
from runners.experiment import Cell, Design, value
from runners.store import Damaged, Result, Store, config_of, write_whole

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
    places: dict[str, list[tuple[int, Cell]]] = {}
    for place, (cell, run_id) in enumerate(cells):
        places.setdefault(run_id, []).append((place, cell))
    rows: dict[int, dict[str, Any]] = {}
    records: list[str] = []
    tables: dict[str, _Stack] = {}
    damaged: list[str] = []
    for run_id, filled in places.items():
        try:
            summary, files = store.files(run_id)
        except Damaged as error:
            damaged.append(str(error))
            store.set_aside(run_id)
            continue
        rows |= {place: row(cell, run_id, summary) for place, cell in filled}
        records.append(_record(summary, files))
        for name, content in files.items():
            if name.endswith(".parquet"):
                tables.setdefault(name, _Stack()).add(run_id, content)
    if whole:
        _write(folder / "runs.csv", runs_csv(rows[place] for place in sorted(rows)))
    for name, stack in sorted(tables.items()):
        is_history = name == "history.parquet"
        _write(folder / (CURVES if is_history else name), stack.parquet(records if is_history else ()))
    return damaged


def runs_csv(rows: Iterable[dict[str, Any]]) -> bytes:
    """What runs.csv holds, of its rows."""
    return pd.DataFrame(list(rows)).to_csv(index=False, float_format="%.9g").encode()


def _record(summary: dict[str, Any], files: dict[str, bytes]) -> str:
    """What ``restore`` needs of a run beside its tables, as JSON."""
    config, provenance = config_of(files["config.yaml"]), json.loads(files["provenance.json"])
    return json.dumps({"summary": summary, "config": config, "provenance": provenance})


def row(cell: Cell, run_id: str, summary: dict[str, Any]) -> dict[str, Any]:
    """A cell's row of runs.csv. ``validation`` and ``test`` are the metric of record, capped at the worst value."""
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
        "execution": execution(cell.run),
        "precision": cell.run.precision,
        "run": run_id,
    }


def execution(run: Run) -> str:
    """How a run is executed, in words: the optimizer's step, and the model where it is not run eagerly."""
    model = {"eager": "", "compiled": " with a compiled model", "cuda_graph": " with the model as a CUDA graph"}
    return run.execution + model[run.model_execution]


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


ROWS = 2**20
"""Rows of a row group: Arrow's own choice. They are written one by one, so that only one is there twice."""
JOINED = 256
"""Tables that are joined at a time: thousands of small ones take three times the memory."""


class _Stack:
    """Tables of many runs, to be one below the other."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.kinds: dict[pa.Schema, pa.Table] = {}
        self.joined: list[pa.Table] = []
        self.parts: list[pa.Table] = []

    def add(self, run_id: str, content: bytes) -> None:
        """The next run's table, as the bytes of a parquet file."""
        part = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        self.kinds.setdefault(part.schema, part.slice(0, 1))
        self.rows[run_id] = part.num_rows
        self.parts.append(part.replace_schema_metadata())
        if len(self.parts) == JOINED:
            self._join()

    def _join(self) -> None:
        if self.parts:
            self.joined.append(pa.concat_tables(self.parts, promote_options="permissive").combine_chunks())
            self.parts.clear()

    def parquet(self, records: Sequence[str]) -> bytes:
        """Compact and deterministic bytes, with the run in the last column. Columns and types are those that pandas
        would give the whole, which is never in pandas."""
        heads = [head.to_pandas().assign(run="") for head in self.kinds.values()]
        schema = pa.Schema.from_pandas(pd.concat(heads, ignore_index=True), preserve_index=False)
        if records:
            packed = base64.b64encode(zlib.compress(f"[{', '.join(records)}]".encode(), 9))
            schema = schema.with_metadata({**(schema.metadata or {}), RECORDS: packed})
        self._join()
        whole = pa.concat_tables(self.joined, promote_options="permissive")
        ids = pa.array(self.rows, schema.field("run").type)
        owners = np.repeat(np.arange(len(self.rows), dtype=np.int32), list(self.rows.values()))
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, compression="zstd", compression_level=12) as writer:
            for first in range(0, len(owners), ROWS):
                own = ids.take(pa.array(owners[first : first + ROWS]))
                writer.write_table(
                    whole.slice(first, ROWS)
                    .combine_chunks()
                    .append_column("run", own)
                    .select(schema.names)
                    .cast(schema),
                    row_group_size=ROWS,
                )
        return buffer.getvalue()
