"""Executing notebooks in this interpreter."""

import os
import sys

import pytest

from analysis import run_notebooks

GOOD = """
# %% [markdown]
# # A notebook

# %%
import os, pathlib, sys
from analysis.figures import results
results().mkdir(parents=True, exist_ok=True)
(results() / "seen").write_text(f"{sys.executable}|{pathlib.Path.cwd().name}|{os.environ['HOME']}")
"""
BAD = "# %%\nx = 1\n\n# %%\nraise KeyError('the cell is missing')\n"


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "01_good.py").write_text(GOOD)
    (folder / "02_bad.py").write_text(BAD)
    monkeypatch.setattr(run_notebooks, "find", lambda names, find=run_notebooks.find: find(names, folder))
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_runs_in_this_interpreter_without_a_home(notebooks, tmp_path, capfd):
    assert run_notebooks.main(["01", "--results", "written"]) == 0
    assert (tmp_path / "written" / "seen").read_text() == (f"{sys.executable}|notebooks|{tmp_path / 'nowhere'}")
    out, _ = capfd.readouterr()
    assert out.startswith("01_good: ")
    assert out.endswith(" s\n")
    assert out.count("\n") == 1
    assert sorted(os.listdir(notebooks)) == ["01_good.py", "02_bad.py"]


def test_notebooks_share_a_kernel_but_no_variables_until_one_fails(notebooks, tmp_path, capfd):
    seen = "import os, pathlib\npathlib.Path('seen').open('a').write(f'{os.getpid()} {\"x\" in globals()}\\n')\n"
    seen = f"# {run_notebooks.EXPERIMENT}\n{seen}"
    for name in ("01_good", "03_after"):
        (notebooks / f"{name}.py").write_text(f"# %%\n{seen}x = 1\n")
    (notebooks / "02_bad.py").write_text(f"# %%\n{seen}x = 1 / 0\n")
    assert run_notebooks.main([]) == 1
    (one, *left), (two, *right), (three, *last) = map(str.split, (notebooks / "seen").read_text().splitlines())
    assert one == two != three and left == right == last == ["False"]
    out, err = capfd.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == ["01_good", "03_after"]
    assert "02_bad: FAILED" in err


def test_a_failing_cell_is_named(notebooks, capfd):
    assert run_notebooks.main(["02_bad"]) == 1
    _, err = capfd.readouterr()
    assert "02_bad: FAILED" in err
    assert "the cell is missing" in err
    assert "\x1b" not in err


def test_an_unknown_name_lists_the_known(notebooks, capfd):
    with pytest.raises(SystemExit):
        run_notebooks.main(["03"])
    assert "01_good, 02_bad" in capfd.readouterr().err
    assert [path.stem for path in run_notebooks.find([])] == ["01_good", "02_bad"]
