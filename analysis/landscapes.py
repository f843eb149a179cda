"""What optimizers do where everything can be seen: three functions of two variables, and a noisy quadratic.

The rules are run by the engine that trains (optimizers/engine.py), in float64, without weight decay, warmup
or decay. On the three functions the gradients are exact; everything random has a seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import optimizers
from analysis.theory import Floats
from optimizers import Engine
from optimizers.rule import Rule, available, describe, make

MULTIPLES = tuple(10 ** (i / 2) for i in range(-4, 8))
"""The grid of learning rates, the same for every rule: half-decades from 1/100 to 3162 times its published rate."""

FAR = 1e3
"""A run whose weights get further than this from the origin, or are no numbers, has diverged."""


@dataclass(frozen=True)
class Landscape:
    """A function of two variables whose smallest value is 0.

    Attributes: formula, in TeX; value and gradient, functions of x and y as floats, arrays or tensors;
    start, where runs begin; minima, all points of value 0; window, the part that is drawn (x from, x to, y
    from, y to).
    """

    formula: str
    value: Callable[[Any, Any], Any]
    gradient: Callable[[Any, Any], tuple[Any, Any]]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    window: tuple[float, float, float, float]


def _ravine_gradient(x: Any, y: Any) -> tuple[Any, Any]:
    along, across = 0.08 * (0.8 * x + 0.6 * y), 8 * (0.8 * y - 0.6 * x)
    return 0.8 * along - 0.6 * across, 0.6 * along + 0.8 * across


LANDSCAPES = {
    # Curvatures .08 and 8, turned by atan(3/4), so that no axis is the ravine's.
    "ravine": Landscape(
        r"$0.04\,(0.8x + 0.6y)^2 + 4\,(0.8y - 0.6x)^2$",
        lambda x, y: 0.04 * (0.8 * x + 0.6 * y) ** 2 + 4 * (0.8 * y - 0.6 * x) ** 2,
        _ravine_gradient,
        (-2.0, -0.5),
        ((0.0, 0.0),),
        (-2.5, 1.5, -2.0, 1.2),
    ),
    "rosenbrock": Landscape(
        r"$(1 - x)^2 + 100\,(y - x^2)^2$",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
        lambda x, y: (-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)),
        (-1.2, 1.0),
        ((1.0, 1.0),),
        (-2.2, 2.4, -1.0, 5.0),
    ),
    # A thousandth off the ridge x = 0, on which the gradient leads into the saddle at the origin.
    "saddle": Landscape(
        r"$(x^2 - 1)^2 / 4 + 4\,y^2$",
        lambda x, y: (x * x - 1) ** 2 / 4 + 4 * y * y,
        lambda x, y: (x * (x * x - 1), 8 * y),
        (1e-3, 0.6),
        ((-1.0, 0.0), (1.0, 0.0)),
        (-1.6, 1.6, -1.28, 1.28),
    ),
}


@dataclass(frozen=True)
class Path:
    """A run of a rule on a landscape.

    Attributes: lr; trained, the weights at the steps 0, 1, ..., of shape (steps + 1, 2); evaluated, likewise
    those that the rule would evaluate, which differ for Lookahead and averages; values, the function there, of
    shape (steps + 1,); diverged: the run ended before its time.
    """

    lr: float
    trained: Floats
    evaluated: Floats
    values: Floats
    diverged: bool

    @property
    def final(self) -> float:
        """The value at the end; infinite if the run diverged."""
        return math.inf if self.diverged else float(self.values[-1])


def rules() -> dict[str, Rule]:
    """Every rule of the package with its default hyper-parameters, by name, in order of family; and SGD with the
    momentum that its YAML gives it."""
    found = {name: rule() for name, rule in available().items()} | {"sgd, momentum": make("sgd", momentum=0.9)}
    return dict(sorted(found.items(), key=lambda item: (item[1].family, item[0])))


def optimizer(rule: Rule, params: Sequence[nn.Parameter], lr: float) -> Engine:
    """The ordinary torch optimizer that runs a rule."""
    hyper = {name: value for name, value in describe(rule).items() if name != "name"}
    kind: type[Engine] = getattr(optimizers, type(rule).__name__)
    return kind(params, lr=lr, **hyper)


def descend(rule: Rule, landscape: Landscape, lr: float, steps: int) -> Path:
    """Run a rule on a landscape from its start. The two variables are one tensor, which is what a rule that takes a
    norm of a tensor sees; the loss is there for a rule that wants it."""
    p = nn.Parameter(torch.tensor(landscape.start, dtype=torch.float64))
    engine = optimizer(rule, [p], lr)
    trained, evaluated = [landscape.start], [landscape.start]

    def closure() -> torch.Tensor:
        x, y = trained[-1]
        p.grad = torch.tensor(landscape.gradient(x, y), dtype=torch.float64)
        return torch.tensor(landscape.value(x, y), dtype=torch.float64)

    diverged = False
    while len(trained) <= steps and not diverged:
        engine.step(closure)
        trained.append(tuple(p.tolist()))
        with engine.evaluation_weights():
            evaluated.append(tuple(p.tolist()))
        diverged = not math.hypot(*trained[-1]) < FAR  # NaN is not less
    at = np.array(evaluated)
    return Path(lr, np.array(trained), at, landscape.value(at[:, 0], at[:, 1]), diverged)


def search(rule: Rule, landscape: Landscape, steps: int, multiples: Sequence[float] = MULTIPLES) -> list[Path]:
    """A run at each multiple of the rule's published learning rate."""
    return [descend(rule, landscape, multiple * rule.published_lr, steps) for multiple in multiples]


def best(paths: Sequence[Path]) -> Path:
    """The path that ends lowest; the one of the smallest learning rate among equals. Raises ValueError if all
    diverged."""
    lowest = min(paths, key=lambda path: (path.final, path.lr))
    if lowest.diverged:
        raise ValueError("every run diverged: the grid of learning rates does not reach low enough")
    return lowest


# --- the noisy quadratic -------------------------------------------------------------------------------------
#
# f(theta) = h / 2 (theta - c)^2 with a new c ~ N(0, sigma^2) at every step, so that an SGD step is
# theta <- a theta + (1 - a) c,  a = 1 - gamma h.


def sgd_variance(rate: Any, sigma: float = 1.0) -> Any:
    """Stationary variance of SGD's weights on the noisy quadratic, for ``rate`` = gamma h in (0, 2).

    V = a^2 V + (1 - a)^2 sigma^2, hence V = gamma h / (2 - gamma h) sigma^2. Source: Wu et al. 2018.
    """
    return rate / (2 - rate) * sigma**2


def lookahead_contraction(rate: Any, alpha: Any, k: Any) -> Any:
    """The factor on the mean of Lookahead's slow weights over SGD in k steps: 1 - alpha + alpha a^k."""
    return 1 - alpha + alpha * (1 - rate) ** k


def lookahead_variance(rate: Any, alpha: Any, k: Any, sigma: float = 1.0) -> Any:
    """Stationary variance of the slow weights of Lookahead over SGD, after a synchronisation.

    Within k steps the fast weights become a^k slow + n, and Var[n] = (1 - a^2k) V with V that of SGD, which those
    steps leave as it is. So W = (1 - alpha + alpha a^k)^2 W + alpha^2 (1 - a^2k) V, and with b = a^k

        W = alpha (1 + b) / (2 - alpha (1 - b)) V.

    Proposition 2 of Zhang et al. 2019 before cancelling alpha (1 - b).
    """
    b = (1 - rate) ** k
    return alpha * (1 + b) / (2 - alpha * (1 - b)) * sgd_variance(rate, sigma)


def simulate_lookahead(
    rates: Sequence[float],
    alpha: float,
    k: int,
    sigma: float = 1.0,
    start: float = 0.0,
    rounds: int | None = None,
    chains: int = 10_000,
    seed: int = 0,
) -> Floats:
    """The slow weights of the real Lookahead over SGD after ``rounds`` synchronisations on the noisy quadratic.

    Of shape (rates, chains): all are independent coordinates of one tensor, with curvature ``rates`` at a learning
    rate of 1. Without ``rounds``, as many as bring what is left of the start's variance below 1e-4 of the
    stationary one. The standard error of a variance over the chains is sqrt(2 / chains), relative.
    """
    generator = torch.Generator().manual_seed(seed)
    h = torch.tensor(rates, dtype=torch.float64)[:, None]
    if rounds is None:
        slowest = float(lookahead_contraction(h, alpha, k).abs().max())
        rounds = math.ceil(math.log(1e-4) / (2 * math.log(slowest)))
    p = nn.Parameter(torch.full((len(rates), chains), start, dtype=torch.float64))
    engine = optimizer(make("lookahead", inner={"name": "sgd"}, alpha=alpha, k=k), [p], lr=1.0)
    for _ in range(rounds * k):
        c = sigma * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = h * (p.detach() - c)
        engine.step()
    with engine.evaluation_weights():
        return p.detach().numpy().copy()


def matched_rate(rate: Any, alpha: Any, k: Any) -> Any:
    """The gamma h at which SGD contracts its mean in k steps as Lookahead at ``rate`` does, for rates in (0, 1]."""
    return 1 - lookahead_contraction(rate, alpha, k) ** (1 / k)
