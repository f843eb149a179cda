"""Positive-negative momentum: PNM and AdaPNM."""

import math
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Flag, NonNegative, Rule, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class PNM(Rule):
    """PNM: the newest momentum minus a share of the one before, from two that take turns.

    m_t = beta1^2 m_(t-2) + (1 - beta1^2) g_t
    direction = ((1 + beta0) m_t - beta0 m_(t-1)) / sqrt((1 + beta0)^2 + beta0^2)

    The two momenta see every second gradient each, so that their difference amplifies the gradient's noise
    while its mean stays. As the authors' code, whose betas=(beta1, beta0); here they have their names. The
    code says which tensor is whose turn by the parity of t; here the older one is always in ``before``.
    """

    paper: ClassVar[str] = "Xie et al. 2021, arXiv 2103.17182"
    family: ClassVar[str] = "sgd"
    published_lr: ClassVar[float] = 0.1  # paper
    momentum_state: ClassVar[tuple[str, ...]] = ("m", "before")

    beta1: Beta = 0.9
    beta0: NonNegative = 1.0

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "before": zeros(p)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        return positive_negative(g, state["m"], state["before"], self.beta1, self.beta0)


@dataclass(frozen=True, config=SCHEMA)
class AdaPNM(Rule):
    """AdaPNM: Adam with positive-negative momentum, and by default AMSGrad's maximum.

    m_t = beta1^2 m_(t-2) + (1 - beta1^2) g_t;  v as Adam;  amsgrad: top <- max(top, v), else top = v
    n = ((1 + beta0) m_t - beta0 m_(t-1)) / sqrt((1 + beta0)^2 + beta0^2)
    direction = n / (1 - beta1^t) / (sqrt(top / (1 - beta2^t)) + eps)

    As the authors' code, whose betas=(beta1, beta2, beta0). Its correction 1 - beta1^t is not that of m_t,
    which at odd t is 1 - beta1^(t+1) and at even t 1 - beta1^t. The package pytorch_optimizer adds 1e-15 to top.
    """

    paper: ClassVar[str] = "Xie et al. 2021, arXiv 2103.17182"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    momentum_state: ClassVar[tuple[str, ...]] = ("m", "before")
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v", "top")

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    beta0: NonNegative = 1.0
    eps: NonNegative = 1e-8
    amsgrad: Flag = True

    def init(self, p: Tensor) -> State:
        names = ("m", "before", "v", *(("top",) if self.amsgrad else ()))
        return {name: zeros(p) for name in names}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"mean": 1 / (1 - self.beta1**t), "root": (1 - self.beta2**t).rsqrt()}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        n = positive_negative(g, state["m"], state["before"], self.beta1, self.beta0)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        top = state["top"].clamp_(min=v) if self.amsgrad else v
        return n.div_(top.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"])


def positive_negative(g: Tensor, m: Tensor, before: Tensor, beta1: float, beta0: float) -> Tensor:
    """Advance the two momenta, the newer in m and the older in before, and weigh one against the other."""
    newest = before * beta1**2 + g * (1 - beta1**2)
    # The contents change places rather than the tensors, which a step compiled once could not do.
    before.copy_(m)
    m.copy_(newest)
    return newest.mul_(1 + beta0).add_(before, alpha=-beta0).mul_(1 / math.hypot(1 + beta0, beta0))
