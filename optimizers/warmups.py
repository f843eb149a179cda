"""Warmups: pure functions omega(t) in [0, 1] of the step t = 1, 2, ... that multiply the learning rate.

The function that is plotted is the function that trains: tensors in, tensors out, float64. Lengths are real
numbers; other implementations truncate 2 / (1 - beta2) to an integer, which floating point makes 1999 at
beta2 = 0.999.
"""

from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rectifier import rectification, rho
from optimizers.rule import SCHEMA, Positive


@dataclass(frozen=True, config=SCHEMA)
class Warmup:
    """No warmup: omega(t) = 1. The base of the others."""

    def factor(self, t: Tensor, beta2: float | None) -> Tensor:
        """omega at the steps t (float64, any shape). ``beta2`` is the second-moment decay of the rule that is
        warmed up; only untuned warmups use it, and raise ValueError where the rule has none."""
        return torch.ones_like(t)


@dataclass(frozen=True, config=SCHEMA)
class Linear(Warmup):
    """omega(t) = min(1, t / tau): reaches 1 at step tau."""

    tau: Positive

    def factor(self, t: Tensor, beta2: float | None) -> Tensor:
        return (t / self.tau).clamp(max=1.0)


@dataclass(frozen=True, config=SCHEMA)
class Exponential(Warmup):
    """omega(t) = 1 - exp(-t / tau)."""

    tau: Positive

    def factor(self, t: Tensor, beta2: float | None) -> Tensor:
        return -torch.expm1(-t / self.tau)


@dataclass(frozen=True, config=SCHEMA)
class UntunedLinear(Warmup):
    """omega(t) = min(1, (1 - beta2) t / 2): linear over tau = 2 / (1 - beta2) steps.

    Source: Ma & Yarats 2021, "On the adequacy of untuned warmup for adaptive optimization".
    """

    def factor(self, t: Tensor, beta2: float | None) -> Tensor:
        return ((1 - _known(beta2)) * t / 2).clamp(max=1.0)


@dataclass(frozen=True, config=SCHEMA)
class UntunedExponential(Warmup):
    """omega(t) = 1 - exp(-(1 - beta2) t): exponential with tau = 1 / (1 - beta2).

    Source: Ma & Yarats 2021.
    """

    def factor(self, t: Tensor, beta2: float | None) -> Tensor:
        return -torch.expm1(-(1 - _known(beta2)) * t)


@dataclass(frozen=True, config=SCHEMA)
class Rectifier(Warmup):
    """omega(t) = r_t where rho_t > 4, else 0: RAdam's rectifier as a warmup for Adam.

    The first four steps are idle here, where RAdam takes momentum steps. pytorch_warmup instead shifts the
    schedule so that the first step already has the first non-zero r_t.
    """

    def factor(self, t: Tensor, beta2: float | None) -> Tensor:
        return rectification(rho(t, _known(beta2)), _known(beta2))


WARMUPS: dict[str, type[Warmup]] = {
    "none": Warmup,
    "linear": Linear,
    "exponential": Exponential,
    "untuned_linear": UntunedLinear,
    "untuned_exponential": UntunedExponential,
    "rectifier": Rectifier,
}


def make(name: str, **values: Any) -> Warmup:
    """The warmup of that name in YAML."""
    if name not in WARMUPS:
        raise ValueError(f"no warmup is called {name!r}; there are: {', '.join(WARMUPS)}")
    return WARMUPS[name](**values)


def _known(beta2: float | None) -> float:
    if beta2 is None:
        raise ValueError("an untuned warmup takes its length from beta2, and this optimizer has none")
    return beta2
