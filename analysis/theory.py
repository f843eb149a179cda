"""The theory of warmup in numbers: variance of the adaptive rate, effective warmup period, size of an update.

The rectifier and the warmups are those that train (optimizers/rectifier.py, optimizers/warmups.py); here they
take and give numpy arrays. Everything random has a seed.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from optimizers import rectifier
from optimizers.warmups import Warmup

Floats: TypeAlias = NDArray[np.float64]

NORMAL_MEDIAN = 0.6744897501960817
"""Median of |z| for a standard normal z."""


def steps(last: int, first: int = 1) -> Floats:
    """The steps first, first + 1, ..., last."""
    return np.arange(first, last + 1, dtype=np.float64)


def rho(t: ArrayLike, beta2: float) -> Floats:
    """Length rho_t of the approximated simple moving average at the steps t (any shape), in steps."""
    return rectifier.rho(_tensor(t), beta2).numpy()


def rectification(t: ArrayLike, beta2: float) -> Floats:
    """RAdam's rectifier r_t at the steps t (any shape), in [0, 1); 0 where rho_t <= 4."""
    return rectifier.rectification(rectifier.rho(_tensor(t), beta2), beta2).numpy()


def warmup_factor(warmup: Warmup, t: ArrayLike, beta2: float | None = None) -> Floats:
    """The factor omega(t) of a warmup at the steps t (any shape), in [0, 1]."""
    return warmup.factor(_tensor(t), beta2).numpy()


def psi_variance(rho: ArrayLike, sigma: float = 1.0) -> Floats:
    """Exact variance of the adaptive rate psi = sqrt(rho / (g_1^2 + ... + g_rho^2)), g_i ~ N(0, sigma^2).

    Var[psi] = (rho / (rho - 2) - rho / 2 (Gamma((rho - 1) / 2) / Gamma(rho / 2))^2) / sigma^2, the form with
    a beta function in the source rewritten by the duplication formula. Log-gamma keeps it accurate to 1e-6
    relative at rho = 10^4. NaN where rho <= 2 (no variance); the source uses it for rho > 4 only.

    Source: Liu et al. 2020, Eq. 2.
    """
    x = np.asarray(rho, dtype=np.float64)
    safe = np.where(x > 2, x, 3.0)
    mean = np.exp(gammaln((safe - 1) / 2) - gammaln(safe / 2))
    return np.where(x > 2, safe / (safe - 2) - safe / 2 * mean**2, np.nan) / sigma**2


def psi_variance_first_order(rho: ArrayLike, sigma: float = 1.0) -> Floats:
    """First-order approximation of ``psi_variance``, from which the rectifier is made; NaN where rho <= 4.

    Var[psi] ~ rho / (2 (rho - 2) (rho - 4) sigma^2). Source: Liu et al. 2020, Eq. 5.
    """
    x = np.asarray(rho, dtype=np.float64)
    safe = np.where(x > 4, x, 5.0)
    return np.where(x > 4, safe / (2 * (safe - 2) * (safe - 4)), np.nan) / sigma**2


def exact_rectification(t: ArrayLike, beta2: float) -> Floats:
    """What the rectifier would be with the exact variance: sqrt(Var[psi](rho_inf) / Var[psi](rho_t)), 0 where
    rho_t <= 4. Not used by any optimizer; it shows the cost of the first-order approximation."""
    x = rho(t, beta2)
    safe = np.where(x > 4, x, 5.0)
    ratio = psi_variance(rectifier.rho_infinity(beta2)) / psi_variance(safe)
    return np.where(x > 4, np.sqrt(ratio), 0.0)


def effective_length(t: ArrayLike, beta2: float) -> Floats:
    """Number of independent terms whose simple mean varies as much as Adam's vhat_t, in steps.

    (sum of weights)^2 / (sum of squared weights) = rho_inf (1 - beta2^t) / (1 + beta2^t), for the weights
    beta2^(t - i). rho_t, which matches the centre of mass of the weights instead, has the same limit and is
    up to 12 % shorter on the way, near t = 1.5 / (1 - beta2). Kish's effective sample size; not in the source.
    """
    decayed = beta2 ** np.asarray(t, dtype=np.float64)
    return rectifier.rho_infinity(beta2) * (1 - decayed) / (1 + decayed)


def first_adaptive_step(beta2: float) -> int:
    """The first step at which RAdam is adaptive in its paper: min{t : rho_t > 4}. 5 for .8 < beta2 < 1.

    Raises ValueError where there is none (beta2 <= .6).
    """
    if rectifier.rho_infinity(beta2) <= 4:
        raise ValueError(f"with beta2 = {beta2} rho never exceeds 4: there is no adaptive step")
    last = 16
    while not (adaptive := rho(steps(last), beta2) > 4).any():
        last *= 2
    return int(adaptive.argmax()) + 1


def effective_period(warmup: Warmup, beta2: float | None = None, first: int = 1) -> float:
    """Effective warmup period T(omega) = sum over t >= ``first`` of (1 - omega_t), in steps.

    How much training the warmup costs: the number of full-size steps that it withholds. Summed until what
    is left is below 1e-12 of the total.

    ``first`` is a convention that matters for the rectifier alone, whose first four factors are 0. Counted
    from t = 1 the four idle steps are part of the period (1033.3 at beta2 = .999). Ma & Yarats count from the
    first adaptive step, ``first = first_adaptive_step(beta2)`` (1029.3), since RAdam takes momentum steps
    before it.

    Source: Ma & Yarats 2021. Raises ValueError if the sum does not converge in 10^8 steps.
    """
    total, start, length = 0.0, first, 1024
    while start < 10**8:
        block = float(np.sum(1 - warmup_factor(warmup, steps(start + length - 1, start), beta2)))
        total += block
        if block <= 1e-12 * total:
            return total
        start += length
        length = min(2 * length, 2**20)
    raise ValueError(f"the effective period of {warmup} does not converge")


def linear_period(tau: float) -> float:
    """Closed form of T for min(1, t / tau): with n = floor(tau), n - n (n + 1) / (2 tau); (tau - 1) / 2 for
    whole tau. The untuned tau = 2 / (1 - beta2) gives 1 / (1 - beta2) - 1 / 2."""
    n = math.floor(tau)
    return n - n * (n + 1) / (2 * tau)


def exponential_period(tau: float) -> float:
    """Closed form of T for 1 - exp(-t / tau): 1 / (exp(1 / tau) - 1). The untuned tau is 1 / (1 - beta2)."""
    return 1 / math.expm1(1 / tau)


@dataclass(frozen=True)
class PsiVariance:
    """Simulated variance of the adaptive rate.

    Attributes: t, the steps 1, 2, ...; rho, rho_t; raw, Var[psi_t]; rectified, Var[r_t psi_t]. Each of shape
    (iterations,); the variances in units of 1 / gradient^2.
    """

    t: Floats
    rho: Floats
    raw: Floats
    rectified: Floats


def simulate_psi(
    mu: float = 0.0,
    sigma: float = 1.0,
    beta2: float = 0.999,
    trajectories: int = 5000,
    iterations: int = 6000,
    seed: int = 0,
) -> PsiVariance:
    """Monte-Carlo variance of the adaptive rate, raw and rectified, over independent trajectories.

    psi_t = sqrt((1 - beta2^t) / v_t), v_t = beta2 v_{t-1} + (1 - beta2) g_t^2, g_t ~ N(mu, sigma^2), all
    independent: Adam's own exponential average, not the simple one by which the theory approximates it.

    For mu = 0 the true variance is infinite at t <= 2 and the estimator's own variance at t <= 4: there the
    numbers mean nothing, and at t = 5 they still scatter by tens of per cent. The defaults are those of the
    source's Figure 9. The same seed gives the same noise for every mu and sigma.

    Source: Liu et al. 2020, Figure 9.
    """
    generator = np.random.default_rng(seed)
    t = steps(iterations)
    v = np.zeros(trajectories)
    raw = np.empty(iterations)
    for i in range(iterations):
        g = mu + sigma * generator.standard_normal(trajectories)
        v += (1 - beta2) * (g * g - v)
        raw[i] = np.sqrt((1 - beta2 ** (i + 1)) / v).var(ddof=1)
    return PsiVariance(t, rho(t, beta2), raw, rectification(t, beta2) ** 2 * raw)


@dataclass(frozen=True)
class UpdateMagnitude:
    """Simulated size of an Adam update, in units of the learning rate.

    Attributes: t, the steps, of shape (iterations,); median, low and high, quantiles over the coordinates
    (50, 10 and 90 %); rms, the root of the mean square.
    """

    t: Floats
    median: Floats
    low: Floats
    high: Floats
    rms: Floats


def simulate_updates(
    beta1: float = 0.9,
    beta2: float = 0.999,
    sigma: float = math.sqrt(1e-9),
    eps: float = 1e-8,
    coordinates: int = 20_000,
    iterations: int = 1000,
    seed: int = 0,
) -> UpdateMagnitude:
    """|mhat_t| / (sqrt(vhat_t) + eps) of Adam over coordinates, for independent g_t ~ N(0, sigma^2).

    A simulated local minimum: gradients are noise alone. The default scale is a variance of 1e-9, at which
    eps does not matter. The median's own error is about 0.9 % at 20 000 coordinates.

    Source: the argument of Ma & Yarats 2021, whose exact settings could not be obtained.
    """
    generator = np.random.default_rng(seed)
    m, v = np.zeros(coordinates), np.zeros(coordinates)
    quantiles = np.empty((3, iterations))
    rms = np.empty(iterations)
    for i in range(iterations):
        g = sigma * generator.standard_normal(coordinates)
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        m_hat, v_hat = m / (1 - beta1 ** (i + 1)), v / (1 - beta2 ** (i + 1))
        magnitude = np.abs(m_hat) / (np.sqrt(v_hat) + eps)
        quantiles[:, i] = np.quantile(magnitude, (0.1, 0.5, 0.9))
        rms[i] = math.sqrt(np.mean(magnitude**2))
    low, median, high = quantiles
    return UpdateMagnitude(steps(iterations), median, low, high, rms)


def stationary_update(beta1: float) -> float:
    """Median of |mhat| / sqrt(vhat) once both averages are stationary, for zero-mean independent Gaussian
    gradients and beta2 near 1: .6745 sqrt((1 - beta1) / (1 + beta1)), since
    Var[m] = sigma^2 (1 - beta1) / (1 + beta1) and vhat = sigma^2. 0.1547 at beta1 = .9."""
    return NORMAL_MEDIAN * math.sqrt((1 - beta1) / (1 + beta1))


def transient_length(median: ArrayLike, stationary: float, tolerance: float = 0.05) -> int:
    """The first step from which a curve (value i at step i + 1) stays within ``tolerance`` (relative) of its
    stationary value. Raises ValueError if its last value is outside."""
    outside = np.flatnonzero(np.abs(np.asarray(median) / stationary - 1) > tolerance)
    if len(outside) and outside[-1] == np.size(median) - 1:
        raise ValueError("the curve has not reached its stationary value: simulate more iterations")
    return int(outside[-1]) + 2 if len(outside) else 1


def _tensor(t: ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.asarray(t, dtype=np.float64))
