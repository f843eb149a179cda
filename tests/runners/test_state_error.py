"""What 8 bits cost: the error of each code on given moments, and the command that measures it."""

import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from optimizers.eight_bit import codebook
from runners import state_error


def moments() -> list[tuple[Tensor, Tensor]]:
    """Moments of Adam as training leaves them: scales that differ by rows, and outliers."""
    draw = torch.Generator().manual_seed(3)
    out = []
    for _ in range(2):
        scale = torch.exp(torch.randn(128, 1, generator=draw))
        g = scale * torch.randn(20, 128, 64, generator=draw)
        out.append((g.mean(0) * 1e-3, g.square().mean(0) * 1e-6))
    return out


def test_error_falls_from_linear_to_dynamic_to_blocks() -> None:
    table = state_error.errors(moments(), 300, 0.9, 0.98, 1e-8)
    assert list(table.code) == list(state_error.CODES)
    for name in ("m", "v", "update"):
        for coarse, fine in itertools.pairwise(table[f"{name}_mean"]):
            assert fine < coarse, name
    update = table.set_index("code").update_mean
    assert update["linear, whole tensor"] > 1 and update["dynamic, blocks of 2048"] < 0.02


def test_errors_are_those_of_the_definition() -> None:
    m, v = torch.tensor([0.5, -1.0, 0.25, 0.003]), torch.tensor([1.0, 0.5, 0.25, 0.002])
    row = state_error.errors([(m, v)], 2, 0.9, 0.99, 1e-8).set_index("code").loc["dynamic, whole tensor"]

    def nearest(x: float, signed: bool) -> float:
        return min(codebook(signed).tolist(), key=lambda entry: abs(entry - x))

    pairs = list(zip(m.tolist(), v.tolist(), strict=True))
    coded = [(nearest(a, True), nearest(b, False)) for a, b in pairs]
    off = [abs(x - a) for (a, _), (x, _) in zip(pairs, coded, strict=True)]
    assert row.m_mean == pytest.approx(sum(off) / sum(abs(a) for a, _ in pairs), rel=1e-5)

    def update(a: float, b: float) -> float:
        return a / (1 - 0.9**2) / (math.sqrt(b / (1 - 0.99**2)) + 1e-8)

    moved = [abs(update(*new) - update(*old)) for new, old in zip(coded, pairs, strict=True)]
    assert row.update_mean == pytest.approx(sum(moved) / 4, rel=1e-5)
    assert row.update_q999 == pytest.approx(sorted(moved)[int(0.999 * 4)], rel=1e-5)


def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_error.main(["--steps", "2", "--seeds", "1", "--results", str(tmp_path)])
    table = pd.read_csv(tmp_path / "eight_bit_quick" / "state_error.csv")
    assert len(table) == len(state_error.CODES) and "linear, whole tensor" in capsys.readouterr().out
    assert table.bytes_8bit.iloc[0] < 0.3 * table.bytes_32bit.iloc[0] and (table.steps == 2).all()
