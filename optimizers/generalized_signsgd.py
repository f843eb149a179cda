"""Generalized SignSGD."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Flag, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class GeneralizedSignSGD(Rule):
    """Generalized SignSGD: the momentum over the root of its own mean square.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) m^2
    direction = m / (sqrt(v) + eps)

    As the authors' code. Adam has g^2 where this has m^2. beta2 = 0 is the sign of the momentum (SignSGD with
    momentum; with beta1 = 0, too, SignSGD) but where it is not far above eps. Without bias correction, as in
    the paper, v is small at first and the first step is 1 / sqrt(1 - beta2) times a usual one, 32 times at the
    defaults; bias_correction=True divides m and v by 1 - beta1^t and 1 - beta2^t, as the authors did on PTB.
    """

    paper: ClassVar[str] = "Crawshaw et al. 2022, arXiv 2208.11195"
    family: ClassVar[str] = "sign"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8
    bias_correction: Flag = False

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "v": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        if not self.bias_correction:
            return {"mean": torch.ones_like(t), "root": torch.ones_like(t)}
        return {"mean": 1 / (1 - self.beta1**t), "root": (1 - self.beta2**t).rsqrt()}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(m, m, value=1 - self.beta2)
        return (m / v.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"])
