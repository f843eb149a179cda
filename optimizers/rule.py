"""What an optimizer is: a pure update rule.

A rule is one file here plus one YAML in conf/optimizer/ and reads like the algorithm box of its paper. It
holds no learning rate: the engine (engine.py) applies -lr * warmup(t) * decay(t) and one weight-decay mode.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import BeforeValidator, ConfigDict, Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor

# Every rule, warmup and decay is a frozen pydantic dataclass with this configuration: its fields are the
# schema of its YAML, and an unknown key, a wrong type or a value out of range is a ValueError.
SCHEMA = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Beta = Annotated[float, Strict(), Field(ge=0, lt=1)]
"""A decay rate of a moving average, in [0, 1)."""
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Strict(), Field(ge=1)]

Flag = Annotated[bool, Strict()]

HALF = (torch.float16, torch.bfloat16)
"""Half precision: such parameters have their moments, and their step computed, in float32."""

State = dict[str, Tensor]
Scalars = dict[str, Any]
"""Scalars of one step: Python floats in eager mode, 0-d tensors in a compiled step. Rules combine them with
tensors by ``*`` and ``+`` only, never as ``alpha=`` or ``value=``, and never branch on them."""

WeightDecayMode = Literal["none", "coupled", "decoupled", "proximal", "internal"]
WEIGHT_DECAY_MODES: tuple[str, ...] = get_args(WeightDecayMode)


@dataclass(frozen=True, config=SCHEMA)
class Rule:
    """An update rule theta <- theta - lr * direction.

    Subclasses are frozen pydantic dataclasses whose fields are the hyper-parameters, and define ``init``,
    ``update`` and, where a scalar depends on the step, ``coefficients``. See adam.py for a complete one.

    Class attributes (facts about the rule, listed by ``python -m optimizers``):
        paper: where the rule comes from.
        family: a word that groups related rules.
        published_lr: the learning rate that the rule's authors publish as their default, or whoever the comment beside
            it names; for these hyper-parameters, without warmup or decay.
        own_warmup: the rule already damps its first steps; combining it with a warmup is an error.
        weight_decay_mode: the mode that the rule's authors use, taken unless another is asked for.
        elementwise: each coordinate's step depends on that coordinate alone, so tensors may be joined.
        joint: the rule takes a norm over all parameters, so the engine joins the tensors of a group into one.
        needs_loss: ``step`` must be given the loss, which is then among the scalars as ``loss``.
        predicts: between steps the parameters stand where the next gradient is taken, and not at the weights.
        momentum_state: names of the state tensors that are momentum (Lookahead can reset them).
        nonnegative_state: names of the state tensors that are never negative (an 8-bit code needs no sign there).
        revision: raised when the rule's mathematics changes, so that old results are not reused.
        later: fields that were added after results were committed: at its default such a field is left out of a
            run's id, so that the old results stay.
    """

    paper: ClassVar[str] = ""
    family: ClassVar[str] = ""
    published_lr: ClassVar[float] = 0.0
    own_warmup: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    weight_decay_mode: ClassVar[WeightDecayMode] = "decoupled"
    momentum_state: ClassVar[tuple[str, ...]] = ()
    nonnegative_state: ClassVar[tuple[str, ...]] = ()
    revision: ClassVar[int] = 1
    later: ClassVar[tuple[str, ...]] = ()

    def init(self, p: Tensor) -> State:
        """The state of one parameter before its first step: tensors, usually ``zeros(p)``."""
        return {}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        """Every scalar that depends on the step, vectorised: t is a float64 tensor of step numbers 1, 2, ...
        of any shape and each value has that shape. A run computes one table of them.

        The name ``lr`` is reserved: a rule that gives it has the learning rate multiplied by it, weight decay
        included (0 is an idle step).
        """
        return {}

    def gather(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], c: Scalars) -> Scalars:
        """What the tensors of a step have in common, a norm over all of them say, as further scalars for ``update``.

        Called before the updates with the tensors of a param group of one step number. Changes nothing.
        """
        return {}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        """Advance ``state`` in place and return the direction, a tensor of p's shape. Never changes p or g.

        ``c`` holds the step's coefficients, what ``gather`` returned, the step's learning rate as ``rate`` (for
        state in the units of the parameters; the direction is multiplied by it), and in the weight-decay mode
        ``internal`` the strength as ``weight_decay``. ``state`` may hold the number of updates besides, as ``step``.
        Works on a tensor of any shape.
        """
        raise TypeError(f"{type(self).__name__} defines no update")

    def after_step(self, p: Tensor, state: State, c: dict[str, float]) -> None:
        """The hook of wrappers: called once p has been updated, always with Python floats; may change p."""

    def predict(self, p: Tensor, state: State) -> None:
        """Move p to where the next gradient is taken: the end of a step, after the hooks of wrappers. A rule that
        does so gives the weights themselves in ``evaluation``."""

    def evaluation(self, p: Tensor, state: State) -> Tensor | None:
        """The weights to evaluate in place of p, or None for p itself."""
        return None

    @property
    def second_moment_beta(self) -> float | None:
        """The beta2 from which untuned warmups take their length; None where the rule has none."""
        return getattr(self, "beta2", None)


Inner = Annotated[Rule, BeforeValidator(lambda value: make(**value) if isinstance(value, dict) else value)]
"""The rule that a wrapper wraps, also as ``{"name": ..., hyper-parameters}``."""


@dataclass(frozen=True, config=SCHEMA)
class Wrapper(Rule):
    """A rule around another rule: everything is the inner rule's until a subclass says otherwise.

    Wrappers compose (a wrapper is a rule) as long as the names of their state tensors and coefficients
    differ, so no wrapper may be inside another of its own type.
    """

    inner: Inner

    def __post_init__(self) -> None:
        rule: Rule = self.inner
        while isinstance(rule, Wrapper):
            if type(rule) is type(self):
                raise ValueError(f"{type(self).__name__} cannot wrap itself: the two would share their state")
            rule = rule.inner

    @property
    def published_lr(self) -> float:  # type: ignore[override]
        return self.inner.published_lr

    @property
    def own_warmup(self) -> bool:  # type: ignore[override]
        return self.inner.own_warmup

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.inner.elementwise

    @property
    def joint(self) -> bool:  # type: ignore[override]
        return self.inner.joint

    @property
    def needs_loss(self) -> bool:  # type: ignore[override]
        return self.inner.needs_loss

    @property
    def predicts(self) -> bool:  # type: ignore[override]
        return self.inner.predicts

    @property
    def weight_decay_mode(self) -> WeightDecayMode:  # type: ignore[override]
        return self.inner.weight_decay_mode

    @property
    def momentum_state(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.momentum_state

    @property
    def nonnegative_state(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.nonnegative_state

    @property
    def second_moment_beta(self) -> float | None:
        return self.inner.second_moment_beta

    def init(self, p: Tensor) -> State:
        return self.inner.init(p)

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return self.inner.coefficients(t)

    def gather(self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], c: Scalars) -> Scalars:
        return self.inner.gather(params, grads, states, c)

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        return self.inner.update(p, g, state, c)

    def after_step(self, p: Tensor, state: State, c: dict[str, float]) -> None:
        self.inner.after_step(p, state, c)

    def predict(self, p: Tensor, state: State) -> None:
        self.inner.predict(p, state)

    def evaluation(self, p: Tensor, state: State) -> Tensor | None:
        return self.inner.evaluation(p, state)


def defines(rule: Rule, method: str) -> bool:
    """Whether a rule, or one that it wraps, has a ``method`` of its own: there is nothing to call otherwise."""
    while isinstance(rule, Wrapper):
        if getattr(type(rule), method) is not getattr(Wrapper, method):
            return True
        rule = rule.inner
    return getattr(type(rule), method) is not getattr(Rule, method)


def zeros(p: Tensor) -> Tensor:
    """A state tensor like p; in float32 where p is of half precision, which is too coarse for moments."""
    dtype = torch.float32 if p.dtype in HALF else p.dtype
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def available() -> dict[str, type[Rule]]:
    """Every rule by its name in YAML: the class name in lower case (``AdamW`` is ``adamw``). Found from the
    files of this package."""
    found: dict[str, type[Rule]] = {}
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        if info.name in ("__main__", "rule"):  # prints this list; the bases
            continue
        module = importlib.import_module(f"{__package__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__:
                found[value.__name__.lower()] = value
    return dict(sorted(found.items()))


def describe(rule: Rule) -> dict[str, Any]:
    """The rule as plain values, name and all hyper-parameters: ``make(**describe(rule)) == rule``."""
    values = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)}
    plain = {k: describe(v) if isinstance(v, Rule) else v for k, v in values.items()}
    return {"name": type(rule).__name__.lower(), **plain}


def make(name: str, **values: Any) -> Rule:
    """The rule of that name."""
    rules = available()
    if name not in rules:
        raise ValueError(f"no optimizer is called {name!r}; there are: {', '.join(rules)}")
    return rules[name](**values)
