"""LAMB."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.lars import trust_ratio
from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class LAMB(Rule):
    """LAMB: Adam whose step is scaled, tensor by tensor, to the norm of the weights.

    m, v as Adam;  u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay theta
    direction = ||theta|| / ||u|| u, u itself where theta or u is 0

    As the paper with phi(z) = z; some implementations limit the norm of the weights to [0, 10], and Nvidia's
    scales the gradient to a global norm of 1 first (clip_norm=1 is close to it). The package pytorch_optimizer
    corrects m's bias after the ratio, v's not at all, and has that limit. Its weight decay is inside the
    ratio (weight_decay_mode "internal").
    """

    paper: ClassVar[str] = "You et al. 2020, arXiv 1904.00962"
    family: ClassVar[str] = "layerwise"
    published_lr: ClassVar[float] = 1.76e-3  # recalled of the paper (batches of 4096), not verified
    weight_decay_mode: ClassVar[WeightDecayMode] = "internal"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    elementwise: ClassVar[bool] = False
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-6

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "v": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"mean": 1 / (1 - self.beta1**t), "root": (1 - self.beta2**t).rsqrt()}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        u = (m / v.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"]).add_(p * c.get("weight_decay", 0.0))
        length = torch.linalg.vector_norm(u)
        return u * trust_ratio(torch.linalg.vector_norm(p), length, length)
