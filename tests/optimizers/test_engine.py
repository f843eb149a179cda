"""The engine: param groups, weight decay, clipping, closures, schedulers, checkpoints, mistakes."""

import copy
import subprocess
import sys
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

import optimizers
from optimizers import Engine, decays, engine, warmups
from optimizers.adam import Adam
from optimizers.engine import engine_of
from optimizers.lookahead import Lookahead
from optimizers.rule import SCHEMA, Rule, Scalars, State
from tests.optimizers.problems import difference, equal, gradients, run, start
from tests.optimizers.table import LR

# ---- weight decay ----


def one(value: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value], dtype=torch.float64))]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # SGD from 2 with gradient 3, lr .1 times a decay factor of 1 and .5, strength .2, by hand.
        ("none", 2 - 0.1 * 3 - 0.05 * 3),
        ("coupled", (2 - 0.1 * (3 + 0.4)) - 0.05 * (3 + 0.2 * 1.66)),
        ("decoupled", ((2 * 0.98 - 0.3) * 0.99) - 0.15),
        ("proximal", ((2 - 0.3) / 1.02 - 0.15) / 1.01),
    ],
)
@pytest.mark.parametrize("execution", ["eager", "flat", "compiled"])
def test_weight_decay_modes(mode: str, expected: float, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizers.execution.BACKEND", "eager")
    params = one(2.0)
    options: dict[str, Any] = {"weight_decay": 0.2, "weight_decay_mode": mode, "execution": execution}
    optimizer = optimizers.SGD(params, lr=0.1, decay=decays.Linear(), steps=2, **options)
    for _ in range(2):
        params[0].grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
    assert params[0].item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("name", "mode"), [("Adam", "coupled"), ("AdamW", "decoupled"), ("Adan", "proximal")])
def test_the_mode_of_the_authors_is_the_default(name: str, mode: str) -> None:
    assert getattr(optimizers, name)(start()).param_groups[0]["weight_decay_mode"] == mode


def test_internal_decay_is_for_rules_that_know_it() -> None:
    assert optimizers.LAMB(start()).param_groups[0]["weight_decay_mode"] == "internal"
    assert optimizers.Lookahead(start(), inner={"name": "lars"}).param_groups[0]["weight_decay_mode"] == "internal"
    with pytest.raises(ValueError, match=r"^Adam has no internal weight decay: use another weight_decay_mode$"):
        optimizers.Adam(start(), weight_decay_mode="internal")
    # Other modes remain possible: at a learning rate of 0.1 and a decay of 0.2, the weights shrink by 0.02.
    params, plain = start(), start()
    decayed = run(optimizers.LAMB(params, lr=0.1, weight_decay=0.2, weight_decay_mode="decoupled"), params, 1, 1)
    run(optimizers.LAMB(plain, lr=0.1), plain, 1, 1)
    for before, with_decay, without in zip(start(), decayed, plain, strict=True):
        # The step is in proportion to the weights, which have shrunk already.
        torch.testing.assert_close(with_decay, before * 0.98 + (without - before) * 0.98)


def test_a_mode_without_strength_is_no_decay() -> None:
    ends = []
    for mode in ("none", "coupled", "decoupled", "proximal"):
        params = start()
        ends.append(run(optimizers.Adam(params, lr=LR, weight_decay_mode=mode), params, 1, 5))
    assert all(equal(end, ends[0]) for end in ends)


# ---- groups, and parameters that come and go ----


def test_groups_with_their_own_settings_are_as_separate_optimizers() -> None:
    settings = [
        {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1},
        {"lr": 0.005, "eps": 1e-4, "weight_decay": 0.0},
    ]
    params = start()
    groups = [{"params": [p], **s} for p, s in zip(params, settings, strict=True)]
    ours = run(optimizers.AdamW(groups), params, 1, 30)
    params = start()
    groups = [{"params": [p], **s} for p, s in zip(params, settings, strict=True)]
    theirs = run(torch.optim.AdamW(groups), params, 1, 30)
    assert difference(ours, theirs) < 1e-13


def test_each_group_has_its_own_untuned_warmup() -> None:
    params = start()
    groups = [{"params": params[:1], "beta2": 0.9}, {"params": params[1:], "beta2": 0.99}]
    ours = run(optimizers.Adam(groups, lr=LR, warmup=warmups.UntunedLinear()), params, 1, 12)
    for i, beta2 in enumerate((0.9, 0.99)):
        alone = start()
        warmup = warmups.UntunedLinear()
        run(optimizers.Adam([alone[i]], lr=LR, beta2=beta2, warmup=warmup), alone, 1, 12)
        assert torch.equal(alone[i], ours[i])


def test_a_group_may_change_its_settings_between_steps() -> None:
    params, theirs = start(), start()
    ours, torchs = optimizers.Adam(params, lr=LR), torch.optim.Adam(theirs, lr=LR)
    run(ours, params, 1, 5)
    run(torchs, theirs, 1, 5)
    ours.param_groups[0].update(beta1=0.5, lr=0.03)
    torchs.param_groups[0].update(betas=(0.5, 0.999), lr=0.03)
    assert difference(run(ours, params, 6, 10), run(torchs, theirs, 6, 10)) < 1e-14


def test_a_nested_setting_may_be_changed_in_place() -> None:
    params = start()
    optimizer = optimizers.Lookahead(params, lr=LR, inner={"name": "sgd", "momentum": 0.9})
    run(optimizer, params, 1, 1)
    optimizer.param_groups[0]["inner"]["momentum"] = 0.0
    assert optimizer._rule(0).inner.momentum == 0.0


@pytest.mark.parametrize("execution", ["eager", "flat"])
def test_late_and_skipping_parameters_are_as_in_torch(execution: str) -> None:
    """A gradient of None skips a parameter, which keeps its own count of steps."""

    def follow(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[torch.Tensor]:
        for t in range(1, 31):
            present = [t > 7, t % 3 != 0]  # late; skips every third
            for p, g, here in zip(params, gradients(params, t), present, strict=True):
                p.grad = g if here else None
            if any(present):
                optimizer.step()
        return [p.detach().clone() for p in params]

    params, others = start(), start()
    ours = follow(optimizers.Adam(params, lr=LR, execution=execution), params)
    assert difference(ours, follow(torch.optim.Adam(others, lr=LR), others)) < 1e-14


def test_late_groups_start_their_own_warmup() -> None:
    params = start()
    optimizer = optimizers.SGD(params[:1], lr=1.0, warmup=warmups.Linear(4.0))
    run(optimizer, params, 1, 2)
    before = params[1].detach().clone()
    optimizer.add_param_group({"params": params[1:]})
    run(optimizer, params, 3, 3)
    torch.testing.assert_close(before - params[1].detach(), params[1].grad / 4)
    assert [group["step"] for group in optimizer.param_groups] == [3, 1]


def test_parameters_without_gradient_do_not_get_state() -> None:
    params = start()
    optimizer = optimizers.Adam(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert params[1] not in optimizer.state


# ---- clipping, closures, schedulers ----


@pytest.mark.parametrize("clip", [0.01, 1.0, 1e6, float("inf")])
def test_clipping_is_torchs(clip: float) -> None:
    params, others = start(), start()
    optimizer = optimizers.AdamW(params, lr=LR, clip_norm=clip, eps=1e-2)
    other = optimizers.AdamW(others, lr=LR, eps=1e-2)
    for t in range(1, 6):
        for p, q, g in zip(params, others, gradients(params, t), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        torch.nn.utils.clip_grad_norm_(others, clip)
        optimizer.step()
        other.step()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, others, strict=True))
    assert equal([p.detach() for p in params], [p.detach() for p in others])


def test_clipping_is_over_all_groups() -> None:
    params = start()
    optimizer = optimizers.SGD([{"params": [p]} for p in params], lr=0.0, clip_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sum(float((p.grad**2).sum()) for p in params) == pytest.approx(1, rel=1e-4)


def test_a_closure_returns_its_loss_and_may_differentiate() -> None:
    params = start()
    optimizer = optimizers.Adam(params, lr=LR)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert first.item() == pytest.approx(sum(p.detach().square().sum().item() for p in start()))
    assert second < first
    assert optimizer.step() is None


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    ],
)
def test_torch_schedulers_compose(make: Any) -> None:
    ends = []
    for kind in (optimizers.AdamW, torch.optim.AdamW):
        params = start()
        optimizer = kind(params, lr=LR, weight_decay=0.1)
        scheduler = make(optimizer)
        ends.append(run(optimizer, params, 1, 12, lambda t, s=scheduler: s.step()))
    assert difference(*ends) < 1e-14


def test_a_scheduler_can_resume() -> None:
    params = start()
    optimizer = optimizers.SGD([{"params": params, "lr": 0.5, "initial_lr": 1.0}])
    torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5, last_epoch=10)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_lr_may_be_a_tensor() -> None:
    params, others = start(), start()
    ours = run(optimizers.Adam(params, lr=torch.tensor(0.01, dtype=torch.float64)), params, 1, 9)
    assert equal(ours, run(optimizers.Adam(others, lr=0.01), others, 1, 9))


def test_numpy_numbers_are_numbers() -> None:
    optimizers.SGD(start(), lr=np.float32(0.1), weight_decay=np.float64(0.1), momentum=np.float64(0.9))


# ---- flat execution: the parameters stay the user's, the state stays per parameter ----


def test_flat_execution_leaves_parameters_and_gradients_where_they_are() -> None:
    params = [*start(), nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))]
    others = copy.deepcopy(params)
    places = [(p.data_ptr(), p.stride()) for p in params]
    optimizer = optimizers.Adam(params, lr=LR, execution="flat", weight_decay=0.1)
    other = optimizers.Adam(others, lr=LR, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        grads = [p.grad for p in params]
        optimizer.step()
        other.step()
        assert all(p.grad is g and torch.equal(g, q.grad) for p, g, q in zip(params, grads, others, strict=True))
    assert [(p.data_ptr(), p.stride()) for p in params] == places
    assert difference([p.detach() for p in params], [p.detach() for p in others]) < 1e-6
    assert [optimizer.state[p]["m"].shape for p in params] == [p.shape for p in params]


@pytest.mark.parametrize("name", ["Adam", "AMSGrad", "Lookahead", "NormalizedSGD"])
def test_flat_execution_in_pieces_is_the_same_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for piece in (sys.maxsize, 64):  # all in one vector, and: the first in 5 pieces where it is, the others joined
        monkeypatch.setattr(engine, "PIECE", piece)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((20, 15), (50,), (), (7, 9))]
        optimizer = getattr(optimizers, name)(params, lr=LR, execution="flat", weight_decay=0.1)
        for _ in range(7):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append((params, [optimizer.state[p] for p in params]))
    (ours, states), (others, other_states) = ends
    assert all(map(torch.equal, ours, others))
    for state, other in zip(states, other_states, strict=True):
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key]))


def test_flat_execution_sees_a_state_that_was_changed() -> None:
    """By hand, in place or replaced, and by going to eager execution and back."""
    ends = []
    for execution in ("eager", "flat"):
        params = start()
        optimizer = optimizers.SGD(params, lr=LR, momentum=0.9, execution=execution)
        run(optimizer, params, 1, 3)
        optimizer.state[params[0]]["b"].mul_(2)
        run(optimizer, params, 4, 6)
        optimizer.state[params[1]]["b"] = torch.ones_like(params[1])
        run(optimizer, params, 7, 9)
        optimizer.execution = "eager"
        run(optimizer, params, 10, 12)
        optimizer.execution = execution
        ends.append(run(optimizer, params, 13, 15))
    assert difference(*ends) < 1e-14


def test_flat_execution_with_several_dtypes_and_empty_parameters() -> None:
    ends = []
    for execution in ("eager", "flat"):
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16)
        params = [nn.Parameter(torch.full((n,), 0.5, dtype=d)) for n, d in enumerate(dtypes)]
        optimizer = optimizers.Lookahead(params, lr=LR, k=2, execution=execution)
        for t in range(1, 6):
            for p in params:
                p.grad = torch.full_like(p, t - 2.5)
            optimizer.step()
        with optimizer.evaluation_weights():
            ends.append([p.detach().clone() for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


@dataclass(frozen=True, config=SCHEMA)
class Normalized(Rule):
    """g / |g|, which needs a whole tensor."""

    elementwise: ClassVar[bool] = False

    def update(self, p: Tensor, g: Tensor, state: State, c: Scalars) -> Tensor:
        return g / g.norm()


def test_flat_execution_takes_a_rule_that_is_not_elementwise_tensor_by_tensor() -> None:
    ends = []
    for execution in ("eager", "flat"):
        params = start()
        ends.append(run(engine_of(Normalized)(params, lr=0.1, execution=execution), params, 1, 3))
    assert equal(*ends)
    assert Lookahead(inner=Adam()).elementwise
    assert not Lookahead(inner=Normalized()).elementwise


# ---- half precision, copies, checkpoints ----


def test_half_precision_is_rounded_once_a_step() -> None:
    params = start(torch.bfloat16)
    optimizer = optimizers.AdamW(params, lr=0.01, weight_decay=0.1)
    exact = [nn.Parameter(p.detach().float()) for p in params]
    other = optimizers.AdamW(exact, lr=0.01, weight_decay=0.1)
    for t in range(1, 6):
        for p, q, g in zip(params, exact, gradients(params, t), strict=True):
            p.grad, q.grad = g, g.float()
        optimizer.step()
        other.step()
        with torch.no_grad():
            for q in exact:
                q.copy_(q.bfloat16())
    assert equal([p.detach().float() for p in params], [q.detach() for q in exact])


def test_state_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^this is not the state_dict of Adam: a param group has no 'beta1'$"):
        optimizers.Adam(start()).load_state_dict(optimizers.SGD(start()).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizers.Adam(start()).load_state_dict(optimizers.Adam(start()[:1]).state_dict())


def test_loading_leaves_the_state_dict_alone() -> None:
    params = start()
    optimizer = optimizers.Adam(params, lr=LR)
    run(optimizer, params, 1, 3)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    others = start()
    other = optimizers.Adam(others)
    other.load_state_dict(saved)
    run(other, others, 4, 6)
    for key, state in kept["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(saved["state"][key][k])) for k, v in state.items())


def test_a_copy_accepts_no_new_options() -> None:
    with pytest.raises(ValueError, match="unknown option 'differentiable' in a param group"):
        copy.deepcopy(optimizers.Adam(start())).add_param_group({"params": start(), "differentiable": True})


def test_named_parameters_are_accepted() -> None:
    optimizer = optimizers.Adam(nn.Linear(2, 2).named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_a_gradient_scaler_composes() -> None:
    params = start(torch.float32)
    optimizer = optimizers.SGD(params, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert difference([p + 1 for p in params], start(torch.float32)) < 1e-6


def test_a_step_without_any_gradient_warns() -> None:
    optimizer = optimizers.Adam(start())
    with pytest.warns(UserWarning, match="make the optimizer again and load its state_dict"):
        assert optimizer.step() is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert optimizer.step(lambda: 7) == 7


# ---- mistakes ----


def make(name: str = "Adam", **options: Any) -> Engine:
    return getattr(optimizers, name)(start(), **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Adam", {"beta2": 1.0}, r"Adam: beta2: Input should be less than 1, got 1\.0"),
        ("Adam", {"beta2": float("nan")}, r"Adam: beta2: .*, got nan"),
        ("Adam", {"beta1": -0.1}, r"Adam: beta1: Input should be greater than or equal to 0, got -0\.1"),
        ("Adam", {"betas": (0.9, 1.5)}, r"Adam: beta2: Input should be less than 1, got 1\.5"),
        ("Adam", {"betas": (0.9, 0.99, 0.9)}, "Adam: unknown option 'beta3'; Adam has: beta1, beta2, eps"),
        ("Adam", {"eps": -1e-8}, r"Adam: eps: Input should be greater than or equal to 0, got -1e-08"),
        ("Adam", {"eps": float("inf")}, r"Adam: eps: Input should be a finite number, got inf"),
        ("Adam", {"beta2": "0.99"}, r"Adam: beta2: Input should be a valid number, got '0\.99'"),
        ("Adam", {"amsgrad": True}, "Adam: unknown option 'amsgrad'; Adam has: beta1, beta2, eps"),
        ("SGD", {"nesterov": True}, r"SGD: nesterov needs momentum > 0"),
        (
            "SGD",
            {"momentum": 0.9, "nesterov": "no"},
            r"SGD: nesterov: Input should be a valid boolean, got 'no'",
        ),
        (
            "RAdam",
            {"variant": "code"},
            r"RAdam: variant: Input should be 'paper', 'torch' or 'authors', got 'code'",
        ),
        ("Adan", {"restart_every": -1}, r"Adan: restart_every: .* greater than or equal to 0, got -1"),
        ("Adam2k", {"frozen_steps": 0}, r"Adam2k: frozen_steps: .* greater than or equal to 1, got 0"),
        ("Adam", {"lr": -0.1}, r"lr must be a finite number >= 0, got -0\.1"),
        ("Adam", {"lr": float("nan")}, r"lr must be a finite number >= 0, got nan"),
        ("Adam", {"lr": "0.1"}, r"lr must be a finite number >= 0, got '0\.1'"),
        ("Adam", {"lr": torch.tensor(-1.0)}, r"lr must be a finite number >= 0, got -1\.0"),
        ("Adam", {"weight_decay": -1}, r"weight_decay must be a finite number >= 0, got -1"),
        ("Adam", {"weight_decay": "1"}, r"weight_decay must be a finite number >= 0, got '1'"),
        (
            "Adam",
            {"weight_decay_mode": "l2"},
            r"weight_decay_mode must be one of none, coupled, decoupled, proximal, internal, got 'l2'",
        ),
        ("Adam", {"clip_norm": 0.0}, r"clip_norm must be a number > 0, got 0\.0"),
        ("Adam", {"clip_norm": -1}, r"clip_norm must be a number > 0, got -1"),
        ("Adam", {"clip_norm": "1"}, r"clip_norm must be a number > 0, got '1'"),
        ("Adam", {"execution": "fused"}, r"execution must be one of eager, flat, compiled, got 'fused'"),
        ("Adam", {"warmup": "linear"}, r"warmup must be one of optimizers\.warmups, got 'linear'"),
        ("Adam", {"decay": "linear"}, r"decay must be one of optimizers\.decays, got 'linear'"),
        ("Adam", {"decay": decays.Linear()}, r"a decay needs the budget: give steps="),
        ("Adam", {"decay": decays.Linear(), "steps": 0}, r"steps must be a whole number >= 1, got 0"),
        ("RAdam", {"warmup": warmups.Linear(10.0)}, r"RAdam has its own warmup: use it with no other"),
        ("Adam2k", {"warmup": warmups.UntunedLinear()}, r"Adam2k has its own warmup: use it with no other"),
        (
            "Lookahead",
            {"inner": {"name": "radam"}, "warmup": warmups.Linear(10.0)},
            r"Lookahead has its own warmup: use it with no other",
        ),
        (
            "SGD",
            {"warmup": warmups.UntunedLinear()},
            r"an untuned warmup takes its length from beta2, and this optimizer has none",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        make(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"beta3": 0.9},
            r"^unknown option 'beta3' in a param group; there are: lr, weight_decay, .*, beta2, eps$",
        ),
        ({"momentum": 0.9}, r"^unknown option 'momentum' in a param group"),
        ({"lr": -1.0}, r"^lr must be a finite number >= 0, got -1\.0$"),
        ({"beta2": 1.0}, r"^Adam: beta2: Input should be less than 1, got 1\.0$"),
        ({"betas": (0.9, "x")}, r"^Adam: beta2: Input should be a valid number, got 'x'$"),
        ({"weight_decay_mode": "l2"}, r"^weight_decay_mode must be one of none"),
    ],
)
def test_mistakes_in_a_group(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizers.Adam([{"params": start(), **options}])
    optimizer = make()
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": start(), **options})
    assert len(optimizer.param_groups) == 1


def test_a_group_is_not_changed_by_adding_it() -> None:
    group = {"params": start(), "betas": (0.5, 0.9)}
    optimizer = optimizers.Adam([group])
    assert set(group) == {"params", "betas"} and optimizer.param_groups[0]["beta1"] == 0.5


def test_sparse_gradients_and_complex_parameters_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(ValueError, match=r"^sparse gradients .* are not supported$"):
        optimizers.SGD([p]).step()
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"complex parameters are not supported$"):
        optimizers.SGD([p]).step()


def test_the_compiler_is_imported_only_to_compile() -> None:
    script = """if True:
        import copy, sys, torch
        from optimizers import RAdam
        p = torch.nn.Parameter(torch.ones(3))
        for execution in ("eager", "flat"):
            optimizer = RAdam([p], lr=0.1, execution=execution, clip_norm=1.0)
            optimizer.zero_grad()
            p.sum().backward()
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        print("torch._dynamo" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"], done.stdout
