"""Figures: fixed colours, files beside a table, the same bytes on every run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors

from analysis import figures, style

DRAW = """
import sys, pathlib, pandas, numpy
from analysis import figures, style
figure, (ax,) = style.panels()
x = numpy.geomspace(1, 100, 30)
for arm, look in style.looks(["radam", "untuned_linear", "mine"]).items():
    ax.plot(x, 1 / x, label=arm + r" $\\beta_2$", **look)
ax.set(xscale="log", title="a title")
ax.legend()
table = pandas.DataFrame({"x": x, "y": 1 / x, "arm": "radam"})
figures.save(figure, table, pathlib.Path(sys.argv[1]), "example")
"""


def test_another_process_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["here", str(tmp_path / "here")])
    exec(DRAW, {})
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", DRAW, tmp_path / "new" / "there"], check=True, env=environment)
    first, second = (
        {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        for folder in (tmp_path / "here", tmp_path / "new" / "there")
    )
    assert list(first) == ["example.csv", "example.pdf", "example.png"]
    assert first == second
    assert b"CreationDate" not in first["example.pdf"]


def test_save_writes_the_table_and_shows_the_picture(tmp_path):
    figure, (ax,) = style.panels()
    ax.plot([1, 2], [3, 4])
    table = pd.DataFrame({"lr": [0.001, 1 / 3], "steps": [1, 2000], "arm": ["a", None]}, index=[5, 6])
    saved = figures.save(figure, table, tmp_path / "new" / "folder", "name")
    assert saved.csv.read_text() == "lr,steps,arm\n0.001,1,a\n0.333333,2000,\n"
    assert saved._repr_png_().startswith(b"\x89PNG")
    assert saved.pdf.read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match="'void' has no numbers"):
        figures.save(figure, table[:0], tmp_path, "void")


def test_results_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("UNTUNED_RESULTS", raising=False)
    assert figures.results("theory") == Path(figures.__file__).parents[1] / "results" / "theory"
    monkeypatch.setenv("UNTUNED_RESULTS", str(tmp_path))
    assert figures.results("theory") == tmp_path / "theory"


def test_an_arm_looks_the_same_in_every_figure():
    one = style.looks(["radam", "untuned_linear", "mine"])
    other = style.looks(["none", "radam"])
    assert one["radam"] == other["radam"]
    assert list(one) == ["radam", "untuned_linear", "mine"]
    everything = style.looks([*style.ARMS])
    assert len({look["color"] for look in everything.values()}) == len(style.ARMS)
    assert one["mine"]["color"] not in {one["radam"]["color"], one["untuned_linear"]["color"]}
    assert len(style.looks([f"arm{i}" for i in range(8)])) == 8
    with pytest.raises(ValueError, match="too many"):
        style.looks([f"arm{i}" for i in range(9)])


def test_shades_are_ordered_by_lightness():
    light = [np.dot(colors.to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in style.shades(6)]
    assert light == sorted(light)
    assert light[-1] < 0.8


def test_panels_are_a_flat_list_in_rows():
    figure, axes = style.panels(columns=3, rows=2, size=(2, 1), share_y=True, heights=(2, 1))
    assert len(axes) == 6
    assert tuple(figure.get_size_inches()) == (6, 2)
    assert axes[0].get_subplotspec().rowspan.start == 0
    assert axes[3].get_subplotspec().rowspan.start == 1
