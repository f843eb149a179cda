"""Writing a figure: PNG and PDF beside a CSV of the numbers plotted, the same bytes on every run."""

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis import style


def results(*parts: str) -> Path:
    """A folder under results/: of this repository, or of $UNTUNED_RESULTS if that is set."""
    root = os.environ.get("UNTUNED_RESULTS") or Path(__file__).resolve().parents[1] / "results"
    return Path(root, *parts)


@dataclass(frozen=True)
class Saved:
    """The files of one figure. A notebook shows the PNG if this is the last value of a cell."""

    png: Path
    pdf: Path
    csv: Path

    def _repr_png_(self) -> bytes:
        return self.png.read_bytes()


def save(figure: Figure, table: pd.DataFrame, folder: Path, name: str) -> Saved:
    """Write ``name``.png, .pdf and .csv into ``folder`` (made if missing).

    ``table`` holds the numbers plotted, one row a point or bar, six significant digits, no index; a missing
    value is an empty field. No file carries a date, so an unchanged figure is an unchanged file. Raises
    ValueError for an empty table.
    """
    if table.empty:
        raise ValueError(f"figure {name!r} has no numbers: its table is empty")
    folder.mkdir(parents=True, exist_ok=True)
    saved = Saved(*(folder / f"{name}.{kind}" for kind in ("png", "pdf", "csv")))
    table.to_csv(saved.csv, index=False, float_format="%.6g", lineterminator="\n", encoding="utf-8")
    with style.context():
        figure.savefig(saved.png, metadata={"Software": None})
        figure.savefig(saved.pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return saved
