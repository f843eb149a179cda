"""Iterate averaging: torch's AveragedModel over the same weights, alone and with Lookahead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optimizers
from optimizers import Engine
from optimizers.averaging import IterateAveraging
from optimizers.rule import make
from tests.optimizers.problems import difference, equal, run, start

PADAM = {"name": "padam", "beta2": 0.99}
LOOKAHEAD = {"name": "lookahead", "inner": PADAM, "k": 3, "alpha": 0.5}


def evaluated(optimizer: Engine, params: list[nn.Parameter]) -> list[Tensor]:
    with optimizer.evaluation_weights():
        return [p.detach().clone() for p in params]


def of(inner: dict[str, Any], params: list[nn.Parameter]) -> Engine:
    """The inner rule alone."""
    rule = make(**inner)
    kind = getattr(optimizers, type(rule).__name__)
    return kind(params, lr=0.05, **{k: v for k, v in inner.items() if k != "name"})


@pytest.mark.parametrize("inner", [PADAM, LOOKAHEAD], ids=["padam", "lookahead"])
@pytest.mark.parametrize(
    ("hyper", "average"),
    [
        ({"kind": "equal"}, None),
        ({"kind": "ema", "beta": 0.8}, get_ema_multi_avg_fn(0.8)),
    ],
)
@pytest.mark.parametrize(("first", "every"), [(1, 1), (7, 1), (5, 4)])
@pytest.mark.parametrize("execution", ["eager", "flat"])
def test_is_torchs_averaged_model(
    inner: dict[str, Any], hyper: dict[str, Any], average: Any, first: int, every: int, execution: str
) -> None:
    model = nn.ParameterList(start())
    theirs = AveragedModel(model, multi_avg_fn=average)
    seen: dict[int, list[Tensor]] = {}

    def follow(t: int) -> None:
        if t >= first and (t - first) % every == 0:
            theirs.update_parameters(model)
        source = theirs.module if t >= first else model
        seen[t] = [p.detach().clone() for p in source.parameters()]

    fast = run(of(inner, list(model)), list(model), 1, 30, follow)

    params = start()
    options = {"inner": inner, "start": first, "every": every, **hyper}
    optimizer = optimizers.IterateAveraging(params, lr=0.05, execution=execution, **options)
    averages: dict[int, list[Tensor]] = {}
    end = run(optimizer, params, 1, 30, lambda t: averages.update({t: evaluated(optimizer, params)}))
    assert difference(end, fast) < 1e-14
    assert all(difference(averages[t], seen[t]) < 1e-14 for t in seen)


def test_evaluation_leaves_training_alone() -> None:
    params = start(torch.bfloat16)
    optimizer = optimizers.IterateAveraging(params, lr=0.05)
    fast = run(optimizer, params, 1, 10)
    assert not equal(evaluated(optimizer, params), fast)
    assert equal([p.detach() for p in params], fast)
    assert all(optimizer.state[p]["average"].dtype == torch.float32 for p in params)


def test_within_lookahead_evaluation_is_lookaheads() -> None:
    params = start()
    optimizer = optimizers.Lookahead(params, lr=0.05, inner={"name": "iterateaveraging"}, k=5)
    run(optimizer, params, 1, 7)
    assert equal(evaluated(optimizer, params), [optimizer.state[p]["slow"] for p in params])


def test_takes_the_facts_of_its_inner_rule() -> None:
    assert IterateAveraging(inner=make("radam")).own_warmup
    assert IterateAveraging(inner=make("normalizedsgd")).joint and not IterateAveraging(inner=make("lamb")).elementwise
    assert make("iterateaveraging", inner={"name": "lamb"}).weight_decay_mode == "internal"


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"kind": "mean"}, r"^IterateAveraging: kind: Input should be 'equal' or 'ema', got 'mean'$"),
        ({"start": 0}, r"^IterateAveraging: start: Input should be greater than or equal to 1, got 0$"),
        ({"every": 1.5}, r"^IterateAveraging: every: Input should be a valid integer, got 1\.5$"),
        ({"inner": {"name": "iterateaveraging"}}, "cannot wrap itself"),
    ],
)
def test_bad_settings(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizers.IterateAveraging(start(), **hyper)
