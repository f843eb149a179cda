"""What RAdam is: k momentum (or idle) steps, then Adam times r_t, in its three variants."""

import math

import pytest
import torch

import optimizers
from optimizers import warmups
from optimizers.rectifier import rectification, rho, rho_infinity
from tests.optimizers.problems import difference, run, start
from tests.optimizers.table import STEPS, AuthorsRAdam, authors

BETA2S = [0.9, 0.98, 0.99, 0.995, 0.997, 0.999, 0.9995, 0.9999]
FIRST = {"paper": 5, "torch": 6, "authors": 6}


def steps(last: int) -> torch.Tensor:
    return torch.arange(1, last + 1, dtype=torch.float64)


@pytest.mark.parametrize("beta2", BETA2S)
@pytest.mark.parametrize("variant", FIRST)
def test_first_adaptive_step(variant: str, beta2: float) -> None:
    adaptive = optimizers.RAdam.rule_type(beta2=beta2, variant=variant).coefficients(steps(50))["root"]
    assert adaptive.tolist() == [float(t >= FIRST[variant]) for t in range(1, 51)]


def test_rho_of_the_first_steps() -> None:
    # FACTS: computed from the formula for beta2 = .999.
    expected = [1.000, 1.9995, 2.9987, 3.9975, 4.996, 5.994]
    torch.testing.assert_close(rho(steps(6), 0.999).tolist(), expected, rtol=0, atol=6e-4)
    assert rho_infinity(0.999) == pytest.approx(1999)


def test_rectification_at_known_steps() -> None:
    known = {5: 0.0173, 10: 0.0490, 50: 0.148, 100: 0.215, 200: 0.307, 500: 0.477, 1000: 0.645}
    known |= {2000: 0.828, 3000: 0.918, 5000: 0.983}
    t = torch.tensor(list(known), dtype=torch.float64)
    r = rectification(rho(t, 0.999), 0.999)
    for value, expected in zip(r.tolist(), known.values(), strict=True):
        assert value == pytest.approx(expected, abs=6e-4)


def test_rectification_is_the_papers_formula() -> None:
    limit, t = 2 / (1 - 0.99) - 1, 37
    now = limit - 2 * t * 0.99**t / (1 - 0.99**t)
    expected = math.sqrt((now - 4) * (now - 2) * limit / ((limit - 4) * (limit - 2) * now))
    r = rectification(rho(torch.tensor(37.0, dtype=torch.float64), 0.99), 0.99)
    assert float(r) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_is_momentum_or_idle_steps_then_adam_times_r(variant: str, beta2: float) -> None:
    """By hand: the momentum steps are spelled out, the adaptive ones are Adam's own step times r_t.

    eps is 0 on both sides, as RAdam adds it before the bias correction of v and Adam after it.
    """
    params = start()
    ours = run(optimizers.RAdam(params, lr=0.01, beta2=beta2, eps=0.0, variant=variant), params, 1, 60)

    params = start()
    adam = torch.optim.Adam(params, lr=0.0, betas=(0.9, beta2), eps=0.0)
    r = rectification(rho(steps(60), beta2), beta2)
    for t in range(1, 61):
        adaptive = t >= FIRST[variant]
        adam.param_groups[0]["lr"] = 0.01 * float(r[t - 1]) if adaptive else 0.0
        theirs = run(adam, params, t, t)
        if not adaptive and variant != "authors":
            with torch.no_grad():
                for p in params:
                    p.sub_(adam.state[p]["exp_avg"] / (1 - 0.9**t), alpha=0.01)
            theirs = [p.detach().clone() for p in params]
    assert difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_adam_with_the_rectifier_warmup_is_radam_with_four_idle_steps(beta2: float) -> None:
    params = start()
    adam = optimizers.Adam(params, lr=0.01, beta2=beta2, eps=0.0, warmup=warmups.Rectifier())
    warmed = run(adam, params, 1, 80)

    # RAdam of the paper, with the learning rate at 0 during its momentum steps.
    params = start()
    radam = optimizers.RAdam(params, lr=0.0, beta2=beta2, eps=0.0)
    run(radam, params, 1, 4)
    radam.param_groups[0]["lr"] = 0.01
    assert difference(warmed, run(radam, params, 5, 80)) < 1e-12


@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.6])
def test_a_small_beta2_makes_it_momentum_sgd_throughout(beta2: float) -> None:
    params = start()
    ours = run(optimizers.RAdam(params, lr=0.01, beta2=beta2), params, 1, 60)
    params = start()
    m = [torch.zeros_like(p) for p in params]
    for t in range(1, 61):
        run(torch.optim.SGD(params, lr=0.0), params, t, t)
        with torch.no_grad():
            for p, mean in zip(params, m, strict=True):
                mean.mul_(0.9).add_(p.grad, alpha=0.1)
                p.sub_(mean / (1 - 0.9**t), alpha=0.01)
    assert difference(ours, [p.detach() for p in params]) < 1e-12


@pytest.mark.parametrize(
    ("case", "idle"),
    [("radam authors, idle below threshold", True), ("radam authors, momentum steps below threshold", False)],
)
def test_the_authors_trajectories_are_their_arithmetic_in_float32(case: str, idle: bool) -> None:
    """Why the rows of the table do not read these trajectories: they carry float32 rounding (1e-7 a step).

    The same arithmetic in float32 reproduces them, to the bit for 50 steps; in float64 it is the reference of
    the rows.
    """
    params, seen = start(), {}
    optimizer = AuthorsRAdam(params, idle, torch.float32)
    run(optimizer, params, 1, STEPS, lambda t: seen.update({t: [p.detach().clone() for p in params]}))
    for t, expected in authors("radam", case)().items():
        for a, b in zip(seen[t], expected, strict=True):
            # The gradients' own last bit differs in float64; once in a while that changes a float32.
            torch.testing.assert_close(a, b, rtol=0 if t <= 50 else 1e-6, atol=1e-15)

    params = start()
    variant = "authors" if idle else "torch"
    ours = optimizers.RAdam(params, lr=0.01, betas=(0.9, 0.99), variant=variant, weight_decay=0.02)
    for a, b in zip(run(ours, params, 1, STEPS), authors("radam", case)()[STEPS], strict=True):
        torch.testing.assert_close(a, b, rtol=3e-5, atol=1e-7)


def test_the_idle_variant_does_not_even_decay() -> None:
    params = start()
    optimizer = optimizers.RAdam(params, lr=0.1, weight_decay=0.5, variant="authors")
    assert difference(run(optimizer, params, 1, 5), start()) == 0
    assert difference(run(optimizer, params, 6, 6), start()) > 0
