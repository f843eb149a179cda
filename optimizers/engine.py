"""The engine: a torch.optim.Optimizer that runs any rule.

theta <- theta - lr * warmup(t) * decay(t) * direction, with one named mode of weight decay. Everything that
concerns parameters as a set is here: param groups, clipping, closures, state_dict, how a rule is executed.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import math
import numbers
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from optimizers.decays import Decay
from optimizers.execution import NoCompiler, run, run_compiled
from optimizers.layout import ALONE, PIECE, Layouts, places
from optimizers.rule import (
    HALF,
    WEIGHT_DECAY_MODES,
    Rule,
    Scalars,
    State,
    WeightDecayMode,
    available,
    defines,
    describe,
)
from optimizers.warmups import Warmup

Execution = Literal["eager", "flat", "compiled"]

# Coefficients are computed for this many steps at a time: a table a chunk, not a tensor a step.
CHUNK = 1024


_SPARSE = operator.attrgetter("grad.is_sparse")

# torch's own methods without the decorator that has torch.compile leave them alone: at its first call that one imports
# the compiler, which takes a process 4 s, whether it compiles or not.
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class Engine(torch.optim.Optimizer):
    """A rule as an ordinary torch optimizer; ``optimizers.RAdam`` and the others are subclasses of it.

    Args:
        params: parameters or param groups; a group may set lr, weight_decay, weight_decay_mode and every
            hyper-parameter of the rule.
        lr: learning rate alpha. Torch's LR schedulers work as usual on top of ``warmup`` and ``decay``. A
            tensor is read at every step, which on a GPU waits for the device.
        weight_decay: strength of the decay, used as ``weight_decay_mode`` says:
            coupled     g <- g + weight_decay * theta (L2 regularisation)
            decoupled   theta <- (1 - lr_t * weight_decay) theta, before the step (AdamW)
            proximal    theta <- theta / (1 + lr_t * weight_decay), after the step (Adan)
            internal    the rule has the decay inside its own direction (LARS, LAMB and KOALA, and they alone)
            none        no decay, whatever the strength
        weight_decay_mode: None takes the mode of the rule's authors.
        clip_norm: gradients are scaled so that their global norm is at most this (as
            torch.nn.utils.clip_grad_norm_: in place, before anything else).
        warmup, decay: schedules, functions of the number of ``step()`` calls.
        steps: the budget of the run, which most decays need.
        execution: ``eager``: tensor by tensor; ``flat``: small tensors of a group copied into one, updated and copied
            back, large ones in pieces that fit a CPU's cache, which is fastest without a compiler; ``compiled``: by
            torch.compile, small tensors joined as in flat and large ones where they are. An elementwise rule is
            compiled once a process, for models of all shapes, which takes seconds; on disk the program stays for
            other processes. Where torch.compile does not work, say without a C++ compiler, a warning says so and
            execution is flat. They agree up to rounding. A rule with a norm for each tensor is never flattened; one
            with a norm over all tensors always is, by group, dtype, device and number of updates.
        hyper: hyper-parameters of the rule; ``betas=(.9, .999)`` is understood as ``beta1=.9, beta2=.999``.

    Raises:
        ValueError: on any bad or unknown hyper-parameter, and for a warmup on a rule that has its own.

    The scalars of a step follow each parameter's own number of updates, as in torch, so a parameter that
    joins late has its own bias correction; warmup and decay follow the group's. State keeps its own dtype
    when a ``state_dict`` is loaded (torch casts it to the parameter's). The step of a parameter of half
    precision is computed in float32 and rounded once (torch rounds after the decay and again after the step).

    ``state_dict`` holds the param groups and the state; warmup, decay, steps, clip_norm and execution are the
    constructor's. Sparse gradients and complex parameters are refused; torch's ``maximize``, ``foreach``,
    ``fused``, ``capturable`` and ``differentiable`` do not exist here.
    """

    rule_type: ClassVar[type[Rule]]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        weight_decay_mode: WeightDecayMode | None = None,
        clip_norm: float | None = None,
        warmup: Warmup | None = None,
        decay: Decay | None = None,
        steps: int | None = None,
        execution: Execution = "eager",
        **hyper: Any,
    ) -> None:
        if clip_norm is not None and not (isinstance(clip_norm, numbers.Real) and float(clip_norm) > 0):
            raise ValueError(f"clip_norm must be a number > 0, got {clip_norm!r}")
        if execution not in get_args(Execution):
            raise ValueError(f"execution must be one of {', '.join(get_args(Execution))}, got {execution!r}")
        if not isinstance(warmup, Warmup | None):
            raise ValueError(f"warmup must be one of optimizers.warmups, got {warmup!r}")
        if not isinstance(decay, Decay | None):
            raise ValueError(f"decay must be one of optimizers.decays, got {decay!r}")
        if decay is not None and type(decay) is not Decay and steps is None:
            raise ValueError("a decay needs the budget: give steps=")
        if steps is not None and not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"steps must be a whole number >= 1, got {steps!r}")
        self.warmup, self.decay, self.steps = warmup or Warmup(), decay or Decay(), steps
        self.clip_norm, self.execution = clip_norm, execution
        self._rules: dict[int, tuple[dict[str, Any], Rule]] = {}
        self._layouts = Layouts()
        rule = self._make_rule(_without_betas(hyper))
        mode = weight_decay_mode or rule.weight_decay_mode
        defaults = {"lr": lr, "weight_decay": weight_decay, "weight_decay_mode": mode, "step": 0}
        super().__init__(params, {**defaults, **_plain(rule)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; an unknown option, or a bad value, raises ValueError."""
        group = _without_betas(param_group)
        # torch's schedulers ask for initial_lr in a group when they resume.
        unknown = set(group) - set(self.defaults) - {"params", "param_names", "initial_lr"}
        if unknown:
            known = ", ".join(k for k in self.defaults if k != "step")
            raise ValueError(f"unknown option {sorted(unknown)[0]!r} in a param group; there are: {known}")
        options = {**self.defaults, **group}
        for name in ("lr", "weight_decay"):
            value = options[name].item() if isinstance(options[name], Tensor) else options[name]
            if not (isinstance(value, numbers.Real) and 0 <= float(value) < math.inf):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if options["weight_decay_mode"] not in WEIGHT_DECAY_MODES:
            modes = ", ".join(WEIGHT_DECAY_MODES)
            given = options["weight_decay_mode"]
            raise ValueError(f"weight_decay_mode must be one of {modes}, got {given!r}")
        rule = self._make_rule(self._hyper(options))
        if rule.own_warmup and type(self.warmup) is not Warmup:
            raise ValueError(f"{type(rule).__name__} has its own warmup: use it with no other")
        if options["weight_decay_mode"] == "internal" != rule.weight_decay_mode:
            raise ValueError(f"{type(rule).__name__} has no internal weight decay: use another weight_decay_mode")
        self.warmup.factor(torch.ones(1, dtype=torch.float64), rule.second_moment_beta)
        # As plain values, so that a state_dict holds nothing that torch.load refuses.
        _add_param_group(self, {**group, **_plain(rule)})

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {f.name: group[f.name] for f in dataclasses.fields(self.rule_type)}

    def _make_rule(self, hyper: dict[str, Any]) -> Rule:
        try:
            return self.rule_type(**hyper)
        except ValidationError as error:
            # Pydantic's report has four lines a mistake; a user of torch expects one.
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            problem = first["msg"].removeprefix("Value error, ")
            if first["type"] == "unexpected_keyword_argument":
                kind = self.rule_type
                *wrappers, _ = first["loc"]
                for name in wrappers:  # "inner", once for each wrapper around it
                    hyper = hyper[str(name)]
                    kind = available()[hyper["name"]]
                known = ", ".join(f.name for f in dataclasses.fields(kind))
                problem = f"unknown option {where!r}; {kind.__name__} has: {known}"
            elif where:
                problem = f"{where}: {problem}, got {first['input']!r}"
            raise ValueError(f"{self.rule_type.__name__}: {problem}") from None

    def _rule(self, index: int) -> Rule:
        """The rule of a group; made anew when a hyper-parameter in the group was changed."""
        group = self.param_groups[index]
        cached = self._rules.get(index)
        values = self._hyper(group)
        if cached is None or cached[0] != values:
            cached = self._rules[index] = (copy.deepcopy(values), self._make_rule(values))
        return cached[1]

    def schedule(self, t: int, beta2: float | None) -> float:
        """warmup(t) * decay(t) for a rule with that beta2."""
        chunk, offset = divmod(t - 1, CHUNK)
        return _factors(self.warmup, self.decay, self.steps, beta2, chunk)[offset]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """One step. A closure re-evaluates the model and returns the loss, which is returned.

        A rule that needs the loss takes ``loss``, or else what the closure returned: a number, or the losses of
        the examples. It is used where it is, so that a step does not wait for the device.

        Raises:
            ValueError: for a rule that needs the loss, without one.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        with_grad = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        everything: list[Any] = list(itertools.chain.from_iterable(with_grad))
        if not everything:
            warnings.warn(
                "no parameter of this optimizer has a gradient: nothing is updated. If the model's "
                "parameters were replaced, as load_state_dict(assign=True) does, make the optimizer again "
                "and load its state_dict.",
                stacklevel=2,
            )
            return returned
        if any(map(_SPARSE, everything)) or any(map(Tensor.is_complex, everything)):
            raise ValueError("sparse gradients (use sparse=False) and complex parameters are not supported")
        given = self._given_loss(returned if loss is None else loss)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(everything, self.clip_norm)
        for index, params in enumerate(with_grad):
            group, rule = self.param_groups[index], self._rule(index)
            grads = [p.grad for p in params]
            group["step"] += 1
            lr = float(group["lr"]) * self.schedule(group["step"], rule.second_moment_beta)
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state.update(step=0, **rule.init(p))
                state["step"] += 1
            for t, at in places([state["step"] for state in states]).items():
                same = ([params[i] for i in at], [grads[i] for i in at], [states[i] for i in at])
                self._advance(rule, group, *same, _coefficients(rule, t), lr, given)
        return returned

    def _given_loss(self, loss: Any) -> Scalars:
        """The loss as a scalar of the step, for rules that need it."""
        rules = [self._rule(index) for index in range(len(self.param_groups))]
        if not any(rule.needs_loss for rule in rules):
            return {}
        if loss is None:
            raise ValueError(f"{type(self).__name__} needs the loss: call step(loss=loss), or step with a closure")
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        return {"loss": value.float() if value.dtype in HALF else value}

    def _advance(
        self,
        rule: Rule,
        group: dict[str, Any],
        params: list[Any],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        c: dict[str, float],
        lr: float,
        given: Scalars,
    ) -> None:
        decay = group["weight_decay"]
        mode: WeightDecayMode = group["weight_decay_mode"] if decay else "none"
        if not rule.joint and (self.execution == "eager" or not rule.elementwise):
            if self.execution == "compiled":  # to a program each number of updates would be another constant
                states = [{k: v for k, v in state.items() if k != "step"} for state in states]
            self._update(rule, mode, params, grads, states, c, lr, decay, given)
            return
        alone, piece = math.inf, sys.maxsize
        if rule.elementwise:
            alone, piece = (ALONE, sys.maxsize) if self.execution == "compiled" else (PIECE, PIECE)
        for layout in self._layouts.of(params, states, alone, piece):
            vectors = layout.gather(grads)
            self._update(rule, mode, layout.vectors, vectors, layout.states, c, lr, decay, given)
            layout.scatter()

    def _update(
        self,
        rule: Rule,
        mode: WeightDecayMode,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        c: dict[str, float],
        lr: float,
        decay: float,
        given: Scalars,
    ) -> None:
        if self.execution == "compiled":
            try:
                run_compiled(rule, mode, params, grads, states, c, lr, decay, given)
            except NoCompiler as why:
                warnings.warn(f"execution is flat, as torch.compile does not work here: {why}", stacklevel=2)
                self.execution = "flat"
        if self.execution != "compiled":
            run(rule, mode, params, grads, states, {**c, **given}, lr, decay)
        if defines(rule, "after_step") or defines(rule, "predict"):
            for p, state in zip(params, states, strict=True):
                rule.after_step(p, state, c)
                rule.predict(p, state)

    @contextmanager
    def evaluation_weights(self) -> Iterator[bool]:
        """Within this context the parameters hold the weights to evaluate (Lookahead's slow weights, an
        average); afterwards they are again what they were, to the bit. Says whether there are such weights:
        statistics that a model keeps of its own (BatchNorm) are still those of the other ones then."""
        saved: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for index, group in enumerate(self.param_groups):
                    rule = self._rule(index)
                    for p in group["params"]:
                        weights = rule.evaluation(p, self.state[p]) if p in self.state else None
                        if weights is not None:
                            saved.append((p, p.clone()))
                            p.copy_(weights)
            yield bool(saved)
        finally:
            with torch.no_grad():
                for p, value in saved:
                    p.copy_(value)

    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state tensor keeps the dtype it was saved with.

        Raises:
            ValueError: for the state_dict of another optimizer, or of other parameters.
        """
        for group in state_dict["param_groups"]:
            if missing := sorted(set(self.defaults) - set(group)):
                name = type(self).__name__
                raise ValueError(f"this is not the state_dict of {name}: a param group has no {missing[0]!r}")
        _load_state_dict(self, state_dict)
        saved = state_dict["state"]
        ids = itertools.chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for key, p in zip(ids, params, strict=True):
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(device=p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps defaults, state and param_groups only; a copy must keep its schedule too.
        own = ("warmup", "decay", "steps", "clip_norm", "execution")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there; here it would be an option of groups
        self._rules, self._layouts = {}, Layouts()


def engine_of(rule_type: type[Rule]) -> type[Engine]:
    """The optimizer class that runs a rule, with the rule's name and documentation."""
    doc = f"{rule_type.__doc__}\n\n    Arguments beside the hyper-parameters: see Engine.\n    "
    body = {"rule_type": rule_type, "__doc__": doc, "__module__": "optimizers"}
    return type(rule_type.__name__, (Engine,), body)


def _plain(rule: Rule) -> dict[str, Any]:
    """A rule's hyper-parameters as plain values."""
    return {k: v for k, v in describe(rule).items() if k != "name"}


# Rules, warmups and decays are values, so that equal ones share their tables, across engines too. The caches
# are bounded: a run needs one entry of each a param group, parameters that joined late a few more.
@functools.lru_cache(maxsize=32)
def _table(rule: Rule, chunk: int) -> list[dict[str, float]]:
    columns = {k: v.tolist() for k, v in rule.coefficients(_steps_of(chunk)).items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows or [{}] * CHUNK


def _coefficients(rule: Rule, t: int) -> dict[str, float]:
    chunk, offset = divmod(t - 1, CHUNK)
    return _table(rule, chunk)[offset]


@functools.lru_cache(maxsize=32)
def _factors(warmup: Warmup, decay: Decay, steps: int | None, beta2: float | None, chunk: int) -> list[float]:
    t = _steps_of(chunk)
    factor = warmup.factor(t, beta2)
    return (factor if steps is None else factor * decay.factor(t, steps)).tolist()


def _steps_of(chunk: int) -> Tensor:
    return torch.arange(chunk * CHUNK + 1, (chunk + 1) * CHUNK + 1, dtype=torch.float64)


def _without_betas(values: dict[str, Any]) -> dict[str, Any]:
    """``betas=(a, b)`` as ``beta1=a, beta2=b``, for those who come from torch."""
    values = dict(values)
    for i, beta in enumerate(values.pop("betas", ()), start=1):
        values[f"beta{i}"] = beta
    return values
