"""Execute the notebooks headless: ``python -m analysis.run_notebooks [--results FOLDER] [--experiment E] [NAME ...]``.

Every analysis/notebooks/*.py (jupytext's percent format), or those whose names start with a NAME. They write
their figures and tables into results/, or FOLDER; no .ipynb is written. The kernel is this very interpreter,
whatever kernels the user has installed, and is talked to over files: no port, no network. Exit status 1 if
one fails.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

NOTEBOOKS = Path(__file__).parent / "notebooks"
EXPERIMENT = "UNTUNED_EXPERIMENT"
"""The environment variable by which a notebook about experiments is told to look at one only."""


class ThisInterpreter(AsyncKernelManager):
    """A kernel in the interpreter that runs this, found without a kernelspec."""

    @property
    def kernel_spec(self) -> KernelSpec:
        launch = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=[sys.executable, *launch], display_name="this", language="python")


def find(names: list[str], folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks whose file names start with one of ``names``, all for none, in order of name. Raises
    ValueError for a name that fits none."""
    every = sorted(folder.glob("*.py"))
    for name in names:
        if not any(path.name.startswith(name) for path in every):
            known = ", ".join(path.stem for path in every)
            raise ValueError(f"no notebook's name starts with {name!r}; there are: {known or 'none'}")
    return [path for path in every if not names or path.name.startswith(tuple(names))]


def execute(path: Path, environment: dict[str, str] | None = None) -> None:
    """Run one notebook in a fresh kernel, with ``environment`` added to this process's. The working folder is
    that of the notebook. Raises nbclient's errors for a failing cell or a kernel that dies."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(path, fmt="py:percent")
    with tempfile.TemporaryDirectory(prefix="untuned-") as scratch:
        variables = {
            **os.environ,
            **(environment or {}),
            "IPYTHONDIR": scratch,
            "JUPYTER_RUNTIME_DIR": scratch,
            "NO_COLOR": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        }
        kernel = ThisInterpreter(transport="ipc", ip=f"{scratch}/kernel", connection_file=f"{scratch}/kernel.json")
        client = NotebookClient(notebook, km=kernel, timeout=None)
        client.execute(env=variables, cwd=str(path.resolve().parent), cleanup_kc=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m analysis.run_notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="start of a notebook's file name")
    parser.add_argument("--results", type=Path, help="write below this folder instead of results/")
    parser.add_argument("--experiment", help="only the notebooks about experiments, and only this experiment")
    options = parser.parse_args(arguments)
    try:
        notebooks = find(options.names)
    except ValueError as error:
        parser.error(str(error))
    environment = {"UNTUNED_RESULTS": str(options.results.resolve())} if options.results else {}
    if options.experiment:
        environment[EXPERIMENT] = options.experiment
        notebooks = [path for path in notebooks if EXPERIMENT in path.read_text(encoding="utf-8")]
    failed = 0
    for path in notebooks:
        start = time.perf_counter()
        try:
            execute(path, environment)
        except Exception as error:  # whatever it is: name the notebook, go on with the others, and fail
            failed += 1
            message = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
            print(f"{path.stem}: FAILED, {type(error).__name__}\n{message}", file=sys.stderr, flush=True)
        else:
            print(f"{path.stem}: {time.perf_counter() - start:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
