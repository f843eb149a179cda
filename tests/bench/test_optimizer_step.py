"""The part on the optimizer's step: what its table has. Never a time."""

import pandas as pd
import pytest

from bench import optimizer_step
from optimizers import execution
from optimizers.rule import available, make
from runners.config import Place


@pytest.mark.parametrize(
    ("name", "hyper", "moved", "read", "changed"),
    [
        # By hand, in numbers of 4 bytes: g is read, p and the state are read and written.
        ("sgd", {}, 3, 1, 1),
        ("sgd", {"momentum": 0.9}, 5, 1, 2),
        ("adam", {}, 7, 1, 3),
        ("adan", {}, 11, 1, 5),
        # Each fifth step reads and writes the slow weights, too.
        ("lookahead", {}, 7 + 2 / 5, 1, 3),
    ],
)
def test_traffic_is_what_a_rule_has_to_move(name: str, hyper: dict, moved: float, read: int, changed: int) -> None:
    found = optimizer_step.traffic(make(name, **hyper))
    assert found[0] / 4 == pytest.approx(moved)
    assert found[1:3] == (read, changed)


def test_sizes_are_those_of_the_models() -> None:
    counts = {name: sum(p.numel() for p in make().parameters()) for name, make in optimizer_step.SIZES.items()}
    assert counts["0.27 M"] == 269_722
    assert counts["4 M"] == pytest.approx(4e6, rel=0.05)
    assert counts["24 M"] == pytest.approx(24.2e6, rel=0.01)


def test_a_quick_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "BACKEND", "aot_eager")
    monkeypatch.setattr(optimizer_step, "bare", lambda read, written, device: lambda *vectors: None)
    execution._over_vectors.cache_clear()
    table = optimizer_step.measure(Place(device="cpu"), quick=True)
    execution._over_vectors.cache_clear()
    ours = {"eager", "flat", "compiled", "limit"}
    assert set(table[table.rule == "adam"].candidate) == ours | {"torch fused", "torch foreach", "torch loop"}
    assert set(table[table.rule == "lamb"].candidate) == {"eager"}
    assert set(table.parameters) == {269_722}
    assert (table.ms > 0).all() and (table.to_fused_adam > 0).all()
    assert (table[table.candidate == "torch fused"].to_fused_adam == 1).all()
    assert table[table.rule == "adam"].megabytes.tolist() == pytest.approx([7 * 4 * 0.269722] * 7)
    text = optimizer_step.summary(
        pd.concat([table, pd.DataFrame([{"candidate": "first step, cached", "first_step_s": 2}])])
    )
    assert "### 0.27 M" in text and "| adam |" in text and "cached 2.0 s" in text


def test_the_names_are_rules() -> None:
    assert {*optimizer_step.HYPER, *optimizer_step.TORCH, *optimizer_step.PACKAGE} <= set(available())
