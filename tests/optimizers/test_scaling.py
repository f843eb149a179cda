"""Scaling rules against their closed forms."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizers.scaling import SCALINGS, Linear, Scaling, Sqrt, Surge

SIZES = [2**k for k in range(16)]


def every(base: int) -> list[Scaling]:
    return [Scaling(), Linear(base), Sqrt(base), Surge(base, 300.0), Surge(base, 300.0, "sgd")]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(base=st.integers(1, 10**6))
def test_the_factor_is_1_at_the_base(base: int) -> None:
    assert {type(s) for s in every(base)} == set(SCALINGS.values())
    assert all(s.factor(base) == 1 for s in every(base))


def test_formulas() -> None:
    for b in SIZES:
        assert [s.factor(b) for s in every(64)[:3]] == pytest.approx([1.0, b / 64, math.sqrt(b) / 8], rel=1e-14)
        # From base = noise on, lr is the highest rate there is; for SGD it is then half of it.
        adam = 1 / (0.5 * (math.sqrt(256 / b) + math.sqrt(b / 256)))
        assert Surge(256, 256.0).factor(b) == pytest.approx(adam, rel=1e-14)
        assert Surge(256, 256.0, "sgd").factor(b) == pytest.approx(2 / (1 + 256 / b), rel=1e-14)


def test_adam_surges_at_the_noise_scale() -> None:
    rates = {b: Surge(32, 256.0).factor(b) for b in SIZES}
    assert max(rates, key=rates.__getitem__) == 256
    assert rates[128] == pytest.approx(rates[512])
    assert Surge(32, 256.0, "sgd").factor(10**9) == pytest.approx(1 + 256 / 32, rel=1e-6)  # rises to eps_max


def test_small_batches_follow_the_square_root_and_linear_rules() -> None:
    for b in SIZES[:8]:
        assert Surge(1, 1e9).factor(b) == pytest.approx(Sqrt(1).factor(b), rel=1e-6)
        assert Surge(1, 1e9, "sgd").factor(b) == pytest.approx(Linear(1).factor(b), rel=1e-6)
