"""A run as a value: composed by Hydra, checked, normalised and given an id.

Everything that can change a run's result is a field of ``Run``; its id hashes these typed values. Mistakes of
a user end here, as a ``UserError`` of one clear line, before anything is trained.
"""

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from optimizers import decays, rule, warmups
from optimizers.engine import Execution
from optimizers.rule import NonNegative, Positive, Rule, WeightDecayMode
from optimizers.scaling import SCALINGS, Scaling
from runners.initialisations import INITIALISATIONS, Initialisation
from tasks.task import Task
from tasks.task import available as tasks_available

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


class UserError(Exception):
    """A mistake in a config, on the command line or of the machine, told in one line."""


ModelExecution = Literal["eager", "compiled", "cuda_graph"]
Steps = Literal["default", "all"] | tuple[Annotated[int, Field(ge=1)], ...]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Probes:
    """What is measured beside loss, lr and warmup factor, and at which steps (counted from 1).

    Each is ``default`` (the first 100 steps, then every 20th, and the last), ``all``, a list of steps, or [] for none.

    Attributes:
        norms: global gradient norm (before clipping) and root mean square of the parameters' change.
        l1_norms: sum of |gradient| over all coordinates (before clipping).
        update_quantiles: quantiles of |change of a parameter| / lr over all coordinates, lr the peak rate.
        gradient_histogram: histogram of log10 |gradient| over all coordinates.
    """

    norms: Steps = "default"
    l1_norms: Steps = ()
    update_quantiles: Steps = ()
    gradient_histogram: Steps = ()

    def steps(self, name: str, total: int) -> frozenset[int]:
        """The steps in 1..total at which a probe measures."""
        listed = getattr(self, name)
        if listed == "all":
            return frozenset(range(1, total + 1))
        if listed == "default":
            return frozenset(range(1, min(100, total) + 1)) | frozenset(range(20, total + 1, 20)) | {total}
        return frozenset(t for t in listed if t <= total)

    def covers(self, wanted: "Probes", total: int) -> bool:
        """Whether every measurement that ``wanted`` asks for is among these."""
        names = [f.name for f in dataclasses.fields(Probes)]
        return all(wanted.steps(name, total) <= self.steps(name, total) for name in names)

    def with_those_of(self, other: "Probes", total: int) -> "Probes":
        """All measurements of both: two experiments that share a run and ask for different ones agree on this."""
        return Probes(**{
            f.name: getattr(self, f.name) if other.steps(f.name, total) <= self.steps(f.name, total)
            else tuple(sorted(self.steps(f.name, total) | other.steps(f.name, total)))
            for f in dataclasses.fields(Probes)
        })  # fmt: skip


@dataclass(frozen=True, config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class Run:
    """One training run. All fields are its science but ``probes``, which only says what is recorded.

    Attributes:
        lr: peak learning rate; the rate of step t is lr * warmup(t) * decay(t), times the scaling's factor for the
            task's batch size (``peak_lr`` is the product of the two that do not depend on t).
        weight_decay_mode: None is the mode of the rule's authors (see optimizers.engine).
        weight_decay_on: all parameters, or matrices only (no biases, no norm layers: fewer than 2 dimensions).
        clip_norm: largest global gradient norm, None for no clipping.
        steps: budget in optimizer steps.
        precision: float32, which is IEEE's on a GPU too and not TF32, or bfloat16 by autocast (parameters and optimizer
            state stay float32, and so do LSTMs on a GPU, where autocast knows float16 alone for them).
        execution: how the optimizer's step is run, see optimizers.engine.
        model_execution: how the model's forward and backward passes of training are run, see runners.loss.
        scaling, initialisation: see optimizers.scaling and runners.initialisations.
        later: as of a rule: fields that are left out of the id at their default.
    """

    later: ClassVar[tuple[str, ...]] = ("initialisation", "model_execution")

    optimizer: Rule
    warmup: warmups.Warmup
    decay: decays.Decay
    task: Task
    lr: Positive
    seed: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)]
    weight_decay: NonNegative = 0.0
    weight_decay_mode: WeightDecayMode | None = None
    weight_decay_on: Literal["all", "matrices"] = "all"
    clip_norm: Positive | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    execution: Execution = "flat"
    scaling: Scaling = Scaling()
    initialisation: Initialisation = Initialisation()
    model_execution: ModelExecution = "eager"
    probes: Probes = Probes()

    def __post_init__(self) -> None:
        if self.optimizer.own_warmup and type(self.warmup) is not warmups.Warmup:
            raise ValueError(
                f"{name_of(self.optimizer)} has its own warmup, so warmup must be none, not {name_of(self.warmup)}"
            )
        self.warmup.factor(torch.ones(1, dtype=torch.float64), self.optimizer.second_moment_beta)
        if type(self.scaling) is not Scaling and not hasattr(self.task, "batch_size"):
            raise ValueError(f"scaling {name_of(self.scaling)}: task {name_of(self.task)} has no batch_size")

    @property
    def peak_lr(self) -> float:
        """The peak rate that the optimizer is given: lr, scaled for the task's batch size (in the unit of its own
        ``batch_size``, a field or a property that needs no data)."""
        return self.lr * self.scaling.factor(getattr(self.task, "batch_size", 1))

    @functools.cached_property
    def science(self) -> dict[str, Any]:
        """All that decides the result, as plain typed values; the data's fingerprint apart."""
        mode = self.weight_decay_mode or self.optimizer.weight_decay_mode
        defaults = _defaults()
        later = {name: getattr(self, name) for name in self.later if getattr(self, name) != defaults[name]}
        return {
            **self._parts,
            # A scaling rule changes nothing but this: where its factor is 1 the run is the one without it.
            "lr": self.peak_lr,
            "seed": self.seed,
            "steps": self.steps,
            "weight_decay": self.weight_decay,
            # Without decay its mode changes nothing.
            "weight_decay_mode": mode if self.weight_decay else "none",
            "weight_decay_on": self.weight_decay_on if self.weight_decay else "all",
            "clip_norm": self.clip_norm,
            "precision": self.precision,
            "execution": self.execution,
            **{name: value if isinstance(value, str) else plain(value) for name, value in later.items()},
        }

    @functools.cached_property
    def _parts(self) -> dict[str, Any]:
        """What the science has of other objects, by far most of it."""
        return {name: plain(getattr(self, name)) for name in ("optimizer", "warmup", "decay", "task")}

    def id(self, fingerprint: str) -> str:
        """16 hex digits: the hash of the science and of the data's fingerprint."""
        text = json.dumps({**self.science, "data": fingerprint}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> "Run":
        """The same run with some fields changed, checked again."""
        run = dataclasses.replace(self, **changes)
        if not changes.keys() & self._parts.keys():
            run.__dict__["_parts"] = self._parts  # those of the same objects: a sweep has thousands of such runs
        return run


@functools.cache
def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(Run)}


TABLES: dict[str, dict[str, Any]] = {
    "warmup": dict(warmups.WARMUPS),
    "decay": dict(decays.DECAYS),
    "scaling": dict(SCALINGS),
    "initialisation": dict(INITIALISATIONS),
}
"""What a run is composed of beside its optimizer and task, by group of conf/ and name."""

Part = Rule | warmups.Warmup | decays.Decay | Scaling | Initialisation | Task


def name_of(thing: Part) -> str:
    """The name by which YAML knows a part of a run."""
    if isinstance(thing, Rule):
        return type(thing).__name__.lower()
    if isinstance(thing, Task):
        return type(thing).__module__.rpartition(".")[2]
    return next(name for table in TABLES.values() for name, kind in table.items() if kind is type(thing))


def plain(thing: Part) -> dict[str, Any]:
    """Name, fields and revision of a part of a run as plain JSON values."""
    values: dict[str, Any] = {"name": name_of(thing)}
    later = thing.later if isinstance(thing, Rule | Task) else ()
    for field in dataclasses.fields(thing):  # type: ignore[arg-type]
        value = getattr(thing, field.name)
        default = getattr(field.default, "default", field.default)  # pydantic's Field(default=...)
        if field.name in later and value == default:
            continue
        values[field.name] = plain(value) if isinstance(value, Rule) else value
    if isinstance(thing, Rule | Task):
        values["revision"] = thing.revision
    return json.loads(json.dumps(values))


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Place:
    """Where and how a run is carried out: nothing here changes its result, so nothing here is in its id.

    Attributes:
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.
        store: folder of the run directories.
        data_root: folder of local data sets; None looks at the environment variable UNTUNED_DATA.
        checkpoint_every: steps between checkpoints; 0 for none (runs of seconds).
        logger: none or wandb.
    """

    device: str = "auto"
    store: str = "runs"
    data_root: str | None = None
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    logger: Literal["none", "wandb"] = "none"

    def torch_device(self) -> torch.device:
        """The device, which must be there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.zeros(1, device=device).item()  # meta has no values
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {self.device!r} is not there: {first_line(error)}") from None
        return device

    @property
    def data(self) -> str | None:
        """The data root in force."""
        return self.data_root or os.environ.get("UNTUNED_DATA") or None


def compose_run(overrides: Sequence[str], where: str = "") -> tuple[Run, Place]:
    """The run and its place that ``conf/run.yaml`` and the overrides describe.

    Raises:
        UserError: for any mistake, in one line that names the key and the nearest valid one.
    """
    try:
        return _built(_settings(list(overrides)))
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def from_config(config: DictConfig) -> tuple[Run, Place]:
    """As ``compose_run``, from a config that Hydra has composed."""
    return _built(_values(config))


def _settings(overrides: list[str]) -> dict[str, Any]:
    """The values that ``conf/run.yaml`` and the overrides describe.

    The task is composed apart from the rest: nothing in conf/ refers from one to the other, and an experiment of a
    arms on t tasks is then composed a + t times, not a * t times, of a tenth of a second each.
    """
    if any("${" in text for text in overrides):  # one that may refer to anything
        return _values(_compose(overrides))
    of_task = [text for text in overrides if text.partition("=")[0].lstrip("+~").partition(".")[0] == "task"]
    task = _composed(tuple(of_task))
    settings = _composed(tuple(text for text in overrides if text not in of_task))
    return {name: (task if name == "task" else settings)[name] for name in settings if name != "task" or name in task}


def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return copy.deepcopy(_composed_once(overrides))


@functools.lru_cache(maxsize=1024)
def _composed_once(overrides: tuple[str, ...]) -> dict[str, Any]:
    return _values(_compose(list(overrides)))


def _values(config: DictConfig) -> dict[str, Any]:
    try:
        for key in sorted(OmegaConf.missing_keys(config)):
            raise UserError(f"{key}: a value is needed, as in {key}=...")
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(first_line(error)) from None
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def _built(settings: dict[str, Any]) -> tuple[Run, Place]:
    place_names = [f.name for f in dataclasses.fields(Place)]
    place = build(Place, {k: settings.pop(k) for k in place_names if k in settings}, "")
    settings["optimizer"] = _named(settings, "optimizer", rule.available())
    settings["task"] = _named(settings, "task", tasks_available())
    needed = {f.name for f in dataclasses.fields(Run) if f.default is dataclasses.MISSING}
    for group, table in TABLES.items():
        if group in settings or group in needed:
            settings[group] = _named(settings, group, table)
    settings["probes"] = build(Probes, settings.get("probes") or {}, "probes")
    if settings.get("steps") is None:
        settings["steps"] = settings["task"].steps
    return build(Run, settings, ""), place


def _named(settings: dict[str, Any], key: str, table: Any) -> Any:
    """The object that ``{name: ..., fields}`` under a key describes."""
    if not isinstance(settings.get(key), dict):
        raise UserError(f"{key}: one is needed{nearest('', table)}")
    values = dict(settings[key])
    name = values.pop("name", None)
    if name not in table:
        raise UserError(f"{key}.name: {name!r} is not known{nearest(str(name), table)}")
    inner = values.get("inner")
    if key == "optimizer" and isinstance(inner, dict):
        values["inner"] = _named({"optimizer": inner}, "optimizer", table)
    return build(table[name], values, f"{key} ({name})")


def build(kind: Any, values: dict[str, Any], where: str) -> Any:
    """Construct a checked dataclass from a mapping; a mistake becomes a UserError that names the key."""
    prefix = f"{where}: " if where else ""
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise UserError(f"{prefix}unknown key {key!r}{nearest(str(key), known)}")
    try:
        return kind(**values)
    except ValidationError as error:
        # Where alternatives were tried, the one that got furthest; its loc names the alternatives too.
        first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
        path = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        given = f" (got {first['input']!r})" if first["loc"] and first["type"] != "missing" else ""
        raise UserError(f"{prefix}{path + ': ' if path else ''}{message}{given}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{prefix}{first_line(error)}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known word, else all of them."""
    words = [str(k) for k in known]
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(words))}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_COMPOSING = (HydraException, OmegaConfBaseException, ValueError, TypeError)
"""What Hydra raises for a bad override: its own exceptions, and plain ones for ``optimizer=null``."""


def _compose(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return compose("run", overrides=overrides)
        except _COMPOSING as error:
            raise UserError(_explain(overrides, error)) from None


def _explain(overrides: list[str], error: Exception) -> str:
    """Which override is wrong, with the nearest valid word. Hydra's own message says neither in one line."""
    fitting: list[str] = []
    # Hydra chooses files first, wherever that stands: then a value that one of them has no place for is to blame.
    for text in sorted(overrides, key=lambda text: "." in text.partition("=")[0].partition("@")[0]):
        try:
            compose("run", overrides=[*fitting, text])
            fitting.append(text)
        except _COMPOSING as one:
            try:
                key = OverridesParser.create().parse_override(text).key_or_group
            except _COMPOSING:
                key = ""
            if not key:
                return f"{text!r} is not of the form key=value"
            group = key.partition("@")[0]
            options = [path.stem for path in (CONF / group).glob("*.yaml")]
            value = text.partition("=")[2]
            if options and value not in options:
                return f"{key}: {value!r} is not known{nearest(value, options)}"
            node: Any = compose("run", overrides=fitting)
            *parents, last = key.lstrip("+~").split(".")
            for i, part in enumerate(parents):
                if not isinstance(node, DictConfig) or part not in node:
                    last, parents = part, parents[:i]
                    break
                node = node[part]
            if isinstance(node, DictConfig) and last not in node:
                path = ".".join([*parents, last])
                return f"unknown key {path!r}{nearest(last, [str(k) for k in node])}"
            return f"{text!r}: {first_line(one)}"
    return first_line(error)
