"""``python -m bench [part ...]``: measure, and write results/bench/.

results/bench/<part>.csv  what was measured, with machine, versions and date
results/bench/report.md   all parts in short tables; a part that is not measured now keeps its own
"""

import argparse
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pandas as pd

from bench import optimizer_step, scale, sweep, training_step
from runners.config import ROOT, Place, UserError, nearest
from runners.store import write_whole
from runners.train import environment

# Here and not in the package: the plain processes that are timed are not to import all of it.
PARTS: dict[str, ModuleType] = {
    "optimizer_step": optimizer_step,
    "training_step": training_step,
    "sweep": sweep,
    "scale": scale,
}


def stamped(table: pd.DataFrame, place: Place) -> pd.DataFrame:
    """The table with where and when it was measured in its last columns."""
    where = environment(place.torch_device())
    return table.assign(
        device=where["device_name"],
        cores=len(os.sched_getaffinity(0)),
        torch=where["torch"],
        python=where["python"],
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )


def file_of(part: str, device: str) -> str:
    """A GPU's table stands beside a CPU's."""
    return f"{part}.csv" if device == "cpu" else f"{part}_{device}.csv"


def report(folder: Path) -> str:
    """The report in Markdown, from the tables that are there."""
    lines = ["# How fast it is"]
    lines.append("`make bench` measures this anew. Within a table all candidates took turns on one machine.")
    if not any((folder / file_of(name, "cuda")).exists() for name in PARTS):
        lines.append("No GPU has been measured yet; where there is one, `make bench` does, and keeps the CPU's tables.")
    for name, part in PARTS.items():
        lines.append(f"## {part.TITLE}")
        tables = [path for device in ("cpu", "cuda") if (path := folder / file_of(name, device)).exists()]
        if not tables:
            lines.append(f"Not measured yet: `python -m bench {name}`.")
        for path in tables:
            table = pd.read_csv(path)
            first = table.iloc[0]
            where = f"{first.device}, {first.cores} cores"
            lines.append(f"{first.date} · {where} · torch {first.torch}, Python {first.python}")
            lines.append(part.summary(table).strip())
        if tables and hasattr(part, "TRIED"):
            lines.append(part.TRIED)
    return "\n\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: to see that it runs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--data-root", default=None, help="folder of local data sets (or set UNTUNED_DATA)")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the tables")
    words = parser.parse_args(argv)
    folder = Path(words.results) / "bench"
    try:
        place = Place(device=words.device, data_root=words.data_root)
        for name in words.parts:
            if name not in PARTS:
                raise UserError(f"no part is called {name!r}{nearest(name, PARTS)}")
        for name in words.parts or PARTS:
            table = stamped(PARTS[name].measure(place, words.quick), place)
            write_whole(
                folder / file_of(name, place.torch_device().type), table.to_csv(index=False, float_format="%.5g")
            )
        write_whole(folder / "report.md", report(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"written: {folder / 'report.md'}")


if __name__ == "__main__":
    main()
