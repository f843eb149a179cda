"""LARS."""

from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Positive, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class LARS(Rule):
    """LARS: SGD with momentum whose gradient is scaled, tensor by tensor, to a share of the weights' norm.

    ratio = trust ||theta|| / (||g|| + weight_decay ||theta||), 1 where theta or g is 0
    b <- momentum b + ratio (g + weight_decay theta);  direction = b

    As the paper, but that the learning rate multiplies the step and not the gradient that enters b: the same
    while it is constant. Its weight decay is inside the ratio (weight_decay_mode "internal"); with "coupled"
    the ratio's divisor is ||g + weight_decay theta||, as in Optax. It applies to every tensor that it is
    given; biases and the weights of norms, often left out, have to go to another optimizer (the package
    pytorch_optimizer neither scales nor decays tensors of one dimension).
    """

    paper: ClassVar[str] = "You et al. 2017, arXiv 1708.03888"
    family: ClassVar[str] = "layerwise"
    published_lr: ClassVar[float] = 2.0  # recalled of the paper (AlexNet with batch norm, batches of 512), not verified
    weight_decay_mode: ClassVar[WeightDecayMode] = "internal"
    momentum_state: ClassVar[tuple[str, ...]] = ("b",)
    elementwise: ClassVar[bool] = False

    momentum: Beta = 0.9
    trust: Positive = 1e-3

    def init(self, p: Tensor) -> State:
        return {"b": zeros(p)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        decay = c.get("weight_decay", 0.0)
        weights, gradient = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
        ratio = trust_ratio(self.trust * weights, gradient, gradient + weights * decay)
        return state["b"].mul_(self.momentum).add_((g + p * decay) * ratio)


def trust_ratio(above: Tensor, present: Tensor, below: Tensor) -> Tensor:
    """above / below, and 1 where above or present is 0: a tensor that starts at zero has to get away from it."""
    return torch.where((above > 0) & (present > 0), above / below, torch.ones_like(above))
