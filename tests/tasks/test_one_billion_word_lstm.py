"""One Billion Word: the archive's format, rare words, the adaptive softmax, and the state that is carried."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from tasks import sources
from tasks.models.lstm import AdaptiveLSTM
from tasks.one_billion_word_lstm import OneBillionWordLSTM
from tasks.text import STREAMS

ONE = torch.tensor(True)


@pytest.fixture
def model() -> AdaptiveLSTM:
    return AdaptiveLSTM(30, 5, 16, 2, 3, (5, 12), dropout=0.0).double()


def test_every_file_of_the_archive_is_read(
    prepared: Callable[..., Any], data_root: Callable[[str], str | None]
) -> None:
    task = prepared("one_billion_word_lstm")
    root = Path(data_root("one_billion_word_lstm") or "") / "one_billion_word"
    read = {path.name: path.read_text().replace("\n", "<eos> ").split() for path in sorted(root.glob("*/news.en*"))}
    train = read["news.en-00001-of-00100"] + read["news.en-00002-of-00100"]
    splits = {
        "train": train,
        "test": read["news.en.heldout-00000-of-00050"],
        "validation": read["news.en.heldout-00001-of-00050"],
    }
    counts = Counter(train)
    words = task.text.words
    assert set(words) == {word for word, n in counts.items() if n >= 2} | {"<unk>"}
    assert task.text.counts.tolist() == sorted(task.text.counts.tolist(), reverse=True)
    for split, text in splits.items():
        known = [word if counts[word] >= 2 else "<unk>" for word in text]
        assert [words[i] for i in task.text.splits[split]] == known
    assert 0 < task.text.counts[words.index("<unk>")] == sum(n for n in counts.values() if n < 2)


def test_the_defaults_are_the_papers() -> None:
    task = OneBillionWordLSTM()
    assert (task.batch_size, task.bptt, task.layers, task.embedding, task.width) == (128, 20, 2, 300, 2048)
    assert task.cutoffs == (4000, 40000, 200000) and task.dropout == 0.1
    assert task.min_count == 4  # at most three times: unknown


def test_the_carried_state_makes_one_long_unroll(model: AdaptiveLSTM) -> None:
    text = torch.randint(30, (12, 3))
    long, end = model.unroll(text, torch.zeros_like(model.carried))
    parts = [model(part, torch.tensor(i == 0)) for i, part in enumerate(text.split(4))]
    torch.testing.assert_close(torch.cat(parts), long, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.carried, end, rtol=0, atol=1e-12)
    assert not model.carried.requires_grad


def test_a_future_word_changes_nothing_before_it(model: AdaptiveLSTM) -> None:
    text = torch.randint(30, (6, 3))
    changed = text.clone()
    changed[4] = (text[4] + 1) % 30
    a, b = (model.unroll(words, torch.zeros_like(model.carried))[0] for words in (text, changed))
    assert torch.equal(a[:4], b[:4]) and not torch.equal(a[4], b[4])


def test_dropout_is_for_training_alone() -> None:
    model = AdaptiveLSTM(30, 5, 16, 2, 3, (5, 12), dropout=0.5)
    text = torch.randint(30, (6, 3))
    assert not torch.equal(model(text, ONE), model(text, ONE))
    model.eval()
    assert torch.equal(model(text, ONE), model(text, ONE))


def test_the_loss_is_that_of_the_whole_distribution(prepared: Callable[..., Any]) -> None:
    task = prepared("one_billion_word_lstm")
    model = task.model().double()
    batch = next(task.batches(0))
    loss = task.loss(model, batch)
    table: Tensor = model.output.log_prob(model(batch.tokens, ONE).flatten(0, 1))
    torch.testing.assert_close(table.exp().sum(1), torch.ones(len(table)).double())
    torch.testing.assert_close(loss, -table.gather(1, batch.targets.flatten()[:, None]).mean())


def test_evaluation_equals_one_word_at_a_time(prepared: Callable[..., Any]) -> None:
    task = prepared("one_billion_word_lstm")
    model = task.model().double()
    found = task.evaluate(model, "test")
    targets = task.text.splits["test"].long()
    tokens = torch.cat((torch.tensor([task.text.words.index("<eos>")]), targets[:-1]))
    length = -(-len(targets) // STREAMS)
    total = 0.0
    with torch.no_grad():
        for i, (x, y) in enumerate(zip(tokens, targets, strict=True)):
            if i % length == 0:
                state = torch.zeros(2, 2, 1, task.width, dtype=torch.float64)
            features, state = model.unroll(x[None, None], state)
            total -= model.output.log_prob(features[0])[0, y].item()
    assert found["loss"].item() == pytest.approx(total / len(targets), rel=1e-12)
    assert found["perplexity"].item() == pytest.approx(math.exp(total / len(targets)))


def test_a_small_vocabulary_is_an_error(data_root: Callable[[str], str | None]) -> None:
    with pytest.raises(ValueError, match=r"cutoffs=\(4000, 40000, 200000\) must increase, to less than the \d+ words"):
        OneBillionWordLSTM().prepare(torch.device("cpu"), data_root("one_billion_word_lstm"))


def test_without_the_archive_one_line_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(sources.Missing, match=r"no training-monolingual.tokenized.shuffled/.* in .*one_billion_word"):
        OneBillionWordLSTM().prepare(torch.device("cpu"), str(tmp_path))


@pytest.mark.parametrize("fields", [{"cutoffs": ()}, {"cutoffs": (0, 5)}, {"min_count": 0}, {"dropout": 1.0}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        OneBillionWordLSTM(**fields)
