"""Decays: pure functions of the step t = 1, 2, ... and the budget that multiply the learning rate.

With s = min(1, (t - 1) / steps), the share of the budget already spent, every decay starts at 1; linear and
cosine stay at 0 beyond the budget.
"""

from typing import Annotated, Any

import torch
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Positive


@dataclass(frozen=True, config=SCHEMA)
class Decay:
    """No decay: 1 throughout. The base of the others."""

    def factor(self, t: Tensor, steps: int) -> Tensor:
        """The factor at the steps t (float64, any shape) of a run of ``steps`` steps."""
        return torch.ones_like(t)


@dataclass(frozen=True, config=SCHEMA)
class Linear(Decay):
    """1 - s: to zero, which would be reached at step ``steps`` + 1, so that no step is wasted at 0."""

    def factor(self, t: Tensor, steps: int) -> Tensor:
        return 1 - _spent(t, steps)


@dataclass(frozen=True, config=SCHEMA)
class Cosine(Decay):
    """(1 + cos(pi s)) / 2, without restarts. Source: Loshchilov & Hutter 2017."""

    def factor(self, t: Tensor, steps: int) -> Tensor:
        return (1 + torch.cos(torch.pi * _spent(t, steps))) / 2


@dataclass(frozen=True, config=SCHEMA)
class Milestones(Decay):
    """gamma^k after k milestones, given as shares of the budget (CIFAR: 81/186 and 122/186)."""

    at: tuple[Annotated[float, Strict(), Field(gt=0, lt=1)], ...]
    gamma: Annotated[float, Strict(), Field(gt=0, le=1)] = 0.1

    def factor(self, t: Tensor, steps: int) -> Tensor:
        # Compared in whole steps: s and a milestone computed apart may differ in the last bit.
        passed = sum(((t - 1) >= round(share * steps)).to(t.dtype) for share in self.at)
        return torch.ones_like(t) * self.gamma**passed


@dataclass(frozen=True, config=SCHEMA)
class InverseSqrt(Decay):
    """min(1, sqrt(tau / t)): constant up to step tau. Source: Vaswani et al. 2017, with tau their warmup."""

    tau: Positive

    def factor(self, t: Tensor, steps: int) -> Tensor:
        return (self.tau / t).sqrt().clamp(max=1.0)


DECAYS: dict[str, type[Decay]] = {
    "constant": Decay,
    "linear": Linear,
    "cosine": Cosine,
    "milestones": Milestones,
    "inverse_sqrt": InverseSqrt,
}


def make(name: str, **values: Any) -> Decay:
    """The decay of that name in YAML."""
    if name not in DECAYS:
        raise ValueError(f"no decay is called {name!r}; there are: {', '.join(DECAYS)}")
    return DECAYS[name](**values)


def _spent(t: Tensor, steps: int) -> Tensor:
    return ((t - 1) / steps).clamp(max=1.0)
