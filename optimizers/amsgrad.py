"""AMSGrad."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.adam import Adam
from optimizers.rule import SCHEMA, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class AMSGrad(Adam):
    """AMSGrad: Adam whose second moment never shrinks.

    m, v as Adam;  top <- max(top, v)
    direction = m / (1 - beta1^t) / (sqrt(top / (1 - beta2^t)) + eps)

    As torch.optim.Adam(amsgrad=True), which takes the maximum before the bias correction; the paper corrects
    no bias, and Keras takes the maximum after it. With weight_decay_mode="decoupled" this is AMSGradW.
    """

    paper: ClassVar[str] = "Reddi et al. 2018, arXiv 1904.09237"
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v", "top")

    def init(self, p: Tensor) -> State:
        return super().init(p) | {"top": zeros(p)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        top = state["top"].clamp_(min=v)
        return (m / top.sqrt().mul_(c["root"]).add_(self.eps)).mul_(c["mean"])
