"""AdaBelief."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class AdaBelief(Rule):
    """AdaBelief: Adam with the gradient's variance about its mean in place of its mean square.

    m <- beta1 m + (1 - beta1) g;  s <- beta2 s + (1 - beta2) (g - m)^2 + eps
    direction = m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps)

    As the authors' package with rectify=False, and as the paper: eps is added twice, within s at every step
    (so that s tends to eps / (1 - beta2) where the gradient is constant) and to the root. Optax has the two as
    eps_root and eps. The package's default rectify=True, RAdam's rectifier on top, is not implemented. Its
    default eps is this one; the paper's experiments take 1e-8, 1e-12 and 1e-16, and it matters.
    """

    paper: ClassVar[str] = "Zhuang et al. 2020, arXiv 2010.07468"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("s",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-16

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "s": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"mean": 1 / (1 - self.beta1**t), "root": (1 - self.beta2**t).rsqrt()}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        d = g - m
        s = state["s"].mul_(self.beta2).addcmul_(d, d, value=1 - self.beta2).add_(self.eps)
        return (m / s.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"])
