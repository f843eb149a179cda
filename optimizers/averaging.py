"""Averaging of the iterates, a wrapper over any rule."""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.adam import AdamW
from optimizers.rule import SCHEMA, Beta, Count, Inner, State, Wrapper, zeros


@dataclass(frozen=True, config=SCHEMA)
class IterateAveraging(Wrapper):
    """Averaging of the weights that the inner rule passes through; training itself is the inner rule's.

    From step ``start`` on, at every ``every``-th step, with n = 1, 2, ... counting the weights averaged so far,
      equal  average <- average + (theta - average) / n
      ema    average <- beta average + (1 - beta) theta, from average = theta at n = 1

    Evaluation is on the average; before ``start`` it is theta. Equal weights over AdamW are Gadam, over Padam
    with decoupled decay GadamX, over SGD the average of SWA; the papers average once an epoch, so ``every``
    is an epoch's number of steps and ``start`` the first epoch's end that counts. The average of the last n
    checkpoints, ``every`` steps apart, of a run of T steps (as in papers on translation) has start = T - (n - 1)
    every. As torch's AveragedModel, with ``beta`` the decay of get_ema_multi_avg_fn, but that the average of
    parameters of half precision is in float32. Statistics of batch norm are the caller's to re-estimate for the
    average, as the runner does.

    Over Lookahead, the fast weights are averaged (they agree with the slow ones where ``every`` and ``start``
    are multiples of k); within Lookahead, evaluation is on Lookahead's slow weights.
    """

    paper: ClassVar[str] = "Granziol et al. 2020, arXiv 2003.01247"
    family: ClassVar[str] = "wrapper"

    inner: Inner = AdamW()
    kind: Literal["equal", "ema"] = "equal"
    start: Count = 1
    every: Count = 1
    beta: Beta = 0.999

    def init(self, p: Tensor) -> State:
        return self.inner.init(p) | {"average": zeros(p).copy_(p.detach())}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        n = ((t - self.start) / self.every).floor() + 1
        weight = 1 / n.clamp(min=1) if self.kind == "equal" else torch.where(n > 1, 1 - self.beta, torch.ones_like(t))
        due = (t - self.start) % self.every == 0
        # Before the start the average follows theta, so that there is always something to evaluate.
        share = torch.where(t < self.start, torch.ones_like(t), weight * due)
        return self.inner.coefficients(t) | {"share": share}

    def after_step(self, p: Tensor, state: State, c: dict[str, float]) -> None:
        self.inner.after_step(p, state, c)
        if c["share"]:
            state["average"].lerp_(p.to(state["average"].dtype), c["share"])

    def evaluation(self, p: Tensor, state: State) -> Tensor | None:
        return state["average"]
