"""Execute the notebooks headless: ``python -m analysis.run_notebooks [--results FOLDER] [--experiment E] [NAME ...]``.

Every analysis/notebooks/*.py (jupytext's percent format), or those whose names start with a NAME. They write
their figures and tables into results/, or FOLDER; no .ipynb is written. The kernel is this very interpreter,
whatever kernels the user has installed, and is talked to over files: no port, no network. Exit status 1 if
one fails.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def kernel(folder: Path, environment: dict[str, str]) -> Iterator[Callable[[Path], None]]:
    """A kernel in which to run notebook after notebook of a folder, its working folder, with ``environment`` added to
    this process's: most of what a short one takes would be the start and the imports of a kernel of its own. Each finds
    no variable of those before. Raises nbclient's errors for a failing cell or a kernel that dies."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    forget = nbformat.v4.new_code_cell("%reset -f")
    with tempfile.TemporaryDirectory(prefix="untuned-") as scratch:
        variables = {
            **os.environ,
            **environment,
            "IPYTHONDIR": scratch,
            "JUPYTER_RUNTIME_DIR": scratch,
            "NO_COLOR": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        }
        manager = ThisInterpreter(transport="ipc", ip=f"{scratch}/kernel", connection_file=f"{scratch}/kernel.json")
        client = NotebookClient(nbformat.v4.new_notebook(), km=manager, timeout=None)

        def execute(path: Path) -> None:
            client.nb = jupytext.read(path, fmt="py:percent")
            client.nb.cells.insert(0, forget)
            client.execute(cleanup_kc=False)

        with client.setup_kernel(env=variables, cwd=str(folder.resolve()), cleanup_kc=True):
            yield execute


def execute(paths: list[Path], environment: dict[str, str]) -> Iterator[tuple[Path, float, Exception | None]]:
    """Run notebooks one after another; each with its seconds, and what it raised if it failed. Neighbours that are
    about experiments share a kernel; the others, which compute, have one of their own."""
    waiting = list(paths)
    shared = {path for path in paths if EXPERIMENT in path.read_text(encoding="utf-8")}
    while waiting:
        start = time.perf_counter()  # the first one's seconds are the kernel's too
        with kernel(waiting[0].parent, environment) as run:
            failure = None
            while waiting and failure is None:  # what a failed one left behind is nothing to go on with
                path = waiting.pop(0)
                alone = not shared.issuperset([path, *waiting[:1]])
                try:
                    run(path)
                except Exception as error:  # whatever it is: it is told, and the others go on
                    failure = error
                yield path, time.perf_counter() - start, failure
                start = time.perf_counter()
                if alone:
                    break


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
    for path, seconds, failure in execute(notebooks, environment):
        if failure is not None:
            failed += 1
            message = re.sub(r"\x1b\[[0-9;]*m", "", str(failure)).strip()
            print(f"{path.stem}: FAILED, {type(failure).__name__}\n{message}", file=sys.stderr, flush=True)
        else:
            print(f"{path.stem}: {seconds:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
