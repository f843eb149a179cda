"""Lookahead, a wrapper over any rule."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.adam import Adam
from optimizers.eight_bit import EightBit
from optimizers.rule import SCHEMA, Count, Inner, State, Wrapper


@dataclass(frozen=True, config=SCHEMA)
class Lookahead(Wrapper):
    """Lookahead: every k steps of the inner rule the slow weights go a share alpha towards the fast ones.

    every k-th step:  slow <- slow + alpha (theta - slow);  theta <- slow

    ``momentum`` says what becomes of the inner rule's momentum m at that step:
      keep              nothing (the authors' default; with alpha = 1 this is the inner rule)
      reset             m <- 0
      pullback          slow_m <- slow_m + alpha (m - slow_m);  m <- slow_m, from slow_m = 0
      pullback_authors  the authors' code as published: slow_m is by mistake the same tensor as m after the
                        first time, so that m <- alpha m at first and then m <- alpha (2 - alpha) m
    The second moment is never touched. Evaluation is on the slow weights.

    The slow weights start where a parameter is at its first step, and k counts that parameter's own steps;
    the authors' code takes both from the optimizer, which is the same while every parameter has a gradient.
    """

    paper: ClassVar[str] = "Zhang et al. 2019, arXiv 1907.08610"
    family: ClassVar[str] = "wrapper"

    inner: Inner = Adam()
    k: Count = 5
    alpha: Annotated[float, Strict(), Field(gt=0, le=1)] = 0.8
    momentum: Literal["keep", "reset", "pullback", "pullback_authors"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum != "keep" and isinstance(self.inner, EightBit):
            raise ValueError(
                f"momentum {self.momentum!r} needs the momentum's own values, which EightBit does not keep"
            )
        if self.momentum != "keep" and not self.momentum_state:
            raise ValueError(f"momentum {self.momentum!r}: {type(self.inner).__name__} names no momentum_state")

    def init(self, p: Tensor) -> State:
        state = self.inner.init(p)
        slow = {"slow": p.detach().clone()}
        if self.momentum == "pullback":
            slow |= {f"slow_{name}": state[name].clone() for name in self._moments(state)}
        return state | slow

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        first = (t == self.k).to(t.dtype)
        return self.inner.coefficients(t) | {
            "sync": (t % self.k == 0).to(t.dtype),
            "pull": self.alpha * first + self.alpha * (2 - self.alpha) * (1 - first),
        }

    def after_step(self, p: Tensor, state: State, c: dict[str, float]) -> None:
        self.inner.after_step(p, state, c)
        if not c["sync"]:
            return
        p.copy_(state["slow"].lerp_(p, self.alpha))
        for name in self._moments(state):
            if self.momentum == "reset":
                state[name].zero_()
            elif self.momentum == "pullback":
                state[name].copy_(state[f"slow_{name}"].lerp_(state[name], self.alpha))
            elif self.momentum == "pullback_authors":
                state[name].mul_(c["pull"])

    def _moments(self, state: State) -> list[str]:
        """The momentum that there is: SGD without momentum has none."""
        return [name for name in self.momentum_state if name in state]

    def evaluation(self, p: Tensor, state: State) -> Tensor | None:
        return state["slow"]
