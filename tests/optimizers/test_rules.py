"""What single rules promise beyond their reference: Adam2k, Adan, AdaMax, and the listing."""

import runpy
import sys

import pytest
import torch

import optimizers
from optimizers.__main__ import COLUMNS, row, table
from optimizers.rule import available, make
from tests.optimizers.problems import difference, equal, run, start


def test_adam2k_stands_still_for_2000_steps_and_starts_with_a_hidden_ramp() -> None:
    rule = optimizers.Adam2k.rule_type()
    c = rule.coefficients(torch.tensor([1.0, 2000.0, 2001.0, 5000.0], dtype=torch.float64))
    assert c["lr"].tolist() == [0, 0, 1, 1]
    assert c["gain"].tolist() == pytest.approx([0, 0, 0.1, 0.1])
    assert c["mean"][2] == pytest.approx(1)

    params = start()
    optimizer = optimizers.Adam2k(params, lr=0.01, frozen_steps=20, weight_decay=0.5)
    assert equal(run(optimizer, params, 1, 20), [p.detach() for p in start()])
    assert all(not s["m"].any() and bool((s["v"] > 0).all()) for s in optimizer.state.values())

    # Constant gradients: after j released steps m is (1 - beta1^j) g, and the step is nearly that times lr.
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optimizers.Adam2k([p], lr=1.0, frozen_steps=200)
    sizes = []
    for _ in range(203):
        before = p.item()
        p.grad = torch.ones_like(p)
        optimizer.step()
        sizes.append(before - p.item())
    assert sizes[200:] == pytest.approx([1 - 0.9**j for j in (1, 2, 3)], rel=1e-6)


def test_adan_restart_forgets_everything() -> None:
    params = start()
    whole = run(optimizers.Adan(params, lr=0.01, restart_every=10), params, 1, 30)
    params = start()
    for first in (1, 11, 21):
        pieces = run(optimizers.Adan(params, lr=0.01), params, first, first + 9)
    assert difference(whole, pieces) < 1e-15


def test_adan_keeps_the_previous_gradient_as_its_own_tensor() -> None:
    params = start()
    optimizer = optimizers.Adan(params, lr=0.01)
    run(optimizer, params, 1, 3)
    for p in params:
        previous = optimizer.state[p]["previous"]
        assert torch.equal(previous, p.grad)
        assert previous.untyped_storage().data_ptr() != p.grad.untyped_storage().data_ptr()


def test_adan_takes_untuned_warmups_from_its_third_beta() -> None:
    assert make("adan", beta3=0.995).second_moment_beta == 0.995


def test_adamax_survives_a_zero_gradient() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizers.AdaMax([p], lr=0.1)
    p.grad = torch.tensor([0.0, 1.0, -2.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.9, 1.1]))


def moved(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], g: float) -> list[torch.Tensor]:
    """How far one step with the gradient g everywhere moves each tensor."""
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.full_like(p, g)
    optimizer.step()
    return [b - p.detach() for p, b in zip(params, before, strict=True)]


def test_centered_rmsprop_survives_a_constant_gradient() -> None:
    # The variance is 0 then, and a little less by rounding, of which torch takes the root.
    p = torch.nn.Parameter(torch.zeros(100))
    optimizer = optimizers.RMSProp([p], lr=1e-9, centered=True, beta2=0.5)
    g = torch.linspace(0.1, 3, 100)
    for _ in range(100):
        p.grad = g.clone()
        optimizer.step()
    assert bool(p.isfinite().all())


def test_diffgrad_as_published_is_adam_at_half_the_learning_rate() -> None:
    ours, theirs = start(), start()
    published = optimizers.DiffGrad(ours, lr=0.02, variant="published", eps=0.0)
    adam = optimizers.Adam(theirs, lr=0.01, eps=0.0)
    # The first step differs: there is no previous gradient yet.
    assert difference(moved(published, ours, 2.0), moved(adam, theirs, 2.0)) > 0.005
    assert difference(moved(published, ours, 1.0), moved(adam, theirs, 1.0)) < 1e-15


def test_acprop_rectified_has_its_own_warmup() -> None:
    assert make("acprop", rectify=True).own_warmup and not make("acprop").own_warmup
    with pytest.raises(ValueError, match="ACProp has its own warmup"):
        optimizers.ACProp(start(), rectify=True, warmup=optimizers.warmups.Linear(10))


def test_pnm_without_its_negative_part_is_momentum_of_every_second_gradient() -> None:
    params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    optimizer = optimizers.PNM(params, lr=1.0, beta1=0.5, beta0=0.0)
    # With beta1^2 = 1/4: 3/4 of g_1, 3/4 of g_2, then 3/4 of g_3 and 1/4 * 3/4 of g_1.
    steps = [moved(optimizer, params, g)[0].item() for g in (1.0, 10.0, 100.0)]
    assert steps == pytest.approx([0.75, 7.5, 75.1875])


@pytest.mark.parametrize("execution", ["eager", "flat"])
def test_normalized_sgd_takes_its_norm_over_a_group(execution: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 1, 5)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    optimizer = optimizers.NormalizedSGD(groups, lr=0.1, execution=execution)
    x, y, z = moved(optimizer, params, 7.0)
    assert torch.cat([x, y]).norm().item() == pytest.approx(0.1)
    assert z.norm().item() == pytest.approx(0.2)


def test_normalized_sgd_stays_where_there_is_no_gradient() -> None:
    params = start()
    assert all(not d.any() for d in moved(optimizers.NormalizedSGD(params), params, 0.0))


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_a_tensor_of_zeros_gets_away_from_zero(name: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(3))]
    step = moved(getattr(optimizers, name)(params, lr=0.1, weight_decay=0.1), params, 1.0)[0]
    assert step.tolist() == pytest.approx([0.1] * 3, rel=1e-5)


def test_lamb_steps_have_the_length_of_the_weights() -> None:
    params = start()
    lengths = [p.detach().norm().item() for p in params]
    steps = moved(optimizers.LAMB(params, lr=0.01, weight_decay=0.3), params, 1.0)
    assert [d.norm().item() for d in steps] == pytest.approx([0.01 * n for n in lengths])


def test_adafactor_keeps_rows_and_columns() -> None:
    rule = make("adafactor")
    shapes = {
        n: {k: tuple(v.shape) for k, v in rule.init(torch.ones(n)).items()} for n in [(), (7,), (4, 3), (5, 4, 3)]
    }
    assert shapes[()] == {"v": ()} and shapes[7,] == {"v": (7,)}
    assert shapes[4, 3] == {"row": (4, 1), "column": (1, 3)}
    assert shapes[5, 4, 3] == {"row": (5, 4, 1), "column": (5, 1, 3)}


def test_adafactor_survives_gradients_of_zero_in_float32() -> None:
    params = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = optimizers.Adafactor(params, lr=1.0)
    assert all(not d.any() for d in moved(optimizer, params, 0.0))
    # lr times RMS(theta) times the largest rate, the update's own RMS being 1.
    assert [d.norm().item() / d.numel() ** 0.5 for d in moved(optimizer, params, 5.0)] == pytest.approx([0.01] * 2)


def test_adafactor_relative_steps_are_also_those_of_its_decay() -> None:
    table = make("adafactor").coefficients(torch.tensor([1.0, 1e4, 4e4], dtype=torch.float64))
    assert table["lr"].tolist() == pytest.approx([0.01, 0.01, 0.005])
    assert table["keep"][0] == 0


def test_rules_state_their_facts() -> None:
    for name, kind in available().items():
        assert kind.paper and kind.family, name
        state = kind().init(torch.zeros(2))
        assert set(kind().momentum_state) <= set(state) or name in ("sgd", "rmsprop")


def test_the_listing_has_a_line_a_rule() -> None:
    lines = table().splitlines()
    assert all(column in lines[0] for column in COLUMNS)
    assert max(map(len, lines)) <= 150
    assert [line.split()[0] for line in lines[2:]] == list(available())


def test_the_listing_says_what_a_rule_needs() -> None:
    cells = {name: dict(zip(COLUMNS, row(name, rule()), strict=True)) for name, rule in available().items()}
    by_bytes = {name: cell["bytes"] for name, cell in cells.items()}
    assert by_bytes["adam"] == "8" and by_bytes["adan"] == "16" and by_bytes["lookahead"] == "12"
    assert by_bytes["sgd"] == "0"
    assert cells["adam"]["needs"] == "-" and cells["koalam"]["needs"] == "loss shape ahead"
    assert cells["normalizedsgd"]["needs"] == "all" and cells["lamb"]["needs"] == "shape"
    assert {name for name, cell in cells.items() if "warmup" in cell["needs"]} == {"radam", "adam2k"}
    assert cells["nadam"]["lr"] == "0.002" and cells["adafactor"]["lr"] == "1"


def test_the_listing_runs_as_a_module(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    # As python -m optimizers, but for the seconds that a new process needs to import torch.
    monkeypatch.delitem(sys.modules, "optimizers.__main__")
    runpy.run_module("optimizers", run_name="__main__")
    assert capsys.readouterr().out.startswith(table())


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^no optimizer is called 'adamm'; there are: .*, adam, adam2k, "):
        make("adamm")


@pytest.mark.parametrize("name", ["KoalaV", "KoalaM"])
def test_koala_asks_for_the_loss_and_takes_it_either_way(name: str) -> None:
    kind = getattr(optimizers, name)
    params = start()
    optimizer = kind(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=f"{name} needs the loss: call step"):
        optimizer.step()
    assert equal([p.detach() for p in params], [p.detach() for p in start()])
    wrapped = optimizers.Lookahead(params, inner={"name": name.lower()})
    with pytest.raises(ValueError, match="Lookahead needs the loss"):
        wrapped.step()

    def closure() -> torch.Tensor:
        loss = sum((p * 2).sum() for p in others)
        for p in others:
            p.grad = torch.full_like(p, 2.0)
        return loss

    others = start()
    other = kind(others)
    assert other.step(closure).requires_grad
    params = start()
    optimizer = kind(params)
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step(loss=sum((p * 2).sum().item() for p in params))
    assert equal([p.detach() for p in others], [p.detach() for p in params])


def test_koala_takes_the_losses_of_the_examples() -> None:
    # The noise is their mean square; the innovation their mean.
    params, losses = start(), torch.tensor([1.0, 3.0], dtype=torch.float64)
    optimizer = optimizers.KoalaV(params, lr=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(loss=losses)
    noise = 0.9 + 0.1 * 5
    for p, before in zip(params, start(), strict=True):
        moved = 2.0 / (2 * p.numel() + noise) * 2
        torch.testing.assert_close(p.detach(), before.detach() - moved)
        assert optimizer.state[p]["P"].item() == pytest.approx(2 - 4 * 12 / (2 * 12 + noise))


@pytest.mark.parametrize("name", ["KoalaV", "KoalaM"])
def test_koala_leaves_tensors_without_a_gradient_to_speak_of(name: str) -> None:
    params = start()
    optimizer = getattr(optimizers, name)(params, lr=1.0)
    for scale in (1e-11, 0.0):
        for p in params:
            p.grad = torch.full_like(p, scale)
        optimizer.step(loss=2.0)
        assert equal([p.detach() for p in params], [p.detach() for p in start()])
    assert all(s["R"] > 1 for s in optimizer.state.values())


def test_koala_m_is_evaluated_at_the_weights_and_not_where_it_looks() -> None:
    params = start()
    optimizer = optimizers.KoalaM(params, lr=0.1)
    ahead = run(optimizer, params, 1, 3)
    with optimizer.evaluation_weights():
        here = [p.detach().clone() for p in params]
    velocities = [optimizer.state[p]["v"].clone() for p in params]
    assert all(v.any() for v in velocities)
    assert difference([a - h for a, h in zip(ahead, here, strict=True)], velocities) < 1e-15
    # The next step without a gradient: theta arrives where it was headed, and v decays.
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    with optimizer.evaluation_weights():
        assert difference([p.detach() for p in params], ahead) < 1e-15
    assert difference([optimizer.state[p]["v"] for p in params], [0.9 * v for v in velocities]) < 1e-15


def test_koala_stays_finite_in_float32_where_gradients_are_huge() -> None:
    # P - P^2 ||h||^2 / S would be 0 or below by rounding.
    for name in ("KoalaV", "KoalaM"):
        params = start(torch.float32)
        optimizer = getattr(optimizers, name)(params, lr=0.1)
        for scale in (1e12, 1e-3, 1e6, 1.0):
            for p in params:
                p.grad = torch.full_like(p, scale)
            optimizer.step(loss=3.0)
            variances = [v for s in optimizer.state.values() for k, v in s.items() if k in ("P", "P_00", "P_11")]
            assert all(bool(p.isfinite().all()) for p in params) and all(float(v) > 0 for v in variances)
