"""The conformance table. A rule is added to the package by one file, one YAML, and one row or more here.

A row gives a rule's settings, the reference that it must match over 100 steps, and learning rates at which it
must descend. test_conformance.py runs every row.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from optimizers import Engine
from optimizers.decays import Linear
from optimizers.rule import available
from tests.optimizers import recurrences
from tests.optimizers.problems import gradient, run, start
from tests.optimizers.recurrences import Recurrence, TensorRecurrence

LR = 0.01
STEPS = 100

Reference = Callable[[], dict[int, list[Tensor]]]
"""The parameters of problems.start() after some of the steps 1..100, in float64."""


def torch_has(make: Callable[[Any], torch.optim.Optimizer]) -> Reference:
    """The reference is a torch optimizer."""

    def follow() -> dict[int, list[Tensor]]:
        params, seen = start(), {}
        # torch keeps some scalars in the default dtype, as NAdam the product of its momenta.
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            run(make(params), params, 1, STEPS, lambda t: seen.update({t: [p.detach().clone() for p in params]}))
        finally:
            torch.set_default_dtype(before)
        return seen

    return follow


def package_has(name: str, *, over: Any = None, **options: Any) -> Reference:
    """The reference is an optimizer of the package pytorch_optimizer, ``over`` a torch optimizer where it wraps."""

    def make(params: Any) -> torch.optim.Optimizer:
        import pytorch_optimizer

        kind = getattr(pytorch_optimizer, name)
        return kind(over(params), **options) if over else kind(params, lr=LR, **options)

    return torch_has(make)


def authors(file: str, case: str) -> Reference:
    """The reference is a trajectory of the authors' own code, from reference/."""

    def follow() -> dict[int, list[Tensor]]:
        text = (Path(__file__).parent / "reference" / f"{file}.json").read_text()
        shapes = [p.shape for p in start()]
        params = json.loads(text)["cases"][case]["params"]
        return {
            int(t): [torch.tensor(v, dtype=torch.float64).reshape(s) for v, s in zip(both, shapes, strict=True)]
            for t, both in params.items()
        }

    return follow


class AuthorsRAdam(torch.optim.Optimizer):
    """The arithmetic of the authors' RAdam, operation by operation, in a dtype of choice.

    Their code runs in float32 whatever the dtype of the parameters, so their trajectories carry its rounding.
    test_radam.py shows that in float32 this class reproduces them; in float64 it is the reference of a row.
    """

    def __init__(self, params: Any, idle: bool, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(params, {})
        self.idle, self.dtype, self.t = idle, dtype, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        beta1, beta2 = BETAS
        self.t += 1
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * self.t * beta2**self.t / (1 - beta2**self.t)
        for p in self.param_groups[0]["params"]:
            x, g, state = p.to(self.dtype), p.grad.to(self.dtype), self.state[p]
            m = state.setdefault("m", torch.zeros_like(x)).mul_(beta1).add_(g, alpha=1 - beta1)
            v = state.setdefault("v", torch.zeros_like(x)).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if length >= 5:
                above = (length - 4) / (limit - 4) * (length - 2) / length * limit / (limit - 2)
                size = math.sqrt((1 - beta2**self.t) * above) / (1 - beta1**self.t)
                x = x.add(x, alpha=-0.02 * LR).addcdiv_(m, v.sqrt().add_(1e-8), value=-size * LR)
                p.copy_(x)
            elif not self.idle:
                x = x.add(x, alpha=-0.02 * LR).add_(m, alpha=-LR / (1 - beta1**self.t))
                p.copy_(x)


def paper(recurrence: Recurrence) -> Reference:
    """The reference is a recurrence in plain floats."""

    def follow() -> dict[int, list[Tensor]]:
        seen: dict[int, list[Tensor]] = {t: [] for t in range(1, STEPS + 1)}
        for tensor, p in enumerate(start()):
            paths = [
                itertools.islice(recurrence(x, lambda t, x, n=tensor, i=i: gradient(n, i, t, x)), STEPS)
                for i, x in enumerate(p.flatten().tolist())
            ]
            for t, values in enumerate(zip(*paths, strict=True), start=1):
                seen[t].append(torch.tensor(values, dtype=torch.float64).reshape(p.shape))
        return seen

    return follow


def paper_of_tensors(recurrence: TensorRecurrence) -> Reference:
    """The reference is a recurrence in plain floats over whole tensors."""

    def follow() -> dict[int, list[Tensor]]:
        params = start()

        def gradients(t: int, now: recurrences.Vectors) -> recurrences.Vectors:
            return [[gradient(n, i, t, x) for i, x in enumerate(values)] for n, values in enumerate(now)]

        path = itertools.islice(recurrence([p.flatten().tolist() for p in params], gradients), STEPS)
        return {
            t: [torch.tensor(v, dtype=torch.float64).reshape(p.shape) for v, p in zip(now, params, strict=True)]
            for t, now in enumerate(path, start=1)
        }

    return follow


@dataclass(frozen=True)
class Row:
    """One rule with its settings.

    Attributes:
        rule: its name in YAML.
        hyper: its hyper-parameters.
        reference: what it must match.
        options: options of the engine, as the reference's weight decay; its learning rate where it is not LR.
        also: a reference in another package that it equals, too.
        quadratic, rosenbrock: learning rates at which it must descend.
    """

    rule: str
    hyper: dict[str, Any]
    reference: Reference
    options: dict[str, Any] = field(default_factory=dict)
    also: Reference | None = None
    quadratic: float = 0.1
    rosenbrock: float = 0.05

    def __str__(self) -> str:
        values = {**self.hyper, **self.options}
        shown = (f"{k}={v['name'] if isinstance(v, dict) else v}" for k, v in values.items())
        return " ".join([self.rule, *shown])

    def make(self, params: Any, lr: float | None = None, **options: Any) -> Engine:
        """The row's optimizer, at the learning rate of its reference."""
        kind = getattr(optimizers, available()[self.rule].__name__)
        values = {"lr": LR, **self.hyper, **self.options, **options}
        return kind(params, **(values if lr is None else values | {"lr": lr}))

    def descent(self, lr: float, steps: int) -> Callable[[list[nn.Parameter]], Engine]:
        """The row's optimizer without weight decay and with a linear decay, to converge."""
        return lambda params: self.make(params, lr, weight_decay=0.0, decay=Linear(), steps=steps)


B = {"beta1": 0.9, "beta2": 0.99}
BETAS = (0.9, 0.99)
DECAY = {"weight_decay": 0.02}
DECOUPLED = {"weight_decay": 0.02, "weight_decouple": True}
SGD = {"quadratic": 0.05, "rosenbrock": 0.001}
ADAM = {"name": "adam", **B}
KALMAN = {**DECAY, "lr": 0.1}
MOMENTUM = {"name": "sgd", "momentum": 0.9}
T = torch.optim

ROWS = [
    Row("sgd", {}, torch_has(lambda p: T.SGD(p, LR)), **SGD),
    Row("sgd", {}, torch_has(lambda p: T.SGD(p, LR, weight_decay=0.02)), DECAY, **SGD),
    Row("sgd", {"momentum": 0.9}, torch_has(lambda p: T.SGD(p, LR, 0.9, weight_decay=0.02)), DECAY, **SGD),
    Row(
        "sgd",
        {"momentum": 0.9, "nesterov": True},
        torch_has(lambda p: T.SGD(p, LR, 0.9, weight_decay=0.02, nesterov=True)),
        DECAY,
        **SGD,
    ),
    Row("adam", {}, torch_has(lambda p: T.Adam(p, LR))),
    Row("adam", B, torch_has(lambda p: T.Adam(p, LR, BETAS, weight_decay=0.02)), DECAY),
    Row("adam", {"eps": 1e-4}, torch_has(lambda p: T.Adam(p, LR, eps=1e-4))),
    Row("adamw", B, torch_has(lambda p: T.AdamW(p, LR, BETAS, weight_decay=0.02)), DECAY),
    Row("adamax", {}, torch_has(lambda p: T.Adamax(p, LR)), also=package_has("AdaMax"), rosenbrock=0.2),
    Row("adamax", B, torch_has(lambda p: T.Adamax(p, LR, BETAS, weight_decay=0.02)), DECAY),
    Row(
        "adam2k",
        {**B, "frozen_steps": 30},
        paper(recurrences.adam2k(LR, 0.9, 0.99, 30, 0.02)),
        DECAY,
    ),
    Row("radam", B, paper(recurrences.radam(LR, 0.9, 0.99, 0.02)), DECAY, rosenbrock=0.005),
    # The limit of rho is 3 here, so every step is a momentum step.
    Row("radam", {"beta2": 0.5}, paper(recurrences.radam(LR, 0.9, 0.5, 0.0)), quadratic=0.05, rosenbrock=0.001),
    Row(
        "radam",
        {**B, "variant": "torch"},
        torch_has(lambda p: T.RAdam(p, LR, BETAS, weight_decay=0.02, decoupled_weight_decay=True)),
        DECAY,
        rosenbrock=0.005,
    ),
    Row(
        "radam",
        {**B, "variant": "torch"},
        torch_has(lambda p: T.RAdam(p, LR, BETAS, weight_decay=0.02)),
        {**DECAY, "weight_decay_mode": "coupled"},
        rosenbrock=0.005,
    ),
    Row(
        "radam",
        {**B, "variant": "torch"},
        torch_has(lambda p: AuthorsRAdam(p, idle=False)),
        {**DECAY, "weight_decay_mode": "decoupled"},
        also=package_has("RAdam", betas=BETAS, **DECOUPLED, degenerated_to_sgd=True),
        rosenbrock=0.005,
    ),
    Row(
        "radam",
        {**B, "variant": "authors"},
        torch_has(lambda p: AuthorsRAdam(p, idle=True)),
        DECAY,
        also=package_has("RAdam", betas=BETAS, **DECOUPLED, degenerated_to_sgd=False),
    ),
    Row(
        "adan",
        {},
        authors("adan", "adan, proximal decay"),
        DECAY,
        also=package_has("Adan", betas=(0.98, 0.92, 0.99), weight_decay=0.02),
    ),
    Row("adan", {}, authors("adan", "adan, no_prox"), {**DECAY, "weight_decay_mode": "decoupled"}),
    Row(
        "adan",
        {"restart_every": 30},
        paper(recurrences.adan(LR, (0.98, 0.92, 0.99), 30, 0.02)),
        DECAY,
    ),
    # Tensors as small as these stay in 32 bits; test_eight_bit.py has larger ones.
    Row("eightbit", {"inner": ADAM}, torch_has(lambda p: T.Adam(p, LR, BETAS, weight_decay=0.02)), DECAY),
    # The averages themselves are compared with torch in test_averaging.py.
    Row(
        "iterateaveraging",
        {"inner": {"name": "adamw", **B}, "start": 20, "every": 7},
        torch_has(lambda p: T.AdamW(p, LR, BETAS, weight_decay=0.02)),
        DECAY,
        quadratic=0.5,
        rosenbrock=0.5,
    ),
    Row(
        "iterateaveraging",
        {"inner": ADAM, "kind": "ema", "beta": 0.9, "start": 3},
        torch_has(lambda p: T.Adam(p, LR, BETAS)),
    ),
    Row(
        "lookahead",
        {"inner": ADAM},
        authors("lookahead", "lookahead of torch Adam"),
        also=package_has("Lookahead", over=lambda p: T.Adam(p, LR, BETAS), k=5, alpha=0.8, pullback_momentum="none"),
    ),
    Row(
        "lookahead",
        {"inner": MOMENTUM, "momentum": "reset"},
        authors("lookahead", "lookahead of torch SGD momentum, momentum reset"),
        **SGD,
    ),
    Row(
        "lookahead",
        {"inner": MOMENTUM, "momentum": "pullback"},
        paper(recurrences.lookahead_pullback(LR, 0.9, 5, 0.8)),
        **SGD,
    ),
    Row(
        "lookahead",
        {"inner": MOMENTUM, "momentum": "pullback_authors"},
        authors("lookahead", "lookahead of torch SGD momentum, momentum pullback"),
        **SGD,
    ),
    Row("amsgrad", {}, torch_has(lambda p: T.Adam(p, LR, amsgrad=True))),
    Row("amsgrad", B, torch_has(lambda p: T.Adam(p, LR, BETAS, weight_decay=0.02, amsgrad=True)), DECAY),
    Row("nadam", {}, torch_has(lambda p: T.NAdam(p, LR))),
    Row(
        "nadam",
        {**B, "momentum_decay": 0.1},
        torch_has(lambda p: T.NAdam(p, LR, BETAS, weight_decay=0.02, momentum_decay=0.1, decoupled_weight_decay=True)),
        {**DECAY, "weight_decay_mode": "decoupled"},
    ),
    Row("adagrad", {}, torch_has(lambda p: T.Adagrad(p, LR)), quadratic=0.5, rosenbrock=0.5),
    Row(
        "adagrad",
        {"initial": 0.1},
        torch_has(lambda p: T.Adagrad(p, LR, weight_decay=0.02, initial_accumulator_value=0.1)),
        DECAY,
        quadratic=0.5,
        rosenbrock=0.5,
    ),
    Row("rmsprop", {}, torch_has(lambda p: T.RMSprop(p, LR))),
    Row(
        "rmsprop",
        {"beta2": 0.9, "momentum": 0.8, "centered": True},
        torch_has(lambda p: T.RMSprop(p, LR, 0.9, weight_decay=0.02, momentum=0.8, centered=True)),
        DECAY,
    ),
    Row(
        "lion",
        {},
        paper(recurrences.lion(LR, 0.9, 0.99, 0.02)),
        DECAY,
        also=package_has("Lion", betas=BETAS, **DECOUPLED),
    ),
    Row(
        "adabelief",
        {**B, "eps": 1e-8},
        authors("adabelief", "adabelief, no rectify, decoupled"),
        DECAY,
        also=package_has("AdaBelief", betas=BETAS, eps=1e-8, **DECOUPLED, rectify=False),
    ),
    Row(
        "diffgrad",
        B,
        authors("diffgrad", "diffgrad, corrected"),
        also=package_has("DiffGrad", betas=BETAS, eps=1e-8),
    ),
    Row(
        "diffgrad",
        {**B, "variant": "published"},
        authors("diffgrad", "diffgrad, published code, gradient buffer reused in place"),
    ),
    Row(
        "acprop",
        B,
        authors("acprop", "acprop, rectify False, decoupled False"),
        {**DECAY, "weight_decay_mode": "coupled"},
        rosenbrock=0.003,
    ),
    Row("acprop", B, authors("acprop", "acprop, rectify False, decoupled True"), DECAY, rosenbrock=0.003),
    Row(
        "acprop",
        {**B, "rectify": True},
        authors("acprop", "acprop, rectify True, decoupled True"),
        DECAY,
        rosenbrock=0.003,
    ),
    Row(
        "pnm",
        {},
        authors("pnm", "pnm, decoupled decay"),
        DECAY,
        also=package_has("PNM", betas=(0.9, 1.0), **DECOUPLED),
        rosenbrock=0.0025,
    ),
    Row("adapnm", B, authors("pnm", "adapnm, amsgrad, decoupled decay"), DECAY, rosenbrock=0.2),
    Row(
        "adapnm",
        {**B, "amsgrad": False},
        authors("pnm", "adapnm, no amsgrad, decoupled decay"),
        DECAY,
    ),
    Row(
        "generalizedsignsgd",
        B,
        authors("generalized_signsgd", "generalized signsgd"),
    ),
    Row(
        "generalizedsignsgd",
        {"beta2": 0.0, "eps": 0.0},
        paper(recurrences.sign_of_momentum(LR, 0.9)),
        also=package_has("SignSGD", momentum=0.9),
    ),
    Row(
        "generalizedsignsgd",
        {**B, "bias_correction": True},
        paper(recurrences.corrected_signsgd(LR, 0.9, 0.99)),
    ),
    Row("normalizedsgd", {}, paper_of_tensors(recurrences.normalized_sgd(LR, 0.9))),
    Row("padam", B, paper(recurrences.padam(LR, 0.9, 0.99, 0.125, True))),
    Row(
        "padam",
        {**B, "power": 0.2, "amsgrad": False},
        paper(recurrences.padam(LR, 0.9, 0.99, 0.2, False)),
        also=package_has("PAdam", betas=BETAS, partial=0.2),
    ),
    Row("lars", {"trust": 0.05}, paper_of_tensors(recurrences.lars(LR, 0.9, 0.05, 0.02)), DECAY),
    Row("lamb", B, paper_of_tensors(recurrences.lamb(LR, 0.9, 0.99, 0.02)), DECAY),
    Row("koalav", {"variant": "published"}, authors("koala", "koala-v"), KALMAN, quadratic=1.0, rosenbrock=1.0),
    Row("koalav", {}, paper_of_tensors(recurrences.koala_v(0.1, 0.02)), KALMAN, quadratic=1.0, rosenbrock=1.0),
    Row("koalam", {}, authors("koala", "koala-m"), KALMAN, quadratic=1.0, rosenbrock=1.0),
    # Torch's learning rate is also its largest rate, which 100 steps do not get below.
    Row(
        "adafactor",
        {"relative_step": False},
        torch_has(lambda p: T.Adafactor(p, LR)),
    ),
    Row("adafactor", {}, package_has("AdaFactor", betas=(None, 0.999)), {"lr": 1.0}, quadratic=90.0, rosenbrock=90.0),
    Row(
        "adafactor",
        {"largest_rate": 0.3, "clip": 0.5},
        paper_of_tensors(recurrences.adafactor(LR, [0, 3], 0.3, 0.5)),
        quadratic=3.0,
        rosenbrock=3.0,
    ),
]
