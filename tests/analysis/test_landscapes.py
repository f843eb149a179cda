"""The landscapes against autograd, their runs against a recurrence, and Lookahead's variance against simulation."""

import math

import numpy as np
import pytest
import torch

from analysis import landscapes
from analysis.landscapes import LANDSCAPES, Path
from optimizers.rule import available, make


@pytest.mark.parametrize("name", LANDSCAPES)
def test_gradient_is_that_of_the_value(name):
    landscape = LANDSCAPES[name]
    x, y = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.autograd.grad(landscape.value(x, y).sum(), (x, y))
    for ours, theirs in zip(landscape.gradient(x, y), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_minima(name):
    landscape = LANDSCAPES[name]
    left, right, bottom, top = landscape.window
    x, y = np.meshgrid(np.linspace(left, right, 401), np.linspace(bottom, top, 401))
    values = landscape.value(x, y)
    nearest = np.min([np.hypot(x - a, y - b) for a, b in landscape.minima], axis=0)
    for point in landscape.minima:
        assert landscape.value(*point) == 0
        assert landscape.gradient(*point) == pytest.approx((0, 0), abs=1e-15)
        assert left < point[0] < right and bottom < point[1] < top
    assert values[nearest > 0].min() > 0  # nowhere else
    a, b = landscape.start
    assert left < a < right and bottom < b < top


def test_the_saddle_is_one():
    x, y = torch.zeros(2, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(LANDSCAPES["saddle"].value, (x, y))
    assert LANDSCAPES["saddle"].gradient(0.0, 0.0) == (0, 0)
    assert hessian[0][0] < 0 < hessian[1][1]


def test_every_rule_has_a_panel_and_runs():
    rules = landscapes.rules()
    assert rules.keys() - available().keys() == {"sgd, momentum"}
    assert available().keys() <= rules.keys()
    families = [rule.family for rule in rules.values()]
    assert families == sorted(families)
    for name, rule in rules.items():
        path = landscapes.descend(rule, LANDSCAPES["rosenbrock"], 1e-3 * rule.published_lr, 3)
        assert not path.diverged and path.trained.shape == path.evaluated.shape == (4, 2), name
        # Adam2k spends its first 2000 steps on the second moment alone.
        assert name == "adam2k" or len(np.unique(path.trained, axis=0)) > 1, name


def test_a_run_is_the_recurrence_and_repeats():
    landscape = LANDSCAPES["rosenbrock"]
    path = landscapes.descend(make("sgd", momentum=0.5), landscape, 1e-4, 20)
    at, b = np.array(landscape.start), np.zeros(2)
    for step in range(21):
        assert path.trained[step] == pytest.approx(at, rel=1e-12)
        assert path.values[step] == pytest.approx(landscape.value(*at), rel=1e-12)
        b = 0.5 * b + np.array(landscape.gradient(*at))
        at = at - 1e-4 * b
    assert path.final == path.values[-1]
    assert np.array_equal(path.evaluated, path.trained)
    again = landscapes.descend(make("sgd", momentum=0.5), landscape, 1e-4, 20)
    assert np.array_equal(path.trained, again.trained)


def test_an_average_is_what_is_evaluated():
    path = landscapes.descend(make("iterateaveraging", inner={"name": "sgd"}), LANDSCAPES["ravine"], 0.1, 10)
    assert path.evaluated[10] == pytest.approx(path.trained[1:].mean(axis=0))
    assert path.values[10] == pytest.approx(LANDSCAPES["ravine"].value(*path.evaluated[10]))


def test_a_run_that_leaves_has_diverged_and_is_never_the_best():
    ravine = LANDSCAPES["ravine"]
    paths = landscapes.search(make("sgd"), ravine, 60, multiples=(1.0, 10.0, 0.1))
    assert [path.diverged for path in paths] == [False, True, False]
    assert [path.lr for path in paths] == pytest.approx([0.1, 1.0, 0.01])
    assert len(paths[1].trained) < 60 and paths[1].final == math.inf
    assert landscapes.best(paths) is paths[0]
    with pytest.raises(ValueError, match="every run diverged"):
        landscapes.best(paths[1:2])


def test_among_equals_the_smallest_lr_is_best():
    nowhere = np.zeros((1, 2))
    paths = [Path(lr, nowhere, nowhere, np.array([value]), False) for lr, value in ((1, 0.5), (3, 0.2), (2, 0.2))]
    assert landscapes.best(paths).lr == 2


def published_ratio(rate, alpha, k):
    """Proposition 2 of Zhang et al. 2019, as printed."""
    a, whole = 1 - rate, alpha**2 * (1 - (1 - rate) ** (2 * k))
    return whole / (whole + 2 * alpha * (1 - alpha) * (1 - a**k))


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_closed_form_is_the_published_one_and_the_fixed_point(k):
    rate, alpha = np.meshgrid([0.01, 0.3, 1.0, 1.7], [0.1, 0.5, 0.9, 1.0])
    sgd = rate**2 / (1 - (1 - rate) ** 2)
    assert landscapes.sgd_variance(rate) == pytest.approx(sgd)
    ours = landscapes.lookahead_variance(rate, alpha, k, sigma=3.0)
    assert ours == pytest.approx(9 * published_ratio(rate, alpha, k) * sgd)
    # What one round does to the variance, noise added step by step.
    noise = sum((1 - rate) ** (2 * i) for i in range(k)) * rate**2 * 9
    after = landscapes.lookahead_contraction(rate, alpha, k) ** 2 * ours + alpha**2 * noise
    assert after == pytest.approx(ours)
    assert landscapes.lookahead_variance(rate, 1.0, k) == pytest.approx(sgd)


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 5), (0.8, 2), (1.0, 3)])
def test_simulated_variance_is_the_closed_form(alpha, k):
    rates, chains = [0.2, 0.5, 1.0, 1.5], 4000
    slow = landscapes.simulate_lookahead(rates, alpha, k, sigma=2.0, chains=chains)
    assert slow.shape == (4, chains)
    expected = np.array([landscapes.lookahead_variance(rate, alpha, k, sigma=2.0) for rate in rates])
    assert np.abs((slow**2).mean(axis=1) / expected - 1).max() < 4 * math.sqrt(2 / chains)
    assert np.abs(slow.mean(axis=1) / np.sqrt(expected / chains)).max() < 4


def test_without_noise_the_slow_weights_contract_as_stated():
    rates = [0.1, 0.7, 1.2]
    slow = landscapes.simulate_lookahead(rates, 0.6, 5, sigma=0.0, start=2.0, rounds=3, chains=2)
    expected = [2 * landscapes.lookahead_contraction(rate, 0.6, 5) ** 3 for rate in rates]
    assert slow == pytest.approx(np.array([expected, expected]).T, rel=1e-12)


def test_simulation_repeats_with_its_seed():
    def run(seed):
        return landscapes.simulate_lookahead([0.5], 0.5, 2, rounds=3, chains=5, seed=seed)

    assert np.array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))


def test_matched_sgd_contracts_alike():
    rate = landscapes.matched_rate(0.3, 0.5, 5)
    assert (1 - rate) ** 5 == pytest.approx(landscapes.lookahead_contraction(0.3, 0.5, 5))
    assert landscapes.matched_rate(1e-6, 0.5, 5) == pytest.approx(0.5e-6, rel=1e-5)  # a flat direction: alpha gamma
