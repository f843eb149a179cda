"""RMSProp."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Flag, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class RMSProp(Rule):
    """RMSProp: the gradient over the root of the mean squared gradient, without bias correction.

    v <- beta2 v + (1 - beta2) g^2;  centered: a <- beta2 a + (1 - beta2) g and v - a^2 in place of v
    u = g / (sqrt(v) + eps);  with momentum: b <- momentum b + u, direction = b, else direction = u

    As torch.optim.RMSprop, where beta2 is called alpha. TensorFlow's adds eps inside the root and starts from
    v = 1. v - a^2 is kept from falling below 0, where torch's rounding makes it NaN. v starts at 0, so that
    the first steps are up to 1 / sqrt(1 - beta2) times a usual one: the opposite of a warmup.
    """

    paper: ClassVar[str] = "Tieleman & Hinton 2012, lecture 6e"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-2  # torch; the lecture gives none
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("b",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta2: Beta = 0.99
    eps: NonNegative = 1e-8
    momentum: Beta = 0.0
    centered: Flag = False

    def init(self, p: Tensor) -> State:
        names = ("v", *(("a",) if self.centered else ()), *(("b",) if self.momentum else ()))
        return {name: zeros(p) for name in names}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        if self.centered:
            a = state["a"].lerp_(g, 1 - self.beta2)
            v = v.addcmul(a, a, value=-1).clamp_(min=0)
        u = g / v.sqrt().add_(self.eps)
        return state["b"].mul_(self.momentum).add_(u) if self.momentum else u
