"""RAdam, in its three published forms."""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rectifier import rectification, rho
from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class RAdam(Rule):
    """RAdam: Adam whose step is multiplied by the rectifier r_t once the variance of its rate exists.

    m, v as Adam; rho_t as rectifier.py; where rho_t is above the threshold
      direction = r_t m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps)
    and before
      direction = m / (1 - beta1^t), a momentum step that is not normalised, or no step at all.

    "RAdam" is not one algorithm, so the variant has a name:
      paper    threshold rho_t > 4, momentum steps before (the default)
      torch    threshold rho_t > 5, momentum steps before: torch.optim.RAdam (whose decay is coupled unless
               decoupled_weight_decay is set), and the authors' code with degenerated_to_sgd=True
      authors  threshold rho_t >= 5, idle before (not even weight decay): the authors' code as published
    For every usual beta2 the first adaptive step is 5 in the paper and 6 in the other two. With beta2 <= 0.6
    it never comes. The paper's box has no eps; all published code has it where it stands here. The authors'
    code also rounds parameters, gradients and moments to float32, whatever their dtype; this one does not.
    """

    paper: ClassVar[str] = "Liu et al. 2020, arXiv 1908.03265"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    own_warmup: ClassVar[bool] = True
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8
    variant: Literal["paper", "torch", "authors"] = "paper"

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "v": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        rho_t = rho(t, self.beta2)
        adaptive = {"paper": rho_t > 4, "torch": rho_t > 5, "authors": rho_t >= 5}[self.variant]
        corrected = 1 / (1 - self.beta1**t)
        rectified = corrected * rectification(rho_t, self.beta2) * (1 - self.beta2**t).sqrt()
        rooted = adaptive.to(t.dtype)
        active = torch.ones_like(t) if self.variant != "authors" else rooted
        # One formula for both branches: the denominator root * sqrt(v) + floor is 1 in a momentum step.
        return {
            "lr": active,
            "scale": torch.where(adaptive, rectified, corrected),
            "root": rooted,
            # Not torch.where(adaptive, eps, 1.0), which is a float32 where both are Python floats.
            "floor": self.eps * rooted + (1 - rooted),
        }

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return (m / v.sqrt().mul_(c["root"]).add_(c["floor"])).mul_(c["scale"])
