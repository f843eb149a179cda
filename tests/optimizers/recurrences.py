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


def lion(lr: float, beta1: float, beta2: float, weight_decay: float) -> Recurrence:
    """Algorithm 2 of Chen et al."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        m, t = 0.0, 0
        while True:
            t += 1
            now = g(t, x)
            ahead = beta1 * m + (1 - beta1) * now
            m = beta2 * m + (1 - beta2) * now
            x -= lr * (math.copysign(1.0, ahead) + weight_decay * x)
            yield x

    return follow


def padam(lr: float, beta1: float, beta2: float, power: float, amsgrad: bool, eps: float = 1e-8) -> Recurrence:
    """Padam as its authors' code: the bias corrections of Adam, whatever the power."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        m = v = top = 0.0
        t = 0
        while True:
            t += 1
            now = g(t, x)
            m = beta1 * m + (1 - beta1) * now
            v = beta2 * v + (1 - beta2) * now**2
            top = max(top, v) if amsgrad else v
            rate = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            x -= rate * m / (math.sqrt(top) + eps) ** (2 * power)
            yield x

    return follow


def sign_of_momentum(lr: float, beta: float) -> Recurrence:
    """SignSGD with momentum."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        m, t = 0.0, 0
        while True:
            t += 1
            m = beta * m + (1 - beta) * g(t, x)
            x -= lr * math.copysign(1.0, m)
            yield x

    return follow


def corrected_signsgd(lr: float, beta1: float, beta2: float, eps: float = 1e-8) -> Recurrence:
    """Generalized SignSGD with both averages corrected for their start at 0."""

    def follow(x: float, g: Callable[[int, float], float]) -> Iterator[float]:
        m = v = 0.0
        t = 0
        while True:
            t += 1
            m = beta1 * m + (1 - beta1) * g(t, x)
            v = beta2 * v + (1 - beta2) * m**2
            x -= lr * m / (1 - beta1**t) / (math.sqrt(v / (1 - beta2**t)) + eps)
            yield x

    return follow


# ---- rules that need whole tensors: each a list of its elements, row by row ----

Vectors = list[list[float]]
TensorRecurrence = Callable[[Vectors, Callable[[int, Vectors], Vectors]], Iterator[Vectors]]


def norm(values: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in values))


def normalized_sgd(lr: float, beta: float) -> TensorRecurrence:
    """Normalized SGD with momentum, the norm over all tensors."""

    def follow(x: Vectors, g: Callable[[int, Vectors], Vectors]) -> Iterator[Vectors]:
        m, t = [[0.0] * len(v) for v in x], 0
        while True:
            t += 1
            now = g(t, x)
            m = [[beta * a + (1 - beta) * b for a, b in zip(*both, strict=True)] for both in zip(m, now, strict=True)]
            length = norm([a for v in m for a in v])
            x = [[a - lr * b / length for a, b in zip(*both, strict=True)] for both in zip(x, m, strict=True)]
            yield x

    return follow


def lars(lr: float, momentum: float, trust: float, weight_decay: float) -> TensorRecurrence:
    """Algorithm 1 of You et al. 2017; the learning rate is constant."""

    def follow(x: Vectors, g: Callable[[int, Vectors], Vectors]) -> Iterator[Vectors]:
        buffers, t = [[0.0] * len(v) for v in x], 0
        while True:
            t += 1
            after = []
            for k, (w, now) in enumerate(zip(x, g(t, x), strict=True)):
                local = trust * norm(w) / (norm(now) + weight_decay * norm(w))
                triples = zip(buffers[k], now, w, strict=True)
                buffers[k] = [momentum * b + lr * local * (d + weight_decay * a) for b, d, a in triples]
                after.append([a - b for a, b in zip(w, buffers[k], strict=True)])
            x = after
            yield x

    return follow


def lamb(lr: float, beta1: float, beta2: float, weight_decay: float, eps: float = 1e-6) -> TensorRecurrence:
    """Algorithm 2 of You et al. 2020 with phi the identity."""

    def follow(x: Vectors, g: Callable[[int, Vectors], Vectors]) -> Iterator[Vectors]:
        m, v, t = [[0.0] * len(w) for w in x], [[0.0] * len(w) for w in x], 0
        while True:
            t += 1
            after = []
            for k, (w, now) in enumerate(zip(x, g(t, x), strict=True)):
                m[k] = [beta1 * a + (1 - beta1) * d for a, d in zip(m[k], now, strict=True)]
                v[k] = [beta2 * a + (1 - beta2) * d * d for a, d in zip(v[k], now, strict=True)]
                u = [
                    a / (1 - beta1**t) / (math.sqrt(b / (1 - beta2**t)) + eps) + weight_decay * c
                    for a, b, c in zip(m[k], v[k], w, strict=True)
                ]
                after.append([c - lr * norm(w) / norm(u) * a for a, c in zip(u, w, strict=True)])
            x = after
            yield x

    return follow


def adafactor(lr: float, columns: list[int], largest_rate: float, clip: float) -> TensorRecurrence:
    """Algorithms 4 and 5 of Shazeer & Stern, all steps multiplied by lr. ``columns``: of each matrix, 0 for
    a vector."""
    eps1, eps2 = 1e-30, 1e-3

    def follow(x: Vectors, g: Callable[[int, Vectors], Vectors]) -> Iterator[Vectors]:
        rows = [[0.0] * (len(w) // n if n else 0) for w, n in zip(x, columns, strict=True)]
        sums = [[0.0] * (n or len(w)) for w, n in zip(x, columns, strict=True)]  # of columns, or elements
        t = 0
        while True:
            t += 1
            beta2 = 1 - t**-0.8
            after = []
            for k, (w, now) in enumerate(zip(x, g(t, x), strict=True)):
                squares = [d * d + eps1 for d in now]
                if n := columns[k]:
                    across = [math.fsum(squares[i : i + n]) for i in range(0, len(w), n)]
                    down = [math.fsum(squares[j::n]) for j in range(n)]
                    rows[k] = [beta2 * a + (1 - beta2) * b for a, b in zip(rows[k], across, strict=True)]
                    sums[k] = [beta2 * a + (1 - beta2) * b for a, b in zip(sums[k], down, strict=True)]
                    v = [r * s / math.fsum(rows[k]) for r in rows[k] for s in sums[k]]
                else:
                    v = sums[k] = [beta2 * a + (1 - beta2) * b for a, b in zip(sums[k], squares, strict=True)]
                u = [d / math.sqrt(a) for d, a in zip(now, v, strict=True)]
                size = norm(u) / math.sqrt(len(u))
                rate = lr * max(eps2, norm(w) / math.sqrt(len(w))) * min(largest_rate, 1 / math.sqrt(t))
                after.append([a - rate * b / max(1.0, size / clip) for a, b in zip(w, u, strict=True)])
            x = after
            yield x

    return follow


def koala_v(lr: float, weight_decay: float) -> TensorRecurrence:
    """The Kalman filter of Davtyan et al., section 3, on L = 1 + sums of a/2 (x - c)^2, the problem of the tables."""
    curvatures, centres = [[0.125, 0.25, 0.5, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0] * 4], [0.3, 0.1]

    def follow(x: Vectors, g: Callable[[int, Vectors], Vectors]) -> Iterator[Vectors]:
        variance, noise, t = 1.0, 1.0, 0
        while True:
            t += 1
            places = zip(x, curvatures, centres, strict=True)
            loss = 1 + math.fsum(a * (v - c) ** 2 / 2 for w, b, c in places for v, a in zip(w, b, strict=True))
            noise = 0.9 * noise + 0.1 * loss**2
            variance += 1.0
            after, ratios = [], []
            for w, now in zip(x, g(t, x), strict=True):
                h = [d + weight_decay * v for d, v in zip(now, w, strict=True)]
                spread = variance * norm(h) ** 2 + noise
                gain = variance / spread * (loss + weight_decay / 2 * norm(w) ** 2)
                after.append([v - lr * gain * d for v, d in zip(w, h, strict=True)])
                ratios.append(norm(h) ** 2 / spread)
            variance -= variance**2 * max(ratios)
            x = after
            yield x

    return follow
