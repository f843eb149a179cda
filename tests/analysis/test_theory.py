"""The theory against closed forms, exact arithmetic, and the numbers of the literature."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from analysis import theory
from optimizers.warmups import Exponential, Linear, Rectifier, UntunedExponential, UntunedLinear, Warmup

BETAS = (0.9, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999)


def test_rho_and_rectifier_at_the_published_steps():
    assert theory.rho([1, 2, 3, 4, 5, 6], 0.999) == pytest.approx([1.0, 1.9995, 2.9987, 3.9975, 4.996, 5.994], abs=6e-4)
    t = [5, 6, 10, 50, 100, 200, 500, 1000, 2000, 3000, 5000]
    published = [0.0173, 0.0258, 0.0490, 0.148, 0.215, 0.307, 0.477, 0.645, 0.828, 0.918, 0.983]
    assert theory.rectification(t, 0.999) == pytest.approx(published, abs=6e-4)
    assert not theory.rectification([1, 2, 3, 4], 0.999).any()
    assert theory.exact_rectification([4, 5, 6, 10, 50], 0.999) == pytest.approx(
        [0, 0.0315, 0.0378, 0.0575, 0.1517], abs=6e-5
    )


def test_variance_at_the_published_lengths():
    rho = np.array([5, 6, 8, 10, 20, 50, 100, 500])
    exact, first = theory.psi_variance(rho), theory.psi_variance_first_order(rho)
    assert exact == pytest.approx([0.2520, 0.1746, 0.1062, 0.0755, 0.0304, 0.01079, 0.005193, 0.0010075], rel=1.5e-3)
    assert first == pytest.approx([0.8333, 0.3750, 0.1667, 0.1042, 0.0347, 0.01132, 0.005315, 0.0010121], rel=1.5e-3)
    assert first / exact == pytest.approx([3.31, 2.15, 1.57, 1.38, 1.14, 1.05, 1.02, 1.005], abs=6e-3)
    assert exact[0] / exact[-1] == pytest.approx(250, abs=0.5)
    assert first[0] / first[-1] == pytest.approx(823, abs=0.5)


@pytest.mark.parametrize("rho", [4, 6, 10, 100, 1000, 10_000])
def test_exact_variance_by_integer_arithmetic(rho):
    # For rho = 2k the ratio of gammas is sqrt(pi) C(2k-2, k-1) / 4^(k-1): rational but for pi.
    k = rho // 2
    pi = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
    second = Fraction(math.comb(2 * k - 2, k - 1), 4 ** (k - 1)) ** 2 * pi * k
    assert theory.psi_variance(rho) == pytest.approx(float(Fraction(rho, rho - 2) - second), rel=1e-6)


def test_exact_variance_is_that_of_a_simple_average():
    # psi = sqrt(rho / chi2(rho)); its mean by quadrature instead of gammas.
    for rho in (5, 12, 80):
        mean = stats.chi2(rho).expect(lambda x, n=rho: np.sqrt(n / x))
        assert theory.psi_variance(rho, sigma=2.0) == pytest.approx((rho / (rho - 2) - mean**2) / 4, rel=1e-6)


def test_variance_does_not_exist_for_short_averages():
    assert np.isnan(theory.psi_variance([1, 2])).all()
    assert np.isnan(theory.psi_variance_first_order([1, 4])).all()


@pytest.mark.parametrize("beta2", BETAS)
def test_untuned_periods(beta2):
    linear = theory.effective_period(UntunedLinear(), beta2)
    exponential = theory.effective_period(UntunedExponential(), beta2)
    assert linear == pytest.approx(1 / (1 - beta2) - 0.5, rel=1e-9)
    assert linear == pytest.approx(theory.linear_period(2 / (1 - beta2)), rel=1e-9)
    assert exponential == pytest.approx(theory.exponential_period(1 / (1 - beta2)), rel=1e-9)


@pytest.mark.parametrize(
    ("beta2", "adaptive", "all_steps"),
    [
        (0.9, 9.9, 13.9),
        (0.98, 51.3, 55.3),
        (0.99, 102.9, 106.9),
        (0.999, 1029.3, 1033.3),
        (0.9999, 10292, 10296),
    ],
)
def test_period_of_the_rectifier_in_both_conventions(beta2, adaptive, all_steps):
    first = theory.first_adaptive_step(beta2)
    assert first == 5
    counted = theory.effective_period(Rectifier(), beta2, first)
    assert counted == pytest.approx(adaptive, rel=1e-4, abs=0.05)
    assert theory.effective_period(Rectifier(), beta2) == pytest.approx(counted + 4)
    assert theory.effective_period(Rectifier(), beta2) == pytest.approx(all_steps, rel=1e-4, abs=0.05)


@pytest.mark.parametrize("tau", [0.4, 1.0, 7.3, 2000.0])
def test_periods_of_tuned_warmups(tau):
    assert theory.effective_period(Linear(tau)) == pytest.approx(theory.linear_period(tau), rel=1e-9, abs=1e-12)
    assert theory.effective_period(Exponential(tau)) == pytest.approx(theory.exponential_period(tau), rel=1e-9)
    assert theory.effective_period(Warmup()) == 0


def test_first_adaptive_step():
    assert [theory.first_adaptive_step(b) for b in (0.61, 0.7, 0.8, 0.9, 0.9999)] == [11, 6, 5, 5, 5]
    with pytest.raises(ValueError, match="never exceeds 4"):
        theory.first_adaptive_step(0.6)


def test_effective_length_is_that_of_the_weights():
    beta2, t = 0.99, 37
    weights = beta2 ** np.arange(t)
    length = weights.sum() ** 2 / (weights**2).sum()
    assert theory.effective_length(t, beta2) == pytest.approx(length)
    steps = theory.steps(20_000)
    ratio = theory.effective_length(steps, 0.999) / theory.rho(steps, 0.999)
    assert ratio.max() == pytest.approx(1.116, abs=1e-3)
    assert abs((1 - 0.999) * steps[ratio.argmax()] - 1.5) < 0.01
    assert ratio[-1] == pytest.approx(1, abs=1e-6)


def test_simulated_variance_follows_theory_and_the_published_run():
    run = theory.simulate_psi(trajectories=5000, iterations=1000, seed=1)
    at = np.array([10, 50, 500]) - 1
    # Sampling error of a variance over 5000 trajectories: 2 % for normal psi, more for the tails at t = 10.
    assert run.raw[at] == pytest.approx([7.5e-2, 1.07e-2, 1.0e-3], rel=0.1)
    assert run.rectified[at] == pytest.approx([1.8e-4, 2.35e-4, 2.3e-4], rel=0.1)
    assert run.raw[4] == pytest.approx(0.24, rel=0.3)  # barely has a variance of its own
    assert run.rectified == pytest.approx(theory.rectification(run.t, 0.999) ** 2 * run.raw)
    late = slice(19, None)
    assert run.raw[late] == pytest.approx(theory.psi_variance(theory.effective_length(run.t[late], 0.999)), rel=0.12)


def test_simulated_variance_with_a_mean_and_a_scale():
    run = theory.simulate_psi(mu=10, trajectories=5000, iterations=10)
    assert run.raw[4] == pytest.approx(2.0e-5, rel=0.1)
    assert run.rectified[4] == pytest.approx(6e-9, rel=0.1)
    scaled = theory.simulate_psi(mu=20, sigma=2, trajectories=5000, iterations=10)
    assert scaled.raw == pytest.approx(run.raw / 4)  # the same seed is the same noise


def test_rectified_variance_is_too_small_at_first():
    t = np.array([5, 10, 20, 50, 100])
    rectified = theory.rectification(t, 0.999) ** 2 * theory.psi_variance(theory.rho(t, 0.999))
    relative = rectified / theory.psi_variance(1999)
    assert 1 / relative[0] == pytest.approx(3.31, abs=0.02)
    assert relative[1:] == pytest.approx([0.726, 0.877, 0.955, 0.98], abs=0.005)


def test_update_magnitude_against_the_published_run():
    run = theory.simulate_updates(coordinates=20_000, iterations=100)
    at = np.array([1, 2, 3, 4, 5, 10, 20, 40, 100]) - 1
    published = [1.00, 0.707, 0.503, 0.407, 0.351, 0.238, 0.181, 0.159, 0.155]
    assert run.median[at] == pytest.approx(published, rel=0.03)
    rms = [0.998, 0.707, 0.579, 0.503, 0.452, 0.330, 0.259, 0.232, 0.229]
    assert run.rms[at] == pytest.approx(rms, rel=0.03)
    assert (run.low <= run.median).all()
    assert (run.median <= run.high).all()


def test_transient_depends_on_beta1_only():
    assert theory.stationary_update(0.9) == pytest.approx(0.1547, abs=5e-5)
    assert stats.norm.ppf(0.75) == pytest.approx(theory.NORMAL_MEDIAN)
    runs = [theory.simulate_updates(beta2=b, coordinates=10_000, iterations=150) for b in (0.98, 0.999)]
    lengths = [theory.transient_length(run.median, theory.stationary_update(0.9)) for run in runs]
    assert all(25 < length < 50 for length in lengths)
    assert runs[0].median == pytest.approx(runs[1].median, abs=4e-3)
    slow = theory.simulate_updates(beta1=0.5, coordinates=10_000, iterations=60)
    assert theory.transient_length(slow.median, theory.stationary_update(0.5)) < 25


def test_transient_length_of_given_curves():
    assert theory.transient_length([1.0, 1.0], 1.0) == 1
    assert theory.transient_length([3, 2, 1.04, 1.0, 0.96], 1.0) == 3
    with pytest.raises(ValueError, match="more iterations"):
        theory.transient_length([3, 2], 1.0)


def test_simulations_repeat_with_their_seed():
    few = {"iterations": 8, "seed": 3}
    assert np.array_equal(
        theory.simulate_psi(trajectories=9, **few).raw, theory.simulate_psi(trajectories=9, **few).raw
    )
    first = theory.simulate_updates(coordinates=9, **few).median
    assert np.array_equal(first, theory.simulate_updates(coordinates=9, **few).median)
    assert not np.array_equal(first, theory.simulate_updates(coordinates=9, iterations=8, seed=4).median)
