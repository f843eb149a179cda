"""Warmups and decays as functions, and the engine that multiplies the learning rate by them."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optimizers
from optimizers import decays, warmups
from optimizers.engine import CHUNK, _coefficients, _table
from optimizers.rule import available
from tests.optimizers.problems import difference, run, start
from tests.optimizers.table import ROWS

BETA2S = st.floats(0.61, 0.99999)
exactly = settings(derandomize=True, deadline=None, max_examples=30)


def steps(last: int, first: int = 1) -> torch.Tensor:
    return torch.arange(first, last + 1, dtype=torch.float64)


def at(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def test_formulas() -> None:
    t = steps(3000)
    same = {"rtol": 1e-12, "atol": 0}
    cases = {
        warmups.Warmup(): lambda n: 1.0,
        warmups.Linear(7.5): lambda n: min(1.0, n / 7.5),
        warmups.Exponential(100.0): lambda n: 1 - math.exp(-n / 100),
        warmups.UntunedLinear(): lambda n: min(1.0, 0.001 * n / 2),
        warmups.UntunedExponential(): lambda n: 1 - math.exp(-0.001 * n),
    }
    for warmup, formula in cases.items():
        expected = torch.tensor([formula(n) for n in range(1, 3001)], dtype=torch.float64)
        torch.testing.assert_close(warmup.factor(t, 0.999), expected, **same)
    assert warmups.Rectifier().factor(steps(4), 0.999).tolist() == [0, 0, 0, 0]
    assert warmups.Rectifier().factor(at(5.0), 0.999).item() == pytest.approx(0.0173, abs=5e-5)


@exactly
@given(beta2=BETA2S, tau=st.floats(0.5, 1e5))
@pytest.mark.parametrize("name", warmups.WARMUPS)
def test_warmups_rise_from_0_to_1(name: str, beta2: float, tau: float) -> None:
    warmup = warmups.make(name, **({"tau": tau} if name in ("linear", "exponential") else {}))
    t = torch.cat([steps(50), torch.logspace(2, 8, 40, dtype=torch.float64).round()])
    factor = warmup.factor(t, beta2)
    assert factor.dtype == torch.float64 and factor.shape == t.shape
    assert bool(((factor >= 0) & (factor <= 1 + 1e-15)).all())
    # The rectifier's rho cancels to a few ulp of rho_infinity where it no longer grows.
    assert bool((factor.diff() >= -1e-9).all())
    assert factor[-1] == pytest.approx(1, abs=1e-4)


@exactly
@given(beta2=BETA2S)
def test_untuned_linear_reaches_1_at_its_length_rounded_up(beta2: float) -> None:
    length = math.ceil(2 / (1 - beta2))
    before, there = warmups.UntunedLinear().factor(torch.stack([at(length - 1.0), at(float(length))]), beta2)
    assert before < 1 and there == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("beta2", "length"), [(0.98, 100), (0.99, 200), (0.999, 2000), (0.9995, 4000)])
def test_untuned_linear_is_not_a_step_short(beta2: float, length: int) -> None:
    # int(2 / (1 - .999)) is 1999: the schedule would be 1999 / 1999 there, not 1999 / 2000.
    assert warmups.UntunedLinear().factor(at(length - 1), beta2).item() == pytest.approx(1 - 1 / length, rel=1e-12)
    # As floats, 1 - .9995 is a little less than .0005.
    assert warmups.UntunedLinear().factor(at(length), beta2).item() == pytest.approx(1, abs=1e-12)


def test_untuned_linear_has_a_real_length() -> None:
    # 2 / (1 - .9997) is 6666.67: the factor at 6666 is below 1, and no step is 1/6666.
    assert warmups.UntunedLinear().factor(at(6666), 0.9997).item() == pytest.approx(6666 * 0.00015, rel=1e-12)
    assert warmups.UntunedLinear().factor(at(6667), 0.9997).item() == 1


@pytest.mark.parametrize("beta2", [0.98, 0.99, 0.999, 0.9995, 0.9999])
def test_effective_periods(beta2: float) -> None:
    """T = sum of 1 - omega(t): 1 / (e^(1 - beta2) - 1) and 1 / (1 - beta2) - 1/2, nearly the same."""
    t = steps(int(60 / (1 - beta2)))

    def period(warmup: warmups.Warmup) -> float:
        return float((1 - warmup.factor(t, beta2)).sum())

    assert period(warmups.UntunedExponential()) == pytest.approx(1 / math.expm1(1 - beta2), abs=1e-3)
    assert period(warmups.UntunedLinear()) == pytest.approx(1 / (1 - beta2) - 0.5, abs=1e-3)
    # RAdam's, from its first adaptive step, as published to three or four digits.
    rectifier = {0.98: 51.3, 0.99: 102.9, 0.999: 1029, 0.9995: 2058.5, 0.9999: 10292}[beta2]
    assert period(warmups.Rectifier()) - 4 == pytest.approx(rectifier, rel=1e-3)


def test_decays() -> None:
    t = steps(100)
    assert decays.Linear().factor(t, 100).tolist() == pytest.approx([1 - (n - 1) / 100 for n in range(1, 101)])
    cosine = decays.Cosine().factor(t, 100)
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and 0 < cosine[99] < 3e-4
    stages = decays.Milestones((0.5, 0.75), 0.1).factor(t, 100)
    assert stages[49] == 1 and stages[50] == pytest.approx(0.1) and stages[75] == pytest.approx(0.01)
    root = decays.InverseSqrt(25.0).factor(t, 100)
    assert root[:25].tolist() == [1.0] * 25 and root[99] == pytest.approx(0.5)
    assert decays.Decay().factor(t, 100).tolist() == [1.0] * 100


@exactly
@given(budget=st.integers(1, 10**6), at=st.lists(st.floats(0.01, 0.99), max_size=4), gamma=st.floats(0.01, 1))
@pytest.mark.parametrize("name", [name for name in decays.DECAYS if name != "refined"])
def test_decays_fall_from_1_and_never_rise_again(name: str, budget: int, at: list, gamma: float) -> None:
    values = {"milestones": {"at": tuple(at), "gamma": gamma}, "inverse_sqrt": {"tau": 10.0}}.get(name, {})
    decay = decays.make(name, **values)
    t = torch.linspace(1, 2 * budget + 2, 50, dtype=torch.float64).round()
    factor = decay.factor(t, budget)
    assert bool((factor.diff() <= 1e-12).all()) and bool((factor >= 0).all())
    if not at or name != "milestones" or budget > 100:
        assert factor[0] == 1


def refined_by_hand(norms: list[float], power: int) -> list[float]:
    """The recipe of Defazio et al. in plain Python."""
    n = len(norms)
    half = int(0.1 * n) // 2

    def at(i: int) -> float:  # the first value to the left, mirrored at the last to the right
        return norms[0 if i < 0 else i if i < n else 2 * (n - 1) - i]

    smooth = [sorted(at(j) for j in range(i - half, i + half + 1))[half] for i in range(n)]
    weights = [g**-power for g in smooth]
    eta = [weights[i] * math.fsum(weights[i + 1 :]) for i in range(n)]
    return [e / max(eta) for e in eta]


def refined(norm: str, norms: list[float]) -> decays.Decay:
    return decays.Refined(run="0" * 16, norm=norm).from_norms(norms)  # type: ignore[arg-type]


@exactly
@given(norms=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=90))
@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_the_refined_decay_is_the_recipe(norm: str, power: int, norms: list[float]) -> None:
    factor = refined(norm, norms).factor(steps(len(norms)), len(norms)).tolist()
    assert factor == pytest.approx(refined_by_hand(norms, power), rel=1e-9, abs=1e-15)
    assert max(factor) == 1 and factor[-1] == 0 and min(factor) >= 0


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_what_a_refined_decay_looks_like(norm: str) -> None:
    n = 200
    constant = refined(norm, [3.0] * n)
    assert constant.factor(steps(n), n).tolist() == pytest.approx([(n - t) / (n - 1) for t in range(1, n + 1)])
    # Another budget, its share counts: linear stays linear up to the resolution of a step; nothing comes after the end.
    other = constant.factor(steps(520), 500)
    assert other[:500].tolist() == pytest.approx([1 - t / 500 for t in range(1, 501)], abs=1 / n)
    assert other[499:].abs().max() == 0 and other[0] == 1
    assert constant.factor(at(100.0), 100).shape == () and constant.factor(steps(4).reshape(2, 2), 4).shape == (2, 2)
    # Norms that fall give a warmup, norms that rise a faster fall than linear; a single spike is filtered out.
    fall, rise = [n / t for t in range(1, n + 1)], [float(t) for t in range(1, n + 1)]
    warm, fast = (refined(norm, norms).factor(steps(n), n) for norms in (fall, rise))
    assert warm.argmax() > 0.3 * n and warm[0] < 0.1
    assert fast[0] == 1 and fast[n // 2] < 0.1
    spike = [1.0] * n
    spike[50] = 1e3
    assert torch.equal(refined(norm, spike).factor(steps(n), n), refined(norm, [1.0] * n).factor(steps(n), n))


def test_a_refined_decay_travels_with_its_norms() -> None:
    decay = refined("l2", [4.0, 3.0, 2.0, 1.0])
    other = pickle.loads(pickle.dumps(decay))
    assert torch.equal(other.factor(steps(4), 4), decay.factor(steps(4), 4)) and other == decay
    assert not decays.Refined(run="0" * 16).known
    for few in ([], [1.0], [1.0, 0.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="2 or more gradient norms"):
            refined("l1", few)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: warmups.make("lineer"),
            r"^no warmup is called 'lineer'; there are: none, linear, exp",
        ),
        (lambda: decays.make("step"), r"^no decay is called 'step'; there are: constant, linear, cosine"),
        (lambda: warmups.make("linear", tau=0.0), "greater than 0"),
        (lambda: warmups.make("linear", tau="10"), "valid number"),
        (lambda: warmups.make("linear", tau=10.0, steps=3), "(?i)unexpected keyword"),
        (lambda: warmups.make("untuned_linear").factor(at(1), None), "this optimizer has none"),
        (lambda: decays.make("milestones", at=[1.5]), "less than 1"),
        (lambda: decays.make("milestones", at=["0.5"]), "valid number"),
        (lambda: decays.make("refined", run="abc"), "match pattern"),
        (lambda: decays.make("refined", run="a" * 16).factor(at(1), 9), "^the gradient norms of run a+ are not known"),
    ],
)
def test_mistakes(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_engine_multiplies_the_learning_rate() -> None:
    """AdamW with warmup and decay is torch's AdamW whose lr is set at every step, weight decay included."""
    params = start()
    warmup, decay = warmups.UntunedLinear(), decays.Cosine()
    optimizer = optimizers.AdamW(params, lr=0.05, beta2=0.95, weight_decay=0.1, warmup=warmup, decay=decay, steps=60)
    ours = run(optimizer, params, 1, 60)
    params = start()
    theirs = torch.optim.AdamW(params, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    factor = warmup.factor(steps(60), 0.95) * decay.factor(steps(60), 60)
    for t in range(1, 61):
        theirs.param_groups[0]["lr"] = 0.05 * float(factor[t - 1])
        last = run(theirs, params, t, t)
    assert difference(ours, last) < 1e-13


@pytest.mark.parametrize("t", [1, 2, 1023, 1024, 1025, 1026, 2048, 2049, 100_000, 1_000_000])
def test_the_tables_agree_with_the_formulas_at_any_step(t: int) -> None:
    warmup, decay = warmups.UntunedExponential(), decays.Linear()
    optimizer = optimizers.Adam(start(), warmup=warmup, decay=decay, steps=200_000)
    expected = float(warmup.factor(at(t), 0.9999) * decay.factor(at(t), 200_000))
    assert optimizer.schedule(t, 0.9999) == pytest.approx(expected, rel=1e-14)
    for kind in available().values():
        rule = kind()
        direct = {k: float(v) for k, v in rule.coefficients(at(t)).items()}
        assert _coefficients(rule, t) == pytest.approx(direct, rel=1e-13)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_coefficients_do_not_depend_on_how_they_are_asked_for(row) -> None:  # type: ignore[no-untyped-def]
    rule = available()[row.rule](**row.hyper)
    together = rule.coefficients(steps(CHUNK + 2, CHUNK - 1).reshape(2, 2))
    for name, values in together.items():
        assert values.shape == (2, 2) and values.dtype == torch.float64
        for t, value in zip(range(CHUNK - 1, CHUNK + 3), values.flatten().tolist(), strict=True):
            # Vectorised pow and scalar pow may differ in the last bit.
            assert value == pytest.approx(float(rule.coefficients(at(t))[name]), rel=1e-14, abs=1e-16)
            assert value == pytest.approx(_coefficients(rule, t)[name], rel=1e-14, abs=1e-16)


def test_a_run_crosses_a_chunk_as_torch_does() -> None:
    params = start()
    ours = run(optimizers.Adam(params, lr=0.001), params, 1, CHUNK + 4)
    params = start()
    theirs = run(torch.optim.Adam(params, lr=0.001), params, 1, CHUNK + 4)
    assert difference(ours, theirs) < 1e-11


def test_memory_of_the_tables_is_bounded() -> None:
    _table.cache_clear()
    rule = available()["adam"]()
    for chunk in range(50):
        _coefficients(rule, chunk * CHUNK + 1)
    assert _table.cache_info().currsize <= 32
