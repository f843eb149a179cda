"""ACProp."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rectifier import rectification, rho
from optimizers.rule import SCHEMA, Beta, Flag, NonNegative, Rule, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class ACProp(Rule):
    """ACProp: the raw gradient over a centred second moment that does not contain it yet.

    direction = g_t / (sqrt((s_(t-1) + eps) / (1 - beta2^(t-1))) + eps), at the first step g_1 itself
    m <- beta1 m + (1 - beta1) g;  s <- beta2 (s + eps) + (1 - beta2) (g - m)^2

    As the authors' code: the numerator is the gradient and not m (some accounts have m), the difference is to
    the new m (Optax: to the old one, which is a factor of beta1), and eps stays in s. The first step, which
    has no denominator, is one of plain SGD at the learning rate of an adaptive method.

    rectify=True multiplies by RAdam's rectifier, with the authors' choices: while rho_t < 5 the direction is
    m / (1 - beta1^t), a momentum step; then r_t g_t sqrt(1 - beta2^t) / (sqrt(s_(t-1) + eps) + eps), with t
    and not t-1 in the correction. It is the default of their class, while their experiments on images switch
    it off, as the paper's algorithm does.
    """

    paper: ClassVar[str] = "Zhuang et al. 2021, arXiv 2110.05454"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    nonnegative_state: ClassVar[tuple[str, ...]] = ("s",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-16
    rectify: Flag = False

    @property
    def own_warmup(self) -> bool:  # type: ignore[override]
        return self.rectify

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "s": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        if self.rectify:
            rho_t = rho(t, self.beta2)
            adaptive = (rho_t >= 5).to(t.dtype)
            corrected = 1 / (1 - self.beta1**t)
            rectified = rectification(rho_t, self.beta2) * (1 - self.beta2**t).sqrt()
            scale, root = torch.where(rho_t >= 5, rectified, corrected), adaptive
        else:
            adaptive = (t > 1).to(t.dtype)
            # At t = 1 there is nothing to correct, and m is (1 - beta1) g.
            scale = torch.where(t > 1, torch.ones_like(t), torch.ones_like(t) / (1 - self.beta1))
            root = adaptive * (1 - self.beta2 ** (t - 1).clamp(min=1)).rsqrt()
        # One formula for both kinds of step: the numerator is g or m, the denominator root * sqrt(s) + floor.
        return {
            "gradient": adaptive,
            "momentum": 1 - adaptive,
            "scale": scale,
            "root": root,
            "floor": self.eps * adaptive + (1 - adaptive),
        }

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        s = state["s"].add_(self.eps)
        denominator = s.sqrt().mul_(c["root"]).add_(c["floor"])
        direction = (g * c["gradient"]).add_(m * c["momentum"]).div_(denominator).mul_(c["scale"])
        d = g - m
        s.mul_(self.beta2).addcmul_(d, d, value=1 - self.beta2)
        return direction
