"""Adam and AdamW."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class Adam(Rule):
    """Adam: the mean gradient over the root of the mean squared gradient, both bias-corrected.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    As torch.optim.Adam. RAdam and the first version of TensorFlow's Adam add eps before the correction of v.
    """

    paper: ClassVar[str] = "Kingma & Ba 2015, arXiv 1412.6980"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # paper
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "v": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"mean": 1 / (1 - self.beta1**t), "root": (1 - self.beta2**t).rsqrt()}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return (m / v.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"])


@dataclass(frozen=True, config=SCHEMA)
class AdamW(Adam):
    """AdamW: Adam with decoupled weight decay, theta <- (1 - lr(t) * weight_decay) theta before the step.

    As torch.optim.AdamW, lr(t) with warmup and decay in it; the paper multiplies by the schedule only, not by
    the learning rate, so its weight_decay is ours times lr.
    """

    paper: ClassVar[str] = "Loshchilov & Hutter 2019, arXiv 1711.05101"
    weight_decay_mode: ClassVar[WeightDecayMode] = "decoupled"
