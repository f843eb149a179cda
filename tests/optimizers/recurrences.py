"""Independent references: the algorithms of the papers in plain Python floats, one coordinate at a time.

Written from the papers and sharing nothing with the package. A recurrence takes the starting value and the
gradient g(t, x) and yields x after steps 1, 2, ...
"""

import math
from collections.abc import Callable, Iterator

Recurrence = Callable[[float, Callable[[int, float], float]], Iterator[float]]


def radam(lr: float, beta1: float, beta2: float, weight_decay: float, eps: float = 1e-8) -> Recurrence:
    """Algorithm 2 of Liu et al. with decoupled decay, eps added to sqrt(v)."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        m = v = 0.0
        t = 0
        limit = 2 / (1 - beta2) - 1
        while True:
            t += 1
            now = g(t, x)
            v = beta2 * v + (1 - beta2) * now**2
            m = beta1 * m + (1 - beta1) * now
            mean = m / (1 - beta1**t)
            length = limit - 2 * t * beta2**t / (1 - beta2**t)
            x -= lr * weight_decay * x
            if length > 4:
                rate = math.sqrt(1 - beta2**t) / (math.sqrt(v) + eps)
                above = (length - 4) * (length - 2) * limit
                x -= lr * math.sqrt(above / ((limit - 4) * (limit - 2) * length)) * mean * rate
            else:
                x -= lr * mean
            yield x

    return follow


def lookahead_pullback(lr: float, momentum: float, k: int, alpha: float) -> Recurrence:
    """Lookahead over SGD with momentum, whose momentum is interpolated as the weights are."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        slow, slow_b, b, t = x, 0.0, 0.0, 0
        while True:
            t += 1
            b = momentum * b + g(t, x)
            x -= lr * b
            if t % k == 0:
                slow += alpha * (x - slow)
                slow_b += alpha * (b - slow_b)
                x, b = slow, slow_b
            yield x

    return follow


def adam2k(lr: float, beta1: float, beta2: float, frozen: int, weight_decay: float) -> Recurrence:
    """Adam that does nothing but update v for ``frozen`` steps; the step counter runs on."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        m = v = 0.0
        t = 0
        while True:
            t += 1
            now = g(t, x)
            v = beta2 * v + (1 - beta2) * now**2
            if t > frozen:
                m = beta1 * m + (1 - beta1) * now
                x *= 1 - lr * weight_decay
                x -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + 1e-8)
            yield x

    return follow


def adan(
    lr: float, betas: tuple[float, float, float], restart: int, weight_decay: float, eps: float = 1e-8
) -> Recurrence:
    """Adan whose moments, step counter and previous gradient are forgotten every ``restart`` steps."""
    beta1, beta2, beta3 = betas

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        total = 0
        while True:
            m = v = n = 0.0
            previous: float | None = None
            for t in range(1, restart + 1):
                total += 1
                now = g(total, x)
                change = 0.0 if previous is None else now - previous
                previous = now
                m = beta1 * m + (1 - beta1) * now
                v = beta2 * v + (1 - beta2) * change
                n = beta3 * n + (1 - beta3) * (now + beta2 * change) ** 2
                step = m / (1 - beta1**t) + beta2 * v / (1 - beta2**t)
                x -= lr * step / (math.sqrt(n / (1 - beta3**t)) + eps)
                x /= 1 + lr * weight_decay
                yield x

    return follow
