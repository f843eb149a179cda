"""Padam."""

from typing import Annotated, ClassVar

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Flag, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class Padam(Rule):
    """Padam: partially adaptive, between SGD with momentum (power 0) and AMSGrad (power 1/2).

    m, v as Adam;  top <- max(top, v), without amsgrad top = v
    direction = m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(top) + eps)^(2 power)

    As the authors' code, whatever the power: it corrects v by the root of 1 - beta2^t, which only at power 1/2
    is v's own correction, and adds eps before it. The paper corrects no bias. ``power`` is its p (the code's
    ``partial``, 1/4 there), 1/8 in its experiments, with learning rates near SGD's (0.1).
    """

    paper: ClassVar[str] = "Chen et al. 2020, arXiv 1806.06763"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 0.1  # paper
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v", "top")

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8
    power: Annotated[float, Strict(), Field(ge=0, le=0.5)] = 0.125
    amsgrad: Flag = True

    def init(self, p: Tensor) -> State:
        names = ("m", "v", *(("top",) if self.amsgrad else ()))
        return {name: zeros(p) for name in names}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"scale": (1 - self.beta2**t).sqrt() / (1 - self.beta1**t)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        top = state["top"].clamp_(min=v) if self.amsgrad else v
        return (m / top.sqrt().add_(self.eps).pow_(2 * self.power)).mul_(c["scale"])
