"""Optimizers side by side, on hand-made tables where the answer is known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import ranking, report
from analysis.tables import Results
from runners.config import UserError
from runners.experiment import Experiment, TaskPlan
from tests.analysis.test_verdicts import cells

LRS = (0.1, 1.0, 10.0)
PUBLISHED = {"adam": 0.001, "sgd": 0.1, "new": 1.0}
BEST = {"adam": 1, "sgd": 2, "new": 0}
"""Which rate of the grid is best for an arm."""
LOSS = {"words": {"adam": 0.5, "sgd": 0.8, "new": 0.6}, "images": {"adam": 0.9, "sgd": 0.7, "new": 0.2}}
STEP_MS = {"adam": 100.0, "sgd": 50.0, "new": 200.0}
WORST = {"words": 2.0, "images": 0.1}


def results(folder: Path) -> Results:
    tasks = dict.fromkeys(LOSS, TaskPlan(lrs=LRS, tuning_seeds=1, test_seeds=2))
    experiment = Experiment(
        name="zoo", question="Q?", source="s", cost="c", arms=dict.fromkeys(PUBLISHED, ()), tasks=tasks, reference=None
    )
    rows = []
    for task, losses in LOSS.items():
        higher = task == "images"
        for arm, value in losses.items():
            more = {"task": task, "worst": WORST[task], "higher_is_better": higher}
            for i, multiple in enumerate(LRS):
                lost = 0.3 * (i != BEST[arm])  # each other rate loses this much
                tried = value - lost if higher else value + lost
                diverged = (task, arm, i) == ("words", "sgd", 0)
                status = {"status": "diverged", "validation": 2.0} if diverged else {}
                lr = multiple * PUBLISHED[arm]
                rows += cells("tuning", arm, tried, lr, first=1000, **{**more, "validation": tried, **status})
            lr = LRS[BEST[arm]] * PUBLISHED[arm]
            rows += cells("test", arm, [value - 0.01, value + 0.01], lr, **more)
    frame = pd.DataFrame(rows)
    frame.loc[frame.task == "images", "metric"] = "accuracy"
    times = [{"task": task, "arm": arm, "step_ms": ms} for task in LOSS for arm, ms in STEP_MS.items()]
    pd.DataFrame(times).to_csv(folder / "step_times.csv", index=False)
    return Results("zoo", experiment, folder, frame)


def test_each_arm_is_tested_at_its_own_best_and_ranked_over_the_tasks(tmp_path: Path) -> None:
    table = ranking.ranking(results(tmp_path))
    assert list(table.task) == ["words"] * 3 + ["images"] * 3
    assert list(table.arm[:3]) == list(table.arm[3:]) == ["adam", "new", "sgd"]  # of equals (2.5) in order of name
    words, images = table[table.task == "words"].set_index("arm"), table[table.task == "images"].set_index("arm")
    assert words["rank"].to_dict() == {"adam": 1, "new": 2, "sgd": 3}
    assert images["rank"].to_dict() == {"adam": 1, "new": 3, "sgd": 2}
    assert words.mean_rank.to_dict() == {"adam": 1, "new": 2.5, "sgd": 2.5}
    assert words.multiple.to_dict() == {"adam": 1.0, "new": 0.1, "sgd": 10.0}
    assert words.at_edge.to_dict() == {"adam": False, "new": True, "sgd": True}
    np.testing.assert_allclose(words.test[["adam", "new", "sgd"]], [0.5, 0.6, 0.8])
    np.testing.assert_allclose(table.sd, 0.01 * math.sqrt(2))
    assert words.diverged.to_dict() == {"adam": 0, "new": 0, "sgd": 1} and set(table.tried) == {5}


def test_the_sensitivity_is_a_share_of_what_the_task_can_show(tmp_path: Path) -> None:
    table = ranking.ranking(results(tmp_path)).set_index(["task", "arm"])
    # Two of three rates lose .3; between the worst, 2, and the best arm, .5, lies 1.5. Diverged is the worst.
    assert table.sensitivity["words", "adam"] == pytest.approx(0.2 / 1.5)
    assert table.sensitivity["words", "sgd"] == pytest.approx((0 + 0.3 + 2.0 - 0.8) / 3 / 1.5)
    assert table.sensitivity["images", "new"] == pytest.approx((0.2 - 0.1) * 2 / 3 / 0.8)  # capped at chance


def test_the_time_of_a_step_is_given_in_that_of_adam(tmp_path: Path) -> None:
    table = ranking.ranking(results(tmp_path)).set_index(["task", "arm"])
    assert table.step_ratio.to_dict() == pytest.approx({
        (task, arm): {"adam": 1.0, "sgd": 0.5, "new": 2.0}[arm] for task, arm in table.index
    })  # fmt: skip


def test_a_run_that_is_missing_is_named_with_the_command(tmp_path: Path) -> None:
    found = results(tmp_path)
    lacking = found.runs.drop(found.runs.index[found.runs.stage == "test"][0])
    with pytest.raises(UserError, match=r"^1 runs of adam on words are missing: make sweep EXPERIMENT=zoo$"):
        ranking.ranking(Results("zoo", found.experiment, tmp_path, lacking))


def test_the_figure_and_the_report_show_every_arm(tmp_path: Path) -> None:
    found = results(tmp_path)
    drawn, table = ranking.figure(found)
    panels = drawn.axes
    assert len(panels) == 5 and [t.get_text() for t in panels[0].get_yticklabels()] == ["adam", "new", "sgd"]
    assert len(table) == 6
    report.write(found)
    text = (tmp_path / "report.md").read_text()
    assert "## Side by side" in text and "0.5 ± 0.014 (lr 0.001)" in text and "(lr 0.1, edge)" in text
    assert "It cannot rank neighbours: with 2 seeds" in text and "×0.1 ×1 ×10" in text
    assert pd.read_csv(tmp_path / "ranking.csv").shape == (6, len(table.columns))
