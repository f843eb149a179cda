"""Lookahead over every rule, its evaluation weights, and what it refuses."""

import pytest
import torch

import optimizers
from optimizers.lookahead import Lookahead
from optimizers.rule import available, make
from tests.optimizers.problems import equal, run, start

INNER = [{"name": name} for name in available() if name != "lookahead"] + [
    {"name": "sgd", "momentum": 0.9, "nesterov": True}
]


@pytest.mark.parametrize("momentum", ["keep", "reset", "pullback", "pullback_authors"])
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_runs_over_every_rule(inner: dict, momentum: str) -> None:
    if momentum != "keep" and not make(**inner).momentum_state:
        says = "needs the momentum's own values" if inner["name"] == "eightbit" else "names no momentum_state"
        with pytest.raises(ValueError, match=says):
            make("lookahead", inner=inner, momentum=momentum)
        return
    params = start()
    optimizer = optimizers.Lookahead(params, lr=0.01, inner=inner, k=3, alpha=0.5, momentum=momentum)
    end = run(optimizer, params, 1, 9)
    assert all(bool(p.isfinite().all()) for p in end)
    # A step of Lookahead has just been: fast and slow weights agree, but for a rule that already looks further.
    slow = [optimizer.state[p]["slow"] for p in params]
    ahead = [optimizer.state[p]["v"] for p in params] if make(**inner).predicts else [torch.zeros(())] * 2
    assert equal(end, [s + v for s, v in zip(slow, ahead, strict=True)])


@pytest.mark.parametrize("inner", INNER, ids=str)
def test_alpha_one_is_the_inner_rule(inner: dict) -> None:
    params = start()
    ours = run(optimizers.Lookahead(params, lr=0.01, inner=inner, k=3, alpha=1.0), params, 1, 20)
    rule = make(**inner)
    params = start()
    kind = getattr(optimizers, type(rule).__name__)
    values = {k: v for k, v in inner.items() if k != "name"}
    for a, b in zip(ours, run(kind(params, lr=0.01, **values), params, 1, 20), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-15)


def test_takes_the_facts_of_its_inner_rule() -> None:
    rule = Lookahead(inner=make("radam", beta2=0.98))
    assert rule.own_warmup and rule.second_moment_beta == 0.98
    assert rule.weight_decay_mode == "decoupled" and rule.momentum_state == ("m",)
    assert make("lookahead", inner={"name": "adan"}).weight_decay_mode == "proximal"


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_weights_are_the_slow_ones_and_the_fast_ones_come_back(fails: bool) -> None:
    params = start(torch.float32)
    optimizer = optimizers.Lookahead(params, lr=0.01, k=5)
    with optimizer.evaluation_weights():
        assert equal([p.detach() for p in params], [p.detach() for p in start(torch.float32)])
    fast = run(optimizer, params, 1, 7)
    slow = [optimizer.state[p]["slow"].clone() for p in params]
    assert not equal(fast, slow)
    try:
        with optimizer.evaluation_weights():
            assert equal([p.detach() for p in params], slow)
            if fails:
                raise KeyError("evaluation failed")
    except KeyError:
        assert fails
    assert equal([p.detach() for p in params], fast)
    assert equal([optimizer.state[p]["slow"] for p in params], slow)


def test_evaluation_weights_of_other_rules_are_the_parameters() -> None:
    params = start()
    optimizer = optimizers.Adam(params, lr=0.01)
    end = run(optimizer, params, 1, 3)
    with optimizer.evaluation_weights():
        assert equal([p.detach() for p in params], end)


def test_may_not_wrap_itself() -> None:
    with pytest.raises(ValueError, match="Lookahead: Lookahead cannot wrap itself: the two would share their state"):
        optimizers.Lookahead(start(), inner={"name": "lookahead"})
    with pytest.raises(ValueError, match="cannot wrap itself"):
        Lookahead(inner=Lookahead())


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"k": 0}, r"^Lookahead: k: Input should be greater than or equal to 1, got 0$"),
        ({"k": 2.5}, r"^Lookahead: k: Input should be a valid integer, got 2\.5$"),
        ({"alpha": 0.0}, r"^Lookahead: alpha: Input should be greater than 0, got 0\.0$"),
        ({"alpha": "0.5"}, r"^Lookahead: alpha: Input should be a valid number, got '0\.5'$"),
        ({"momentum": "drop"}, r"^Lookahead: momentum: Input should be 'keep', 'reset', 'pullback' or "),
        (
            {"inner": {"name": "adamm"}},
            r"^Lookahead: inner: no optimizer is called 'adamm'; there are: ",
        ),
        (
            {"inner": {"name": "adam", "beta2": 1.0}},
            r"^Lookahead: inner\.beta2: Input should be less than 1",
        ),
        (
            {"inner": {"name": "eightbit", "inner": {"name": "lion", "beta3": 0.9}}},
            r"^Lookahead: unknown option 'inner\.inner\.beta3'; Lion has: beta1, beta2$",
        ),
    ],
)
def test_bad_settings(hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizers.Lookahead(start(), **hyper)


def test_a_group_may_have_its_own_inner_rule() -> None:
    params = start()
    inner = {"name": "sgd", "momentum": 0.5}
    groups = [{"params": params[:1]}, {"params": params[1:], "inner": inner, "lr": 0.02}]
    ours = run(optimizers.Lookahead(groups, lr=0.01), params, 1, 20)
    apart = start()
    run(optimizers.Lookahead(apart[:1], lr=0.01), apart, 1, 20)
    other = start()
    run(optimizers.Lookahead(other[1:], lr=0.02, inner=inner), other, 1, 20)
    assert equal(ours, [apart[0].detach(), other[1].detach()])
