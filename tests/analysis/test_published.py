"""Published numbers beside the runs."""

from typing import Any

import pytest
from pydantic import ValidationError

from analysis.published import sections
from runners.experiment import TaskPlan
from tests.analysis.test_verdicts import EQUIVALENT, arms, of, pilot


def test_a_task_that_names_published_numbers_has_them_beside_its_own() -> None:
    rows = pilot() + arms()
    for row in rows:
        row["arm"] = {"ref": "untuned_linear", "a": "radam"}.get(row["arm"], row["arm"])
        row["test"] = 0.6 if row["arm"] == "radam" else 0.5
    text = "\n".join(sections(of(rows, {"c": EQUIVALENT}, published="cifar10_resnet20")))
    assert "| radam               | 8.91 ± .25" in text and text.count("not run") == 1  # the exponential warmup
    line = next(line for line in text.splitlines() if line.startswith("| radam"))
    assert line.endswith("| 40.00 ± 0.00 |")
    assert "Here: `task=t`, so 40 steps, at lr 0.01; 6 seeds" in text and "186 epochs" in text


def test_without_there_is_no_such_section() -> None:
    assert sections(of(pilot() + arms(), {"c": EQUIVALENT})) == []


def test_a_name_that_is_not_there_is_told() -> None:
    plan: dict[str, Any] = {"lrs": (0.1,), "tuning_seeds": 1}
    with pytest.raises(ValidationError, match=r"no file is called 'cifar10_resnet2'.*cifar10_resnet20"):
        TaskPlan(**plan, published="cifar10_resnet2")
