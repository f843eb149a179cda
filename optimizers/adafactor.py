"""Adafactor."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Flag, NonNegative, Positive, Rule, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class Adafactor(Rule):
    """Adafactor: no momentum, and of a matrix's second moment only the means of its rows and columns.

    beta2_t = 1 - t^(-decay_power)
    row <- beta2_t row + (1 - beta2_t) mean over each row of (g^2 + eps1), column likewise
    u = g / sqrt(row column / mean(row));  u <- u / max(1, RMS(u) / clip)
    direction = max(eps2, RMS(theta)) min(largest_rate, 1 / sqrt(t)) u

    As Algorithms 4 and 5 of the paper at a learning rate of 1. relative_step=False leaves out
    min(largest_rate, 1 / sqrt(t)), which a learning rate and schedules then replace; scale_parameter=False
    leaves out max(eps2, RMS(theta)). Tensors of one dimension or none keep their whole second moment; those
    of more than two are batches of matrices in their last two dimensions, as in torch (the authors' code
    takes the two largest). The paper's optional momentum is not implemented.

    torch.optim.Adafactor differs in that largest_rate is its lr (so that its decay is not damped as here by
    1 / sqrt(t)), in eps1, a bound from below and not a summand, and in RMS(theta), taken before the decay.
    beta2 grows with t, so that untuned warmups have no length here.
    """

    paper: ClassVar[str] = "Shazeer & Stern 2018, arXiv 1804.04235"
    family: ClassVar[str] = "adaptive"
    elementwise: ClassVar[bool] = False
    nonnegative_state: ClassVar[tuple[str, ...]] = ("v", "row", "column")

    decay_power: Positive = 0.8
    eps1: NonNegative = 1e-30
    eps2: NonNegative = 1e-3
    clip: Positive = 1.0
    relative_step: Flag = True
    largest_rate: Positive = 1e-2
    scale_parameter: Flag = True

    @property
    def published_lr(self) -> float:  # type: ignore[override]
        # With relative steps largest_rate is inside the rule, as in the paper, and lr only scales it.
        return 1.0 if self.relative_step else 1e-2

    def init(self, p: Tensor) -> State:
        if p.dim() < 2:
            return {"v": zeros(p)}
        return {"row": zeros(p[..., :1].contiguous()), "column": zeros(p[..., :1, :].contiguous())}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        gain = t**-self.decay_power
        table = {"keep": 1 - gain, "gain": gain}
        return table | ({"lr": t.rsqrt().clamp(max=self.largest_rate)} if self.relative_step else {})

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        squares = (g * g).add_(self.eps1)
        if g.dim() < 2:
            u = g * state["v"].mul_(c["keep"]).add_(squares * c["gain"]).rsqrt()
        else:
            row = state["row"].mul_(c["keep"]).add_(squares.mean(-1, keepdim=True) * c["gain"])
            column = state["column"].mul_(c["keep"]).add_(squares.mean(-2, keepdim=True) * c["gain"])
            # Root by root: where all gradients are 0, the product of the two is 0 in float32.
            u = g * (row / row.mean(-2, keepdim=True)).rsqrt_() * column.rsqrt()
        u = u / (_rms(u) / self.clip).clamp(min=1.0)
        return u * _rms(p).clamp(min=self.eps2) if self.scale_parameter else u


def _rms(x: Tensor) -> Tensor:
    """The root of the mean square of all elements."""
    return torch.linalg.vector_norm(x) / x.numel() ** 0.5
