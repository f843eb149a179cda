"""The problems on which rules are tried: two tensors with a fixed sequence of gradients, and two valleys.

The first is that of the authors' trajectories in reference/*.json, whose ``about`` says the same in formulas.
Each coordinate's gradient depends on that coordinate and t alone, so a scalar recurrence can follow it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from optimizers import Engine

CURVATURES = [[0.125, 0.25, 0.5, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0] * 4]
CENTRES = [0.3, 0.1]


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """A vector of 6 and a 4 x 3 matrix."""
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)
    w = torch.linspace(-0.5, 0.8, 12, dtype=torch.float64).reshape(4, 3)
    return [nn.Parameter(x.to(dtype)), nn.Parameter(w.to(dtype))]


def gradient(tensor: int, i: int, t: int, value: float) -> float:
    """The gradient of coordinate i of a tensor at step t = 1, 2, ..."""
    pull = CURVATURES[tensor][i] * (value - CENTRES[tensor])
    return pull + (0.5 * math.sin(0.7 * t * (i + 1)) if tensor == 0 else 0.2 * math.cos(1.3 * t + i))


def gradients(params: list[nn.Parameter], t: int) -> list[Tensor]:
    """The same for whole tensors."""
    x, w = (p.detach().double().cpu() for p in params)
    i = torch.arange(1, 7, dtype=torch.float64)
    k = torch.arange(12, dtype=torch.float64)
    gx = torch.tensor(CURVATURES[0], dtype=torch.float64) * (x - 0.3) + 0.5 * torch.sin(0.7 * t * i)
    pull = torch.tensor(CURVATURES[1][:3], dtype=torch.float64) * (w - 0.1)
    gw = pull + (0.2 * torch.cos(1.3 * t + k)).reshape(4, 3)
    return [g.to(p) for p, g in zip(params, (gx, gw), strict=True)]


def loss_of(params: list[nn.Parameter]) -> Tensor:
    """The loss that rules see that need one: 1 + the part of the gradient that is one of a loss."""
    x, w = (p.detach().double().cpu() for p in params)
    curvatures = [torch.tensor(a, dtype=torch.float64) for a in CURVATURES]
    loss = 1 + (curvatures[0] * (x - 0.3) ** 2).sum() / 2 + (curvatures[1].reshape(4, 3) * (w - 0.1) ** 2).sum() / 2
    return loss.to(params[0])


def step(optimizer: torch.optim.Optimizer, loss: Tensor | float) -> None:
    """One step, with the loss where the optimizer takes it."""
    if isinstance(optimizer, Engine):
        optimizer.step(loss=loss)
    else:
        optimizer.step()


def run(
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    first: int,
    last: int,
    after: Callable[[int], None] = lambda t: None,
) -> list[Tensor]:
    """The steps first..last on the fixed gradients; the parameters at the end."""
    for t in range(first, last + 1):
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g
        step(optimizer, loss_of(params))
        after(t)
    return [p.detach().clone() for p in params]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are the same to the bit."""
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference between two lists of tensors."""
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


def quadratic(p: Tensor) -> tuple[float, Tensor]:
    """1/2 x^T diag(1, 10) x: its value and its gradient."""
    scale = torch.tensor([1.0, 10.0], dtype=p.dtype)
    return float((scale * p * p).sum() / 2), scale * p


def rosenbrock(p: Tensor) -> tuple[float, Tensor]:
    """(1 - x)^2 + 100 (y - x^2)^2: its value and its gradient."""
    x, y = p.tolist()
    value = (1 - x) ** 2 + 100 * (y - x * x) ** 2
    return value, torch.tensor([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)], dtype=p.dtype)


def descend(
    make: Callable[[list[nn.Parameter]], Engine],
    loss: Callable[[Tensor], tuple[float, Tensor]],
    at: tuple[float, float],
    steps: int,
) -> float:
    """The loss at the evaluation weights after some steps from a point."""
    p = nn.Parameter(torch.tensor(at, dtype=torch.float64))
    optimizer = make([p])
    for _ in range(steps):
        value, p.grad = loss(p.detach())
        step(optimizer, value)
    with optimizer.evaluation_weights():
        return loss(p.detach())[0]
