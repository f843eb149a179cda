"""Adan."""

from typing import Annotated, ClassVar

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor

from optimizers.rule import SCHEMA, Beta, NonNegative, Rule, Scalars, State, WeightDecayMode, zeros


@dataclass(frozen=True, config=SCHEMA)
class Adan(Rule):
    """Adan: adaptive Nesterov momentum, from the gradient and its change since the last step.

    d = g_t - g_{t-1} (0 at the first step)
    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) d;  n <- beta3 n + (1 - beta3) (g + beta2 d)^2
    direction = (m / (1 - beta1^t) + beta2 v / (1 - beta2^t)) / (sqrt(n / (1 - beta3^t)) + eps)

    As the authors' code, whose betas (.98, .92, .99) are one minus the paper's (.02, .08, .01). The paper's
    box corrects no bias and has the denominator sqrt(n + eps). The decay is proximal, as in all experiments
    of the paper; weight_decay_mode="decoupled" is the authors' no_prox=True. Their max_grad_norm is the
    engine's clip_norm. The previous gradient is the clipped one (coupled decay included), kept as a copy: a
    reference to p.grad would change with it.

    Every ``restart_every`` steps (0: never, as the authors but for one table) the rule restarts: all moments
    are dropped and the next step is again a first one, as after the restart_opt() of the authors' code. The
    paper's condition on when to restart, a bound on the distance travelled, is not implemented.

    Untuned warmups take their length from beta3, the decay of the second moment.
    """

    paper: ClassVar[str] = "Xie et al. 2022, arXiv 2208.06677"
    family: ClassVar[str] = "adaptive"
    published_lr: ClassVar[float] = 1e-3  # authors' code
    weight_decay_mode: ClassVar[WeightDecayMode] = "proximal"
    momentum_state: ClassVar[tuple[str, ...]] = ("m", "v")
    nonnegative_state: ClassVar[tuple[str, ...]] = ("n",)

    beta1: Beta = 0.98
    beta2: Beta = 0.92
    beta3: Beta = 0.99
    eps: NonNegative = 1e-8
    restart_every: Annotated[int, Strict(), Field(ge=0)] = 0

    def init(self, p: Tensor) -> State:
        return {"m": zeros(p), "v": zeros(p), "n": zeros(p), "previous": zeros(p)}

    def coefficients(self, t: Tensor) -> dict[str, Tensor]:
        s = (t - 1) % self.restart_every + 1 if self.restart_every else t
        # 0 at a first step, where there is no previous gradient and what the moments hold no longer counts.
        keep = (s > 1).to(t.dtype)
        return {
            "keep": keep,
            "keep_m": self.beta1 * keep,
            "keep_v": self.beta2 * keep,
            "keep_n": self.beta3 * keep,
            "mean": 1 / (1 - self.beta1**s),
            "change": self.beta2 / (1 - self.beta2**s),
            "root": (1 - self.beta3**s).rsqrt(),
        }

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        d = (g - state["previous"]).mul_(c["keep"])
        state["previous"].copy_(g)
        m = state["m"].mul_(c["keep_m"]).add_(g, alpha=1 - self.beta1)
        v = state["v"].mul_(c["keep_v"]).add_(d, alpha=1 - self.beta2)
        ahead = g.add(d, alpha=self.beta2)
        n = state["n"].mul_(c["keep_n"]).addcmul_(ahead, ahead, value=1 - self.beta3)
        return (m * c["mean"]).add_(v * c["change"]).div_(n.sqrt().mul_(c["root"]).add_(self.eps))

    @property
    def second_moment_beta(self) -> float:
        return self.beta3
