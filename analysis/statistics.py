"""Statistics of the claims: equivalence of paired runs, its planned power, and summaries of lr curves.

Thin over scipy and statsmodels. Nothing here fills in or drops a value: a diverged run comes with its task's
worst value, and NaN is an error.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate, optimize, stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

Verdict = Literal["supported", "refuted", "inconclusive"]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Equivalence:
    """Outcome of a paired equivalence test, in units of the metric.

    Attributes:
        n: number of pairs.
        mean_difference: mean of a - b; nan for n = 0.
        sd: standard deviation of the differences; nan for n < 2, as are the numbers below.
        low, high: the 1 - 2 alpha interval of the mean difference (90 % at alpha = .05).
        half_width: half the length of that interval.
        low_95, high_95: the ordinary 95 % interval.
        p_tost: p-value of the two one-sided t tests.
        margin, alpha: as tested.
        verdict: see ``paired_equivalence``.
        reason: why nothing could be tested, else empty.
    """

    n: int
    mean_difference: float
    sd: float
    low: float
    high: float
    half_width: float
    low_95: float
    high_95: float
    p_tost: float
    margin: float
    alpha: float
    verdict: Verdict
    reason: str = ""


def paired_equivalence(a: ArrayLike, b: ArrayLike, margin: float, alpha: float = 0.05) -> Equivalence:
    """Are a and b, of shape (n,) and paired by seed, equal within ``margin``?

    With the 1 - 2 alpha t interval of the mean of a - b: 'supported' if inside (-margin, margin), which is
    the two one-sided t tests (TOST) at level alpha; 'refuted' if wholly outside [-margin, margin]; else
    'inconclusive', and always so below two pairs. Differences that are all equal give an interval of length
    0 and a p-value of 0 or 1.

    Raises ValueError for unequal lengths, a value that is not finite, a margin that is not positive, or an
    alpha outside (0, .5). Source: Schuirmann 1987; ``statsmodels.stats.weightstats.ttost_paired``.
    """
    x, y = _finite(a, "a"), _finite(b, "b")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"a and b must pair up one to one: they have shapes {x.shape} and {y.shape}")
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"the margin must be positive and finite, not {margin}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie between 0 and .5, not {alpha}")
    n, d = len(x), x - y
    if n < 2:
        mean = float(d[0]) if n else math.nan
        reason = f"an interval needs at least 2 pairs, and there {'is 1' if n else 'are none'}"
        unknown = (math.nan,) * 7
        return Equivalence(n, mean, *unknown, margin, alpha, "inconclusive", reason)
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if np.all(d == d[0]):  # the t statistic is 0 / 0 here
        mean, sd = float(d[0]), 0.0
        low = high = low_95 = high_95 = mean
        p = 0.0 if abs(mean) < margin else 1.0
    else:
        se = sd / math.sqrt(n)
        low, high = (float(x) for x in stats.t.interval(1 - 2 * alpha, n - 1, loc=mean, scale=se))
        low_95, high_95 = (float(x) for x in stats.t.interval(0.95, n - 1, loc=mean, scale=se))
        p = float(ttost_paired(x, y, -margin, margin)[0])
    verdict: Verdict = "inconclusive"
    if -margin < low and high < margin:
        verdict = "supported"
    elif low > margin or high < -margin:
        verdict = "refuted"
    half = (high - low) / 2
    return Equivalence(n, mean, sd, low, high, half, low_95, high_95, p, margin, alpha, verdict)


def over_tasks(verdicts: Iterable[Verdict]) -> Verdict:
    """Intersection-union over tasks: supported if every task is, refuted if any is, else inconclusive.

    Each task is tested at the full alpha and the claim over all still has size alpha, without a correction.
    (The other direction has no such guarantee: with many tasks a chance 'refuted' grows likelier.)
    Raises ValueError for no verdict at all.
    """
    given = list(verdicts)
    if not given:
        raise ValueError("there is no verdict to combine")
    if "refuted" in given:
        return "refuted"
    return "supported" if all(v == "supported" for v in given) else "inconclusive"


def planned_power(n: int, margin: float, sd: float, difference: float = 0.0, alpha: float = 0.05) -> float:
    """Probability that the paired TOST of n pairs ends 'supported', for a true difference.

    ``sd`` is that of the per-seed difference, known before the test runs (a pilot); computed from the tested
    runs themselves it would only restate the p-value. Exact for normal differences: with s = sd u,
    u^2 (n-1) ~ chi^2(n-1), independent of the mean, TOST is passed when |mean| < margin - t s / sqrt(n), so

        power = E_u[ Phi((margin - difference) / se - t u) - Phi((-margin - difference) / se + t u) ]

    over u < margin / (t se), se = sd / sqrt(n), t the 1 - alpha quantile of Student's t at n - 1; integrated
    numerically. (Equal to the bivariate noncentral t, Owen 1965; statsmodels' power classes have only
    difference tests.) 0 for n < 2; for sd = 0, 1 or 0.
    """
    if not margin > 0 or not sd >= 0:
        raise ValueError(f"power needs a positive margin and an sd >= 0, not {margin} and {sd}")
    if n < 2:
        return 0.0
    if sd == 0:
        return float(abs(difference) < margin)
    se, t, df = sd / math.sqrt(n), stats.t.ppf(1 - alpha, n - 1), n - 1

    def integrand(chi: Floats) -> Floats:
        u = chi / math.sqrt(df)
        inside = stats.norm.cdf((margin - difference) / se - t * u) - stats.norm.cdf(
            (-margin - difference) / se + t * u
        )
        return stats.chi.pdf(chi, df) * inside

    start = stats.chi.ppf(1e-14, df)
    end = min(margin / (t * se) * math.sqrt(df), stats.chi.isf(1e-14, df))
    if end <= start:
        return 0.0
    return float(integrate.fixed_quad(integrand, start, end, n=200)[0])


def smallest_margin(n: int, sd: float, power: float = 0.8, difference: float = 0.0, alpha: float = 0.05) -> float:
    """The margin at which ``planned_power`` of n pairs reaches ``power``, in units of the metric."""
    if n < 2 or not sd > 0 or not 0 < power < 1:
        raise ValueError(f"no margin for n = {n}, sd = {sd}, power = {power}: n >= 2, sd > 0, 0 < power < 1")
    upper = abs(difference) + sd
    while planned_power(n, upper, sd, difference, alpha) < power:
        upper *= 2
    return float(
        optimize.brentq(lambda margin: planned_power(n, margin, sd, difference, alpha) - power, upper * 1e-9, upper)
    )


def seeds_needed(margin: float, sd: float, power: float = 0.8, difference: float = 0.0, alpha: float = 0.05) -> int:
    """The smallest number of pairs whose ``planned_power`` is at least ``power``. Raises ValueError if the
    true difference is not inside the margin, or if a million pairs are not enough."""
    if abs(difference) >= margin:
        raise ValueError(f"a true difference of {difference} is outside the margin {margin}")
    if not 0 < power < 1:
        raise ValueError(f"power must lie between 0 and 1, not {power}")

    def enough(n: int) -> bool:
        return planned_power(n, margin, sd, difference, alpha) >= power

    high = 2
    while not enough(high):
        if high > 10**6:
            raise ValueError(f"a million seeds are not enough for a margin of {margin} at an sd of {sd}")
        high *= 2
    low = high // 2  # not enough, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Proportion:
    """k of n, its share, and the Wilson interval of the share; nan for n = 0."""

    k: int
    n: int
    share: float
    low: float
    high: float


def proportion_interval(k: int, n: int, confidence: float = 0.95) -> Proportion:
    """The share of, say, diverged runs. The Wilson interval has sensible ends at k = 0 and k = n, where the
    usual one has length 0. Source: Wilson 1927; ``statsmodels.stats.proportion.proportion_confint``."""
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no proportion")
    if n == 0:
        return Proportion(0, 0, math.nan, math.nan, math.nan)
    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    return Proportion(k, n, k / n, float(low), float(high))


def capped(values: ArrayLike, worst: float, higher_is_better: bool) -> Floats:
    """Values no worse than the task's worst, the value of a diverged run (an infinite one becomes it). NaN is
    an error: a diverged run is recorded as the worst value, not as NaN."""
    x = np.asarray(values, dtype=np.float64)
    if np.isnan(x).any():
        raise ValueError("NaN among the values: a diverged run has the task's worst value")
    return np.maximum(x, worst) if higher_is_better else np.minimum(x, worst)


def sensitivity(values: ArrayLike, worst: float, higher_is_better: bool) -> float:
    """How much a curve over learning rates loses to its own best: the mean over them of the capped metric's
    distance from its best, >= 0, in units of the metric.

    ``values`` has shape (lrs,) or (lrs, seeds), where the seeds of one lr are averaged first. Depends on the
    grid: compare only curves on the same one. Source: Wortsman et al. 2023, "Small-scale proxies for
    large-scale Transformer training instabilities": E_lr[min(loss(lr), loss at initialisation) - best loss].
    """
    x = capped(values, worst, higher_is_better)
    if x.ndim not in (1, 2) or not x.size:
        raise ValueError(f"a curve has shape (lrs,) or (lrs, seeds), not {x.shape}")
    curve = x if x.ndim == 1 else x.mean(axis=1)
    best = curve.max() if higher_is_better else curve.min()
    return float(np.abs(curve - best).mean())


def stable(values: ArrayLike, worst: float, higher_is_better: bool) -> NDArray[np.bool_]:
    """Which runs trained at all: better than the task's worst value. The shape of values."""
    x = capped(values, worst, higher_is_better)
    return x > worst if higher_is_better else x < worst


def largest_stable_lr(lrs: ArrayLike, stable: ArrayLike) -> float:
    """The largest learning rate at which every seed was stable; nan if there is none.

    ``stable`` has shape (lrs,) or (lrs, seeds): what ``stable`` gives, or "did not diverge". An unstable lr
    below it does not lower it.
    """
    grid, ok = np.asarray(lrs, dtype=np.float64), np.asarray(stable, dtype=bool)
    if grid.ndim != 1 or ok.ndim not in (1, 2) or len(ok) != len(grid) or not ok.size:
        raise ValueError(f"{grid.shape} learning rates do not match outcomes of shape {ok.shape}")
    every = ok if ok.ndim == 1 else ok.all(axis=1)
    return float(grid[every].max()) if every.any() else math.nan


def share_diverged(diverged: ArrayLike, confidence: float = 0.95) -> Proportion:
    """The share of runs that diverged, over an array of booleans of any shape."""
    x = np.asarray(diverged, dtype=bool)
    return proportion_interval(int(x.sum()), x.size, confidence)


def _finite(values: ArrayLike, name: str) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds a value that is not finite; nothing is filled in or dropped here")
    return x
