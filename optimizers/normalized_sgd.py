"""Normalized SGD."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class NormalizedSGD(Rule):
    """Normalized SGD: a step of length lr along the momentum.

    m <- momentum m + (1 - momentum) g;  direction = m / ||m||, 0 where m is 0

    The norm is over all parameters (of a param group and one dtype), as in the paper. Without 1 - momentum, as
    SGD has it, the direction is the same. With momentum 0 it is the normalized gradient.

    Clipped SGD, which normalizes only gradients that are longer than a bound, needs no rule of its own: it is
    SGD with the engine's (a run's) ``clip_norm``, see there.
    """

    paper: ClassVar[str] = "Cutkosky & Mehta 2020, arXiv 2002.03305"
    family: ClassVar[str] = "sgd"
    published_lr: ClassVar[float] = 0.1  # as tuned on CIFAR-10 by the authors of generalized SignSGD
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)
    elementwise: ClassVar[bool] = False
    joint: ClassVar[bool] = True

    momentum: Beta = 0.9

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.momentum)
        return m / torch.linalg.vector_norm(m).clamp(min=torch.finfo(m.dtype).tiny)
