"""conf/: every file composes, lists exactly the fields of what it builds, and agrees with its defaults."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from optimizers import decays, rule, scaling, warmups
from runners.config import CONF, Place, Probes, Run, compose_run
from runners.experiment import Design, load
from runners.initialisations import INITIALISATIONS
from tasks import task as tasks

GROUPS: dict[str, dict[str, Any]] = {
    "optimizer": dict(rule.available()), "warmup": dict(warmups.WARMUPS), "decay": dict(decays.DECAYS),
    "scaling": dict(scaling.SCALINGS), "initialisation": dict(INITIALISATIONS), "task": dict(tasks.available()),
}  # fmt: skip
FILES = sorted(path for group in GROUPS for path in (CONF / group).glob("*.yaml"))
DELIBERATE: dict[tuple[str, str], set[str]] = {
    # Values that differ from the constructor's defaults because that is what the file is for.
    ("optimizer", "adam_eps"): {"eps"},
    ("optimizer", "gadamx"): {"inner"},
    ("task", "ptb_lstm_small"): {
        "bptt",
        "variable_bptt",
        "layers",
        "embedding",
        "hidden",
        "dropout",
        "dropout_input",
        "dropout_hidden",
        "dropout_embedding",
        "weight_drop",
        "ar",
        "tar",
    },
    ("optimizer", "sgd"): {"momentum"},  # 0.9 is what everybody trains with; the class follows torch
}
BASES = {"rule", "wrapper"}
NEEDED: dict[tuple[str, str], list[str]] = {
    # What has no default and must be said.
    ("decay", "refined"): ["decay.run=0123456789abcdef"],
    ("scaling", "linear"): ["scaling.base=32"],
    ("scaling", "sqrt"): ["scaling.base=32"],
    ("scaling", "surge"): ["scaling.base=32", "scaling.noise=500"],
}


def content(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


@cache
def composed(path: Path) -> Run:
    group, name = path.parent.name, path.stem
    return compose_run([f"{group}={name}", *NEEDED.get((group, name), [])])[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_composes_to_what_it_names(path: Path) -> None:
    thing = getattr(composed(path), path.parent.name)
    assert type(thing) is GROUPS[path.parent.name][content(path)["name"]]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_lists_every_field_with_its_default(path: Path) -> None:
    values = content(path)
    inner = [d for d in values.pop("defaults", []) if "@" in next(iter(d))]
    kind = GROUPS[path.parent.name][values.pop("name")]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    listed = {*values, *(next(iter(d)).partition("@")[2] for d in inner)}
    assert listed == fields.keys()
    thing = getattr(composed(path), path.parent.name)
    differ = set()
    for name, field in fields.items():
        default = field.default
        if getattr(default, "default", None) is not None:  # pydantic's Field(default=...)
            default = default.default
        if default is not dataclasses.MISSING and getattr(thing, name) != default:
            differ.add(name)
    assert differ == DELIBERATE.get((path.parent.name, path.stem), set())


@pytest.mark.parametrize("group", GROUPS)
def test_everything_has_a_file(group: str) -> None:
    named = {content(path)["name"] for path in (CONF / group).glob("*.yaml")}
    assert named == GROUPS[group].keys() - BASES


def test_the_run_lists_every_field_with_its_default() -> None:
    values = content(CONF / "run.yaml")
    groups = {key for d in values.pop("defaults") if isinstance(d, dict) for key in d if "/" not in key}
    assert groups == GROUPS.keys()
    values.pop("hydra")
    assert values.keys() == {f.name for kind in (Run, Place) for f in dataclasses.fields(kind)} - groups
    assert values["probes"].keys() == {f.name for f in dataclasses.fields(Probes)}
    run, place = compose_run([])
    assert place == Place()
    for field in dataclasses.fields(Run):
        if field.default is not dataclasses.MISSING:
            assert getattr(run, field.name) == field.default, field.name


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_is_sound(path: Path) -> None:
    experiment = load(path.stem)
    assert len(next(iter(content(path)))) and next(iter(content(path))) == "question"  # opens with its question
    assert experiment.source and experiment.cost
    assert experiment.next is None or load(experiment.next).cost
    design = Design(experiment)
    assert set(design.base) == {(arm, task) for arm in experiment.arms for task in experiment.tasks}
    assert sum(sum(stages.values()) for stages in design.size().values()) > 0
    for task in experiment.tasks:  # arms of a task differ, and in nothing that would make a verdict refuse them
        runs = [design.base[arm, task] for arm in experiment.arms]
        assert len({str(run.science) for run in runs}) == len(runs)
        for column, values in {
            "execution": {(run.execution, run.model_execution) for run in runs},
            "precision": {run.precision for run in runs},
        }.items():
            assert (len(values) > 1) == (column in experiment.compares), column
