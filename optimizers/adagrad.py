"""Adagrad."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class Adagrad(Rule):
    """Adagrad: the gradient over the root of the sum of all squared gradients so far.

    s <- s + g^2, from s = initial;  direction = g / (sqrt(s) + eps)

    As torch.optim.Adagrad, whose lr_decay is a schedule and so not here. The paper adds its delta as eps;
    TensorFlow's version starts from s = 0.1. Torch's default learning rate is 1e-2.
    """

    paper: ClassVar[str] = "Duchi et al. 2011, JMLR 12"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-2  # torch; the paper tunes it
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    nonnegative_state: ClassVar[tuple[str, ...]] = ("s",)

    initial: NonNegative = 0.0
    eps: NonNegative = 1e-10

    def init(self, p: Tensor) -> State:
        return {"s": zeros(p).add_(self.initial)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        return g / state["s"].addcmul_(g, g).sqrt().add_(self.eps)
