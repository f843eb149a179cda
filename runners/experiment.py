"""An experiment: one YAML that names arms, tasks, grids, seeds and claims, and expands to runs.

The stages of a task's runs, each with seeds of its own so that nothing is chosen and tested on the same ones:

    tuning   every arm at every lr; the reference arm's best lr becomes the task's primary lr
    pilot    the reference arm at the primary lr and at sqrt(2) times it: their difference is the margin
    test     every arm at the primary lr, on paired seeds
    high     the same at a higher lr declared in the YAML, for the arms of the sensitivity claims
    own      an arm whose best lr is not the primary one, at its own
    control  the reference arm again on other seeds, for the A/A comparison

An experiment without a reference arm compares optimizers as they would be used: each arm is tried at the same
multiples of its rule's published rate, and tested at the one that was best for it. It has the stages tuning and
test alone, and can make no claim: there is nothing to pair with, and no margin.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from runners.config import CONF, Place, Run, UserError, build, compose_run, first_line, nearest

Stage = Literal["tuning", "pilot", "test", "high", "own", "control"]
SEEDS: dict[Stage, int] = {
    "tuning": 1000, "pilot": 2000, "test": 3000, "high": 3000, "own": 3000, "control": 4000,
}  # fmt: skip
"""First seed of each stage. high and own share the test seeds: they are compared with the test runs, in pairs."""

NOT_HERE = {"task", "lr", "seed", *(f.name for f in dataclasses.fields(Place))}
"""What the grid and the command line set, so that an override of an experiment must not."""

_SCHEMA = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=0, lt=1000)]


@checked(frozen=True, config=_SCHEMA)
class TaskPlan:
    """The grid of one task: learning rates (increasing) and how many seeds each stage has.

    Without a reference arm ``lrs`` are multiples of each rule's published rate, and tests need no pilot.
    ``task`` is the file in conf/task/; None: the plan's own name in the experiment, which differs where one task
    stands there several times (with several beta2, say). ``published`` is a file in conf/published/, of numbers of
    others that the report sets beside these.
    """

    lrs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    tuning_seeds: Annotated[int, Field(ge=1, lt=1000)]
    task: str | None = None
    overrides: tuple[str, ...] = ()
    pilot_seeds: Count = 0
    test_seeds: Count = 0
    own_seeds: Count = 0
    control_seeds: Count = 0
    high_lr: Annotated[float, Field(gt=0)] | None = None
    published: str | None = None

    def __post_init__(self) -> None:
        known = [path.stem for path in (CONF / "published").glob("*.yaml")]
        if self.published is not None and self.published not in known:
            raise ValueError(f"published: no file is called {self.published!r}{nearest(self.published, known)}")
        if list(self.lrs) != sorted(set(self.lrs)):
            raise ValueError("lrs must increase")


@checked(frozen=True, config=_SCHEMA)
class Claim:
    """A hypothesis and how it is tested, for every task.

    kind:
        equivalence  arm ends within the margin of the reference arm
        sensitivity  arm does NOT: the assay must be able to tell arms apart (on at least one task)
        control      the reference arm on other seeds is found equivalent to itself
    """

    hypothesis: str
    kind: Literal["equivalence", "sensitivity", "control"]
    arm: str | None = None


@checked(frozen=True, config=_SCHEMA)
class Experiment:
    """The typed content of conf/experiment/<name>.yaml. ``next`` names the experiment to go on to, which asks the
    same with more. ``compares`` says that its arms differ in how they are executed or in precision because that is
    the question; verdicts refuse such arms else."""

    name: str
    question: Annotated[str, Field(min_length=1)]
    source: str
    cost: str
    arms: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    tasks: Annotated[dict[str, TaskPlan], Field(min_length=1)]
    reference: str | None
    overrides: tuple[str, ...] = ()
    claims: dict[str, Claim] = Field(default_factory=dict)
    compares: tuple[Literal["execution", "precision"], ...] = ()
    screening: bool = False
    next: str | None = None

    def __post_init__(self) -> None:
        for task, plan in self.tasks.items():
            beside = (plan.pilot_seeds, plan.own_seeds, plan.control_seeds, plan.high_lr)
            if self.reference is None and any(beside):
                raise ValueError(f"tasks.{task}: without a reference there are tuning_seeds and test_seeds only")
            if self.reference is not None and plan.test_seeds and plan.pilot_seeds < 2:
                raise ValueError(f"tasks.{task}: a test needs a margin: pilot_seeds must be at least 2")
        if self.reference is None and self.claims:
            raise ValueError("claims: a claim compares with a reference arm: name one")
        if self.reference is not None and self.reference not in self.arms:
            raise ValueError(f"reference: no arm is called {self.reference!r}{nearest(self.reference, self.arms)}")
        for name, claim in self.claims.items():
            if claim.kind == "control":
                if any(not plan.control_seeds for plan in self.tasks.values()):
                    raise ValueError(f"claim {name}: a control needs control_seeds in every task")
            elif claim.arm not in self.arms:
                raise ValueError(f"claim {name}: no arm is called {claim.arm!r}{nearest(str(claim.arm), self.arms)}")
            if any(not plan.test_seeds for plan in self.tasks.values()):
                raise ValueError(f"claim {name}: a claim needs test_seeds in every task")

    def grid(self, task: str) -> str:
        """The learning rates of a task in words; with a cross where they are multiples of the published rate."""
        return " ".join(f"{'×' if self.reference is None else ''}{lr:g}" for lr in self.tasks[task].lrs)


@dataclass(frozen=True)
class Cell:
    """One place of the design and the run that fills it; one run can fill several."""

    stage: Stage
    arm: str
    task: str
    lr: float
    seed: int
    run: Run


Lookup = Callable[[Cell], dict[str, Any] | None]
"""Gives the summary of a cell's run if it is finished, or None."""


class Design:
    """An experiment with every arm × task composed and checked: what is left is to substitute lr and seed."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.base: dict[tuple[str, str], Run] = {}
        self._blocks: dict[tuple[Any, ...], list[Cell]] = {}
        for task, plan in experiment.tasks.items():
            for arm, overrides in experiment.arms.items():
                words = [*experiment.overrides, *plan.overrides, *overrides]  # later ones win
                for word in words:
                    if word.partition("=")[0] in NOT_HERE:
                        raise UserError(f"experiment {experiment.name}, arm {arm}, task {task}: {word!r} would change "
                                        "nothing: the sweep sets it")  # fmt: skip
                words.insert(0, f"task={plan.task or task}")
                run, _ = compose_run(words, where=f"experiment {experiment.name}, arm {arm}, task {task}")
                self.base[arm, task] = run

    def cells(self, lookup: Lookup) -> Iterator[Cell]:
        """The cells that are determined so far: those after tuning appear once a task's reference arm is tuned, and
        ``own`` ones once their arm is."""
        for task in self.experiment.tasks:
            yield from self._task_cells(task, lookup)

    def _task_cells(self, task: str, lookup: Lookup) -> Iterator[Cell]:
        experiment, plan = self.experiment, self.experiment.tasks[task]
        arms, reference = list(experiment.arms), experiment.reference

        def block(stage: Stage, rates: dict[str, float], count: int) -> list[Cell]:
            return self._block(stage, task, rates, count)

        grid = [{arm: rates[i] for arm, rates in self.rates(task).items()} for i in range(len(plan.lrs))]
        tuning = [c for rates in grid for c in block("tuning", rates, plan.tuning_seeds)]
        yield from tuning
        best: dict[str, float] = {}
        for arm in experiment.arms:
            values = [(c.lr, lookup(c)) for c in tuning if c.arm == arm]
            if all(summary is not None for _, summary in values):  # the others need not wait for it
                best[arm] = best_lr([(lr, s) for lr, s in values if s is not None])
        if reference is None:
            yield from block("test", best, plan.test_seeds)
            return
        if reference not in best:
            return
        primary = best[reference]
        for lr in (primary, primary * math.sqrt(2)):
            yield from block("pilot", {reference: lr}, plan.pilot_seeds)
        yield from block("test", dict.fromkeys(arms, primary), plan.test_seeds)
        if plan.high_lr is not None and plan.high_lr != primary:
            probed = [c.arm for c in experiment.claims.values() if c.kind == "sensitivity" and c.arm is not None]
            yield from block("high", dict.fromkeys([reference, *probed], plan.high_lr), plan.test_seeds)
        for arm, lr in best.items():
            if lr != primary:
                yield from block("own", {arm: lr}, plan.own_seeds)
        yield from block("control", {reference: primary}, plan.control_seeds)

    def rates(self, task: str) -> dict[str, tuple[float, ...]]:
        """The learning rates that each arm is tuned over: the task's own, or as multiples of what was published."""
        lrs, apart = self.experiment.tasks[task].lrs, self.experiment.reference is None
        return {
            # As written in decimals: 10 * .0003 would be .0029999999999999996, and another run than .003.
            arm: tuple(float(f"{lr * self.base[arm, task].optimizer.published_lr:.6g}") for lr in lrs) if apart else lrs
            for arm in self.experiment.arms
        }

    def _block(self, stage: Stage, task: str, rates: dict[str, float], count: int) -> list[Cell]:
        """Some arms, each at its lr, on a stage's seeds. Kept: a sweep asks again after every run."""
        key = (stage, task, *rates.items())
        if key not in self._blocks:
            self._blocks[key] = [
                Cell(stage, arm, task, lr, seed, self.base[arm, task].replace(lr=lr, seed=seed))
                for seed in range(SEEDS[stage], SEEDS[stage] + count)
                for arm, lr in rates.items()
            ]
        return self._blocks[key]

    def size(self) -> dict[str, dict[Stage, int]]:
        """Runs of each task and stage; of ``own`` and ``high`` the most there can be."""
        counts: dict[str, dict[Stage, int]] = {}
        for task, plan in self.experiment.tasks.items():
            arms = len(self.experiment.arms)
            probed = len({c.arm for c in self.experiment.claims.values() if c.kind == "sensitivity"})
            counts[task] = {
                "tuning": arms * len(plan.lrs) * plan.tuning_seeds,
                "pilot": 2 * plan.pilot_seeds,
                "test": arms * plan.test_seeds,
                "high": (1 + probed) * plan.test_seeds if plan.high_lr else 0,
                "own": (arms - 1) * plan.own_seeds,
                "control": plan.control_seeds,
            }
        return counts


def value(summary: dict[str, Any], split: Literal["validation", "test"]) -> float:
    """The metric of record of a finished run: the task's worst value if it diverged, and never worse than that."""
    worst, metric = float(summary["worst"]), summary["metric"]
    if summary["status"] == "diverged":
        return worst
    measured = float(summary["metrics"][split][metric])
    if not math.isfinite(measured):
        return worst
    return max(measured, worst) if summary["higher_is_better"] else min(measured, worst)


def best_lr(results: list[tuple[float, dict[str, Any]]]) -> float:
    """The lr with the best mean validation metric over its seeds; of equals the smallest."""
    by_lr: dict[float, list[float]] = {}
    for lr, summary in results:
        by_lr.setdefault(lr, []).append(value(summary, "validation"))
    sign = 1 if results[0][1]["higher_is_better"] else -1
    return max(sorted(by_lr), key=lambda lr: sign * sum(by_lr[lr]) / len(by_lr[lr]))


def load(name: str) -> Experiment:
    """The experiment of that name in conf/experiment/, or in the file whose path that is.

    Raises:
        UserError: if it is not there, or for any mistake in it, in one line.
    """
    path = Path(name) if name.endswith(".yaml") else CONF / "experiment" / f"{name}.yaml"
    if not path.exists():
        names = [p.stem for p in (CONF / "experiment").glob("*.yaml")]
        raise UserError(f"no experiment is called {name!r}{nearest(name, names)}")
    return read(path)


def read(path: Path) -> Experiment:
    """The experiment in a YAML file."""
    where = f"experiment {path.stem}"
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{where}: {first_line(error)}") from None
    except Exception as error:  # the YAML parser's own, which omegaconf passes on
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a mapping of keys")
    settings = {str(k): v for k, v in values.items()}
    for key, kind in (("tasks", TaskPlan), ("claims", Claim)):
        entries = settings.get(key)
        if isinstance(entries, dict):
            for n, v in entries.items():
                if not isinstance(v, dict):
                    raise UserError(f"{where}: {key}.{n}: not a mapping of keys")
            settings[key] = {n: build(kind, v, f"{where}: {key}.{n}") for n, v in entries.items()}
    return build(Experiment, {"name": path.stem, **settings}, where)
