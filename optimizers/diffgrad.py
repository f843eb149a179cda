"""diffGrad, as meant and as published."""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class DiffGrad(Rule):
    """diffGrad: Adam with a friction xi in [1/2, 1) that is small where the gradient hardly changes.

    xi = sigmoid(|g_t - g_(t-1)|), g_0 = 0;  m, v as Adam
    direction = xi m / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v) + eps)

    eps is added before the bias correction, as in the authors' code. Two variants:
      corrected  the above: the paper, and the authors' code where each gradient is a new tensor (the default)
      published  the authors' code where the gradient's buffer is reused, as zero_grad() did before torch 2: it
                 keeps the previous gradient by reference, so that the change is 0 and xi = 1/2 from the second
                 step on, which is Adam at half the learning rate
    Gradients of deep networks are often far below 1, where xi is about 1/2 in both.
    """

    paper: ClassVar[str] = "Dubey et al. 2020, arXiv 1909.11015"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v",)

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: NonNegative = 1e-8
    variant: Literal["corrected", "published"] = "corrected"

    def init(self, p: Tensor) -> State:
        state = {"m": zeros(p), "v": zeros(p)}
        return state | {"previous": zeros(p)} if self.variant == "corrected" else state

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        return {"scale": (1 - self.beta2**t).sqrt() / (1 - self.beta1**t), "first": (t == 1).to(t.dtype)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        if self.variant == "corrected":
            change = g - state["previous"]
            state["previous"].copy_(g)
        else:
            change = g * c["first"]
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        return torch.sigmoid(change.abs()).mul_(m).div_(v.sqrt().add_(self.eps)).mul_(c["scale"])
