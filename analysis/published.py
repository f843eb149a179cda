"""What others have published for a task, beside what was run here."""

from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from analysis.tables import Results
from runners.config import CONF


def sections(found: Results) -> list[str]:
    """Markdown for every task whose plan names a file in conf/published/: its errors in
    %, ours in the last column, and the settings of both, since it is these that differ. For tasks of accuracy."""
    parts: list[str] = []
    for task, plan in found.experiment.tasks.items():
        if plan.published is not None:
            values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published" / f"{plan.published}.yaml"))
            parts += [f"### {task}", _settings(found, task, values), _beside(found, task, values)]
    return ["## Beside published numbers", *parts] if parts else []


def _settings(found: Results, task: str, published: dict[str, Any]) -> str:
    experiment, plan = found.experiment, found.experiment.tasks[task]
    runs = found.runs[(found.runs.task == task) & (found.runs.stage == "test")]
    words = " ".join([f"task={plan.task or task}", *experiment.overrides, *plan.overrides])
    return (
        f"Published ({published['source']}): {published['settings'].strip()}.\n\n"
        f"Here: `{words}`, so {runs.steps.iloc[0]:,} steps, at lr {found.primary_lr(task):g}; {runs.seed.nunique()} "
        "seeds. Where the two differ in depth, length or data their errors are not the same quantity: what can be "
        "compared is how the arms stand to each other."
    )


def _beside(found: Results, task: str, published: dict[str, Any]) -> str:
    runs = found.runs[(found.runs.task == task) & (found.runs.stage == "test")]
    rows: list[dict[str, str]] = []
    for arm, numbers in published["rows"].items():
        ours = 100 * (1 - runs[runs.arm == arm].test)
        here = f"{ours.mean():.2f} ± {ours.std():.2f}" if len(ours) else "not run"
        rows.append({"arm": arm, **dict(zip(published["columns"], numbers, strict=True)), "here": here})
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
