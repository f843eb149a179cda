"""NAdam."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class NAdam(Rule):
    """NAdam: Adam with Nesterov momentum, whose momentum mu rises to beta1 over the first steps.

    mu_t = beta1 (1 - 0.5 * 0.96^(t momentum_decay));  M_t = mu_1 mu_2 ... mu_t;  m, v as Adam
    direction = ( mu_(t+1) m / (1 - M_(t+1)) + (1 - mu_t) g / (1 - M_t) ) / (sqrt(v / (1 - beta2^t)) + eps)

    As torch.optim.NAdam, which keeps M_t in float32 (in torch's default dtype) and so differs by about 1e-9.
    Its default learning rate is 2e-3.
    """

    paper: ClassVar[str] = "Dozat 2016, ICLR workshop"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 2e-3  # torch, after Keras
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8
    momentum_decay: NonNegative = 4e-3

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "v": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        # A product over all steps so far, made from the first step on: it has no state that a late parameter
        # or a checkpoint could get wrong.
        steps = torch.arange(1, int(t.max()) + 2, dtype=t.dtype)
        mu = self.beta1 * (1 - 0.5 * 0.96 ** (steps * self.momentum_decay))
        product = mu.cumprod(0)
        now = t.long() - 1
        return {
            "ahead": mu[now + 1] / (1 - product[now + 1]),
            "now": (1 - mu[now]) / (1 - product[now]),
            "root": (1 - self.beta2**t).rsqrt(),
        }

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return (m * c["ahead"]).add_(g * c["now"]).div_(v.sqrt().mul_(c["root"]).add_(self.eps))
