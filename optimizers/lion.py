"""Lion."""

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, Rule, Scalars, State, zeros


@dataclass(frozen=True, config=SCHEMA)
class Lion(Rule):
    """Lion: the sign of a momentum that leans more on the newest gradient than the one it keeps.

    direction = sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g

    As the authors' code. Every coordinate moves by lr, so that lr is 3 to 10 times below Adam's and the
    decoupled weight decay as much above. beta2 is the decay of the momentum: there is no second moment, and
    so no length for an untuned warmup.
    """

    paper: ClassVar[str] = "Chen et al. 2023, arXiv 2302.06675"
    family: ClassVar[str] = "sign"
    published_lr: ClassVar[float] = 1e-4  # authors' code
    momentum_state: ClassVar[tuple[str, ...]] = ("m",)

    beta1: Beta = 0.9
    beta2: Beta = 0.99

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p)}

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        direction = state["m"].lerp(g, 1 - self.beta1).sign_()
        state["m"].lerp_(g, 1 - self.beta2)
        return direction

    @property
    def second_moment_beta(self) -> float | None:
        return None
