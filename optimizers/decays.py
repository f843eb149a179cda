"""Decays: pure functions of the step t = 1, 2, ... and the budget that multiply the learning rate.

With s = min(1, (t - 1) / steps), the share of the budget already spent, every decay but the refined one starts at
1; linear, cosine and refined stay at 0 beyond the budget.
"""

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
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


Norm = Literal["l1", "l2"]


@dataclass(frozen=True, config=SCHEMA)
class Refined(Decay):
    """The schedule that would have been best for a finished run, judging by its gradient norms G_1, ..., G_n:

      Ghat = median filter of G over a tenth of the run;  w_t = Ghat_t^-2 (l2 norms) or Ghat_t^-1 (l1 norms)
      eta_t = w_t (w_{t+1} + ... + w_n), divided by the largest

    It often rises before it falls, so that it has a warmup of its own, and its last step is 0; constant norms
    give (n - t) / (n - 1). l2 is meant for SGD, l1 for Adam. The filter's window is 2 (int(.1 n) // 2) + 1 steps;
    G continues to the left as its first value and to the right mirrored, as in the authors' code. Where the budget
    is not n, eta is interpolated linearly in t / steps, the share of the budget.

    ``run`` is the finished run's id (in YAML in quotes: some ids look like numbers). The norms are no field, as
    they follow from the id; ``from_norms`` puts them there, which the runner does before it trains.

    Source: Defazio et al. 2023, arXiv 2310.07831, and the authors' code.
    """

    run: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    norm: Norm = "l1"

    def from_norms(self, norms: Sequence[float]) -> "Refined":
        """This decay with the norms of ``run``'s gradients at steps 1, 2, ...

        Raises:
            ValueError: if they are fewer than 2, or not all finite and above 0.
        """
        if len(norms) < 2 or not all(0 < g < math.inf for g in norms):
            raise ValueError("a decay is refined from 2 or more gradient norms, all finite and above 0")
        known = copy.copy(self)
        object.__setattr__(known, "_schedule", _schedule(norms, 1 if self.norm == "l1" else 2))
        return known

    @property
    def known(self) -> bool:
        """Whether the norms have been given."""
        return hasattr(self, "_schedule")

    def factor(self, t: Tensor, steps: int) -> Tensor:
        if not self.known:
            raise ValueError(f"the gradient norms of run {self.run} are not known yet: give them to from_norms")
        eta: np.ndarray = getattr(self, "_schedule")  # noqa: B009 - no field, so mypy does not know it
        position = np.asarray(t.cpu()) * len(eta) / steps
        return torch.as_tensor(np.interp(position, np.arange(1, len(eta) + 1), eta)).to(t)


DECAYS: dict[str, type[Decay]] = {
    "constant": Decay,
    "linear": Linear,
    "cosine": Cosine,
    "milestones": Milestones,
    "inverse_sqrt": InverseSqrt,
    "refined": Refined,
}


def make(name: str, **values: Any) -> Decay:
    """The decay of that name in YAML."""
    if name not in DECAYS:
        raise ValueError(f"no decay is called {name!r}; there are: {', '.join(DECAYS)}")
    return DECAYS[name](**values)


def _schedule(norms: Sequence[float], power: int) -> np.ndarray:
    from scipy.ndimage import median_filter  # takes a while to import, and few runs need it

    n = len(norms)
    width = 2 * (int(0.1 * n) // 2) + 1
    padded = np.pad(np.asarray(norms, dtype=np.float64), (0, 2 * width), mode="reflect")
    weights = median_filter(padded, size=width, mode="nearest")[:n] ** -power
    after = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    eta: np.ndarray = weights * after
    return eta / eta.max()


def _spent(t: Tensor, steps: int) -> Tensor:
    return ((t - 1) / steps).clamp(max=1.0)
