"""Stochastic gradient descent with momentum."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Flag, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class SGD(Rule):
    """SGD with heavy-ball or Nesterov momentum.

    b <- momentum b + g;  direction = b, with Nesterov g + momentum b, without momentum g

    As torch.optim.SGD with dampening 0 (there b starts as the first g; from zeros that is the same).

    Clipped SGD is this rule with the engine's ``clip_norm`` (``SGD(params, lr, clip_norm=1.0)``; a run's
    ``clip_norm=1.0``, beside ``optimizer=sgd`` and no part of it): gradients longer than that, over all
    parameters, are scaled to it, before the weight decay and the momentum.
    """

    paper: ClassVar[str] = "Sutskever et al. 2013"
    family: ClassVar[str] = "sgd"
    published_lr: ClassVar[float] = 0.1  # He et al. 2015, with momentum 0.9; a usual choice, no default
    weight_decay_mode: ClassVar[WeightDecayMode] = "coupled"
    momentum_state: ClassVar[tuple[str, ...]] = ("b",)

    momentum: Beta = 0.0
    nesterov: Flag = False

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")

    def init(self, p: Tensor) -> State:
        return {"b": zeros(p)} if self.momentum else {}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        if not self.momentum:
            return g
        b = state["b"].mul_(self.momentum).add_(g)
        return g.add(b, alpha=self.momentum) if self.nesterov else b
