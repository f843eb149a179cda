"""Words as numbers, and how a text is read."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks import text
from tasks.text import END, UNKNOWN, nll, uniform_loss, unrolled, unrolls

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Path]]:
    monkeypatch.setenv("UNTUNED_CACHE", str(tmp_path / "cache"))
    lines = {"a": " a b a \n", "b": "\n c a b\n", "v": "b new <unk>\n"}
    for name, line in lines.items():
        (tmp_path / name).write_text(line)
    return {"train": [tmp_path / "a", tmp_path / "b"], "validation": [tmp_path / "v"]}


def test_words_are_numbered_by_frequency(files: dict[str, list[Path]]) -> None:
    loaded = text.load(files, CPU, min_count=2)
    assert loaded.words == [END, "a", "b", UNKNOWN]
    assert loaded.counts.tolist() == [3, 3, 2, 1]
    assert loaded.splits["train"].tolist() == [1, 2, 1, 0, 0, 3, 1, 2, 0]
    assert loaded.splits["validation"].tolist() == [2, 3, 3, 0]
    again, other = text.load(files, CPU, min_count=2), text.load(files, CPU)
    assert again.digest == loaded.digest != other.digest and again.words == loaded.words
    assert sorted(other.words) == sorted([END, "a", "b", "c", UNKNOWN])
    assert other.counts.tolist() == [3, 3, 2, 1, 0]


def test_variable_lengths_are_those_of_the_protocol() -> None:
    sizes = torch.tensor([n for epoch in range(40) for n in unrolls(10_000, 70, True, 0, epoch)[:-1]]).double()
    halves = sizes < 52.5  # both bells are three and a half deviations away
    share = halves.double().mean().item()
    assert abs(share - 0.05) < 4 * math.sqrt(0.05 * 0.95 / len(sizes))
    for part, mean in ((sizes[~halves], 69.5), (sizes[halves], 34.5)):  # whole numbers below
        assert abs(part.mean().item() - mean) < 4 * 5 / math.sqrt(len(part))
    assert sizes[~halves].std().item() == pytest.approx(5, rel=0.05)
    assert min(unrolls(10_000, 6, True, 0, 0)[:-1]) == 5


@pytest.mark.parametrize("length", [1000, 1001, 1002])
def test_variable_lengths_cover_a_stream(length: int) -> None:
    for epoch in range(30):
        sizes = unrolls(length, 20, True, 1, epoch)
        assert length - sum(sizes) in (0, 1) and min(sizes) >= 2
    assert unrolls(length, 20, True, 1, 2) != unrolls(length, 20, True, 1, 3)
    assert unrolls(length, 20, False, 1, 2) == [20] * 50


@pytest.mark.parametrize("variable", [True, False])
def test_an_epoch_reads_the_text_once(variable: bool) -> None:
    numbers = torch.arange(1003, dtype=torch.int32)
    count = len(unrolls(1003 // 4 - 1, 10, variable, 5, 0))
    batches = list(itertools.islice(unrolled(numbers, 4, 10, 5, 0, variable), count + 1))
    assert [bool(batch.reset) for batch in batches] == [True] + [False] * (count - 1) + [True]
    epoch = batches[:-1]
    for batch in epoch:
        assert torch.equal(batch.targets, (batch.tokens + 1) % 1003) and batch.tokens.dtype == torch.int64
    for before, after in itertools.pairwise(epoch):
        assert torch.equal(before.targets[-1], after.tokens[0])
    predicted = torch.cat([batch.targets for batch in epoch]).flatten()
    assert len(predicted) == len(predicted.unique())
    assert 1003 - len(predicted) <= (4 + 4 * 2 if variable else 4 * 10 + 4 + 3)


@pytest.mark.parametrize("start", [1, 20, 73])
def test_reading_goes_on_anywhere(start: int) -> None:
    numbers = torch.arange(1003)
    whole = list(itertools.islice(unrolled(numbers, 4, 10, 5, 0, True), start + 30))
    rest = itertools.islice(unrolled(numbers, 4, 10, 5, start, True), 30)
    for a, b in zip(whole[start:], rest, strict=True):
        assert all(map(torch.equal, a, b))


def test_streams_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size=10 streams of bptt=50 do not fit 100 training tokens"):
        next(unrolled(torch.arange(100), 10, 50, 0, 0))


def test_nll_of_both_outputs() -> None:
    features, targets = torch.randn(3, 4, 16), torch.randint(30, (3, 4))
    targets[0, 1] = targets[2, 2] = -100
    known = targets >= 0
    linear, adaptive = nn.Linear(16, 30), nn.AdaptiveLogSoftmaxWithLoss(16, 30, [5, 12])
    expected = F.cross_entropy(linear(features[known]), targets[known], reduction="sum")
    torch.testing.assert_close(nll(linear, features, targets), expected)
    expected = F.nll_loss(adaptive.log_prob(features[known]), targets[known], reduction="sum")
    torch.testing.assert_close(nll(adaptive, features, targets), expected)


def test_the_uniform_loss_of_an_adaptive_softmax_is_that_of_zero_weights() -> None:
    counts = torch.tensor([20, 9, 5, 4, 2, 1, 1])
    adaptive = nn.AdaptiveLogSoftmaxWithLoss(16, 7, [2, 4])
    for weight in adaptive.parameters():
        nn.init.zeros_(weight)
    targets = torch.arange(7).repeat_interleave(counts)
    loss = adaptive(torch.randn(len(targets), 16), targets).loss.item()
    assert uniform_loss(counts, (2, 4)) == pytest.approx(loss)
    assert uniform_loss(counts) == pytest.approx(math.log(7))


@pytest.mark.parametrize("cutoffs", [(4, 2), (2, 2), (2, 7)])
def test_cutoffs_must_increase_within_the_vocabulary(cutoffs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must increase, to less than the 7 words"):
        uniform_loss(torch.ones(7), cutoffs)
