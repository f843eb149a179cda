"""Adam-2k, the control of the RAdam paper."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.adam import Adam
from optimizers.rule import SCHEMA, Count, Scalars, State, WeightDecayMode


@dataclass(frozen=True, config=SCHEMA)
class Adam2k(Adam):
    """Adam-2k: Adam that for its first 2000 steps only learns its second moment, and then starts.

    v as Adam, at every step. While t <= frozen_steps: m = 0, the parameters and their decay stand still. Then
      m <- beta1 m + (1 - beta1) g;  direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    A control that gives Adam a good estimate of v without the small steps of a warmup. As the authors' code:
    t keeps running while frozen, so that m starts from 0 with a bias correction that is already about 1, and
    the first ten or so released steps are small (a hidden ramp 1 - beta1^j). The paper's text counts the
    frozen steps as -1999 ... 0.

    It counts as having its own warmup: the paper uses it with no other, and a warmup over the step number
    would mostly pass while nothing moves. A budget, and a decay over it, count the frozen steps.
    """

    paper: ClassVar[str] = "Liu et al. 2020, arXiv 1908.03265, section 3.2"
    published_lr: ClassVar[float] = 3e-4  # RAdam's authors, on translation
    own_warmup: ClassVar[bool] = True
    weight_decay_mode: ClassVar[WeightDecayMode] = "decoupled"

    frozen_steps: Count = 2000

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        released = (t > self.frozen_steps).to(t.dtype)
        return super().coefficients(t) | {"lr": released, "gain": (1 - self.beta1) * released}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].mul_(self.beta1).add_(g * c["gain"])
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return (m / v.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"])
