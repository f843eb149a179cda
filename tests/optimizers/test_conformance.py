"""Every row of the table: it matches its reference, converges, and survives what users do to an optimizer."""

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import Engine
from optimizers.rule import available, describe, make
from tests.optimizers.problems import (
    descend,
    difference,
    equal,
    gradients,
    loss_of,
    quadratic,
    rosenbrock,
    run,
    start,
    step,
)
from tests.optimizers.table import ROWS, STEPS, Row
from tests.pretend_gpu import GPU, pretend_gpu

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
# Adam2k moves late, and Adan restarts at step 31.
HALF_WAY = 33
END = 45


def state_tensors(optimizer: Engine) -> list[Tensor]:
    return [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]


def test_every_rule_has_a_row() -> None:
    missing = sorted(set(available()) - {row.rule for row in ROWS})
    assert not missing, f"no row in tests/optimizers/table.py for: {', '.join(missing)}"


def test_every_rule_is_importable_as_an_optimizer() -> None:
    for rule in available().values():
        kind = getattr(optimizers, rule.__name__)
        assert issubclass(kind, torch.optim.Optimizer) and kind.rule_type is rule
        assert (rule.__doc__ or "") in (kind.__doc__ or "")


@every_row
def test_every_rule_states_its_published_learning_rate(row: Row) -> None:
    assert 0 < make(row.rule, **row.hyper).published_lr <= 10


@every_row
@pytest.mark.parametrize("execution", ["eager", "flat"])
def test_matches_its_reference(row: Row, execution: str) -> None:
    params, seen = start(), {}
    optimizer = row.make(params, execution=execution)

    def look(t: int) -> None:
        # Where the next gradient is taken is not where a rule that predicts is.
        with optimizer.evaluation_weights() if make(row.rule, **row.hyper).predicts else nullcontext():
            seen[t] = [p.detach().clone() for p in params]

    run(optimizer, params, 1, STEPS, look)
    expected = row.reference()
    assert max(expected) == STEPS
    for t, reference in expected.items():
        for ours, theirs in zip(seen[t], reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, t=t: f"step {t}: {m}")


@pytest.mark.parametrize("row", [row for row in ROWS if row.also], ids=str)
def test_equals_other_packages(row: Row) -> None:
    pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    params, seen = start(), {}
    run(row.make(params), params, 1, STEPS, lambda t: seen.update({t: [p.detach().clone() for p in params]}))
    for t, reference in row.also().items():
        for ours, theirs in zip(seen[t], reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, t=t: f"step {t}: {m}")


def test_where_other_packages_differ() -> None:
    """As the docstrings of AdaPNM, LAMB and LARS say."""
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    theirs = {
        "AdaPNM": package.AdaPNM(p := start(), lr=0.01),
        "LAMB": package.Lamb(q := start(), lr=0.01),
        "LARS": package.LARS(r := start(), lr=0.01),
    }
    for (name, other), params in zip(theirs.items(), (p, q, r), strict=True):
        mine = start()
        gaps = [difference(run(getattr(optimizers, name)(mine, lr=0.01), mine, 1, 1), run(other, params, 1, 1))]
        assert gaps[0] > 1e-9, name


@every_row
def test_converges_on_a_quadratic(row: Row) -> None:
    assert descend(row.descent(row.quadratic, 400), quadratic, (3.0, -2.0), 400) < 1e-3


@every_row
def test_descends_rosenbrock(row: Row) -> None:
    # From a loss of 24.2, round the bend of the valley.
    assert descend(row.descent(row.rosenbrock, 1500), rosenbrock, (-1.2, 1.0), 1500) < 1.2


@every_row
def test_a_rule_is_a_value(row: Row) -> None:
    rule = make(row.rule, **row.hyper)
    again = make(**describe(rule))
    assert again == rule and hash(again) == hash(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule


@every_row
@pytest.mark.parametrize("execution", ["eager", "flat"])
def test_on_a_gpu_it_mixes_no_devices_and_waits_for_nothing(row: Row, execution: str) -> None:
    params = start(torch.float32)
    here = row.make(params, execution=execution, clip_norm=2.0)
    with pretend_gpu() as waits:
        copies = [nn.Parameter(p.detach().to(GPU)) for p in params]
        there = row.make(copies, execution=execution, clip_norm=2.0)
        for t in range(1, HALF_WAY + 1):
            loss = loss_of(copies)
            for p, g in zip(copies, gradients(copies, t), strict=True):
                p.grad = g
            waits.clear()
            step(there, loss)
            assert t == 1 or waits == [], f"step {t}"  # constants of a rule may be sent there once
        run(here, params, 1, HALF_WAY)
        with here.evaluation_weights(), there.evaluation_weights():
            assert equal([p.cpu() for p in copies], params)
    assert all(tensor.device == GPU for tensor in state_tensors(there))


@every_row
@pytest.mark.parametrize("execution", ["eager", "flat"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_continues_from_its_state_dict_to_the_bit(row: Row, dtype: torch.dtype, execution: str) -> None:
    params = start(dtype)
    optimizer = row.make(params, execution=execution)
    halfway = run(optimizer, params, 1, HALF_WAY)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    through = run(optimizer, params, HALF_WAY + 1, END)

    file.seek(0)
    again = [nn.Parameter(p) for p in halfway]
    loaded = row.make(again, lr=123.0, execution=execution)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert [v.dtype for v in state_tensors(loaded)] == [v.dtype for v in state_tensors(optimizer)]
    assert equal(run(loaded, again, HALF_WAY + 1, END), through)
    assert equal(state_tensors(loaded), state_tensors(optimizer))


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parameters_keep_their_dtype(row: Row, dtype: torch.dtype) -> None:
    params = start(dtype)
    optimizer = row.make(params)
    assert all(p.dtype == dtype and bool(p.isfinite().all()) for p in run(optimizer, params, 1, HALF_WAY))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    held = [item for s in optimizer.state.values() for item in s.items()]
    assert all(value.dtype == kept for name, value in held if name not in ("step", "slow"))


@every_row
@pytest.mark.parametrize(
    ("how", "execution"),
    [("deepcopy", "eager"), ("pickle", "eager"), ("deepcopy at the start", "eager"), ("deepcopy", "flat")],
)
def test_a_copy_continues_identically(row: Row, how: str, execution: str) -> None:
    params = start()
    own_warmup = make(row.rule, **row.hyper).own_warmup
    warmup = None if own_warmup else optimizers.warmups.Linear(40)
    options = {"decay": optimizers.decays.Linear(), "steps": 60, "clip_norm": 2.0, "execution": execution}
    optimizer = row.make(params, warmup=warmup, **options)
    done = 0 if "start" in how else HALF_WAY
    run(optimizer, params, 1, done)
    both = (params, optimizer)
    again, twin = pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
    assert type(twin) is type(optimizer)
    through = run(optimizer, params, done + 1, END)
    assert equal(run(twin, again, done + 1, END), through)


@every_row
def test_gradient_buffers_may_be_reused(row: Row) -> None:
    # A rule that kept a reference to p.grad would see the next gradient in it.
    fresh = start()
    expected = run(row.make(fresh), fresh, 1, END)
    params = start()
    optimizer = row.make(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    buffers = [p.grad for p in params]
    for t in range(1, END + 1):
        optimizer.zero_grad(set_to_none=False)
        for p, buffer, g in zip(params, buffers, gradients(params, t), strict=True):
            assert p.grad is buffer
            buffer.add_(g)
        step(optimizer, loss_of(params))
    assert equal([p.detach() for p in params], expected)


@every_row
def test_update_leaves_parameter_and_gradient_alone(row: Row) -> None:
    rule = make(row.rule, **row.hyper)
    table = rule.coefficients(torch.arange(1, 4, dtype=torch.float64))
    for p in start():
        state, before = rule.init(p), p.detach().clone()
        shapes = {k: v.shape for k, v in state.items()}
        held = dict(state)
        for t in range(3):
            g = torch.randn_like(p)
            kept = g.clone()
            c = {k: float(v[t]) for k, v in table.items()} | {"rate": 0.1, "loss": torch.tensor(2.0)}
            c |= rule.gather([p.detach()], [g], [state], c)
            direction = rule.update(p.detach(), g, state, c)
            assert direction.shape == p.shape
            assert torch.equal(p, before) and torch.equal(g, kept)
        assert {k: v.shape for k, v in state.items()} == shapes
        assert all(state[k] is held[k] for k in held), "state is advanced in place"


class Small(nn.Module):
    """A convolution, a norm and a linear layer, in float64.

    No bias before the norm: its gradient is rounding error, which Adam would blow up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, bias=False, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.out = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3)))


def train(row: Row, between: Any = lambda model, optimizer, t: optimizer.zero_grad()) -> Small:
    torch.manual_seed(1)
    model = Small()
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64)
    optimizer = row.make(model.parameters())
    for t in range(1, 9):
        between(model, optimizer, t)
        loss = model(x).square().sum()
        loss.backward()
        step(optimizer, loss)
    return model


@every_row
def test_what_a_model_goes_through_does_no_harm(row: Row) -> None:
    def shaken(model: Small, optimizer: Engine, t: int) -> None:
        if t == 3:
            model.to(memory_format=torch.channels_last)
        if t == 6:
            model.to(memory_format=torch.contiguous_format)
        if t % 2:
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=False)

    calm, other = train(row), train(row, shaken)
    for a, b in zip(calm.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_row
def test_replaced_parameters_are_noticed_and_a_new_engine_continues(row: Row) -> None:
    torch.manual_seed(1)
    model = Small().eval()
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64)

    def steps(model: Small, optimizer: Engine) -> list[Tensor]:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            step(optimizer, loss)
        return [p.detach().clone() for p in model.parameters()]

    optimizer = row.make(model.parameters())
    steps(model, optimizer)
    other, old = copy.deepcopy((model, optimizer))
    expected = steps(model, optimizer)

    other.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    old.zero_grad()
    other(x).square().sum().backward()
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient: nothing is updated"):
        old.step()
    new = row.make(other.parameters())
    new.load_state_dict(old.state_dict())
    assert equal(steps(other, new), expected)
