"""What single rules promise beyond their reference: Adam2k, Adan, AdaMax, and the listing."""

import runpy
import sys

import pytest
import torch

import optimizers
from optimizers.__main__ import COLUMNS, table
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


def test_rules_state_their_facts() -> None:
    for name, kind in available().items():
        assert kind.paper and kind.family, name
        state = kind().init(torch.zeros(2))
        assert set(kind().momentum_state) <= set(state) or name == "sgd"


def test_the_listing_has_a_line_a_rule() -> None:
    lines = table().splitlines()
    assert all(column in lines[0] for column in COLUMNS)
    cells = {line.split()[0]: line for line in lines[2:]}
    assert list(cells) == list(available())
    bytes_of = {name: line.split()[2] for name, line in cells.items()}
    assert bytes_of["adam"] == "8" and bytes_of["adan"] == "16" and bytes_of["lookahead"] == "12"
    assert bytes_of["sgd"] == "0"
    own = {name for name, line in cells.items() if line.split()[3] == "yes"}
    assert own == {"radam", "adam2k"}


def test_the_listing_runs_as_a_module(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    # As python -m optimizers, but for the seconds that a new process needs to import torch.
    monkeypatch.delitem(sys.modules, "optimizers.__main__")
    runpy.run_module("optimizers", run_name="__main__")
    assert capsys.readouterr().out.strip() == table().strip()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^no optimizer is called 'adamm'; there are: adam, adam2k, "):
        make("adamm")
