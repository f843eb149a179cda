"""AdaMax."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class AdaMax(Rule):
    """AdaMax: Adam with a decaying maximum of |gradient| in place of the root mean square.

    m <- beta1 m + (1 - beta1) g;  u <- max(beta2 u, |g| + eps)
    direction = m / (1 - beta1^t) / u

    u needs no bias correction. As torch.optim.Adamax; the paper has no eps, and so 0 / 0 where
    every gradient so far was 0. The paper's learning rate is 2e-3.
    """

    paper: ClassVar[str] = "Kingma & Ba 2015, arXiv 1412.6980"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 2e-3  # paper
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("u",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "u": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"mean": 1 / (1 - self.beta1**t)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        u = state["u"].mul_(self.beta2).clamp_(min=g.abs().add_(self.eps))
        return (m / u).mul_(c["mean"])
