"""Runs beside plain loops: the interval by hand, and what is missing."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import sanity
from analysis.figures import save
from analysis.tables import Results
from runners.config import UserError
from runners.experiment import Experiment, TaskPlan

HERE = np.array([1.0, 1.1, 1.3, 1.2])
PLAIN = {"a": np.array([1.15, 1.05, 1.2, 1.22]), "b": np.array([2.0, 2.1, 2.05, 2.2])}
"""Alike on task a, apart on task b."""
STEPS = 45


def results(folder: Path) -> Results:
    """Both sides of two tasks, four seeds each."""
    plan = TaskPlan(lrs=(0.01,), tuning_seeds=4)
    experiment = Experiment(
        name="e", question="Q?", source="s", cost="c", arms={"x": ()}, tasks={"a": plan, "b": plan}, reference="x"
    )
    rows, curves = [], []
    for task, plain in PLAIN.items():
        own = [
            {"task": task, "seed": 1000 + i, "steps": STEPS, "metric": "loss", "test": value, "seconds": 3.0 + i,
             "device_name": "cpu 1", "torch": "2.11.0", "run": f"{task}{i}"}
            for i, value in enumerate(HERE)
        ]  # fmt: skip
        rows += [{**row, "stage": "tuning", "higher_is_better": False, "worst": 9.0} for row in own]
        for i in range(4):
            steps = np.arange(1, STEPS + 1)
            curves.append(pd.DataFrame({"run": f"{task}{i}", "step": steps, "loss": 100 * i + steps}))
        beside = [{**row, "epochs": 1.5, "test": value, "seconds": 9.0} for row, value in zip(own, plain, strict=True)]
        pd.DataFrame(beside).to_csv(folder / f"plain_{task}.csv", index=False)
        points = [{"task": task, "seed": 1000 + i, "step": t, "loss": i} for i in range(4) for t in (20, 40, 45)]
        pd.DataFrame(points).to_csv(folder / f"plain_curves_{task}.csv", index=False)
    found = Results("e", experiment, folder, pd.DataFrame(rows))
    found.__dict__["curves"] = pd.concat(curves, ignore_index=True)  # as read from the file
    return found


def test_the_interval_is_welchs(tmp_path: Path) -> None:
    table = sanity.comparison(results(tmp_path)).set_index("task")
    for task, plain in PLAIN.items():
        row, a, b = table.loc[task], HERE.var(ddof=1) / 4, plain.var(ddof=1) / 4
        freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 3)
        half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
        assert row.difference == pytest.approx(HERE.mean() - plain.mean()) and row.half_width == pytest.approx(half)
        assert row.low == pytest.approx(row.difference - half) and row.high == pytest.approx(row.difference + half)
        assert row.sd == pytest.approx(HERE.std(ddof=1)) and row.plain_sd == pytest.approx(plain.std(ddof=1))
    assert table.within.to_dict() == {"a": True, "b": False}
    assert set(table.ratio) == {4.5 / 9} and set(table.epochs) == {1.5}


def test_times_of_two_devices_are_not_divided(tmp_path: Path) -> None:
    found = results(tmp_path)
    found.runs["device_name"] = "cpu 2"
    table = sanity.comparison(found)
    assert table.ratio.isna().all() and set(table.device_name) == {"cpu 1, cpu 2"}
    assert set(sanity.readable(table)["seconds, here / plain"]) == {"4 / 9"}


def test_it_is_told_in_words(tmp_path: Path) -> None:
    table = sanity.write(results(tmp_path))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "plain_loops.csv"), table, rtol=1e-5, check_dtype=False)
    text = (tmp_path / "plain_loops.md").read_text()
    assert "\n\nNo: on b they end apart by more than the noise of seeds explains.\n\n" in text
    line = next(line for line in text.splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "a", "1.5 (45 steps)", "loss (lower is better)", "9", "1.15 ± 0.13 (4)", "1.155 ± 0.076 (4)",
        "-0.005 [-0.2, +0.19]", "±0.19", "yes", "4 / 9 = 0.50",
    ]  # fmt: skip
    assert "yes, on each of 1 task" in sanity.text(table.head(1))


def test_curves_are_averaged_over_the_same_steps(tmp_path: Path) -> None:
    found = results(tmp_path)
    figure, table = sanity.figure(found)
    here = table[(table.task == "a") & (table.loop == sanity.HERE) & (table.seed == 1002)]
    assert list(here.step) == [20, 40, 45] and list(here.loss) == [210.5, 230.5, 243.0]
    assert list(here["mean"]) == [160.5, 180.5, 193.0]
    assert len(table) == 2 * 2 * 4 * 3 and [ax.get_title() for ax in figure.axes] == ["a", "b"]
    assert save(figure, table, tmp_path, "plain_loops").png.stat().st_size > 10_000


def missing(found: Results) -> str:
    with pytest.raises(UserError) as caught:
        sanity.comparison(found)
    return str(caught.value)


def test_what_is_missing_names_the_command(tmp_path: Path) -> None:
    found = results(tmp_path)
    path = tmp_path / "plain_b.csv"
    whole = path.read_text()
    path.write_text("\n".join(whole.splitlines()[:-1]))
    assert missing(found) == "1 of 4 plain loops of b are missing: python -m runners.plain e --tasks b"
    path.write_text(re.sub(r",b\d,", ",of-other-settings,", whole))
    assert missing(found).startswith("4 of 4 plain loops of b are missing")
    path.unlink()
    assert missing(found) == "the plain loops of b are missing: python -m runners.plain e --tasks b"
    fewer = Results("e", found.experiment, tmp_path, found.runs[found.runs.run != "a3"])
    assert missing(fewer) == "1 of 4 runs of a are missing: make sweep EXPERIMENT=e"
