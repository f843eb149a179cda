"""The documentation: no leakage between splits, and the state that is carried."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.lstm import LSTMLanguageModel, StackedLSTM
from tasks.pydocs_lstm import END, REPEAT, STREAMS, PydocsLSTM, paragraphs, read

ZERO, ONE = torch.tensor(False), torch.tensor(True)


def test_no_paragraph_is_in_two_splits_or_twice_in_one() -> None:
    splits = read()
    seen: set[tuple[str, ...]] = set()
    for words in splits.values():
        assert words[-1] == END
        text = [tuple(group) for end, group in itertools.groupby(words, END.__eq__) if not end]
        long = [part for part in text if len(part) >= REPEAT]
        assert len(long) > 50
        assert not seen & set(long)
        seen |= set(long)
    total = sum(map(len, splits.values()))
    assert all(0.05 < len(splits[name]) / total <= 0.1 for name in ("validation", "test"))


def test_few_long_sequences_of_words_are_in_two_splits() -> None:
    def runs(words: list[str]) -> list[tuple[str, ...]]:
        return list(zip(*(words[i:] for i in range(10)), strict=False))

    splits = read()
    known = set(runs(splits["train"]))
    for name in ("validation", "test"):
        held_out = runs(splits[name])
        assert sum(run in known for run in held_out) / len(held_out) < 0.05


def test_words_and_marks_are_tokens_and_rules_are_not() -> None:
    text = 'The "with"  statement\n====\n\n   x_1 = 2.5\n\n+---+---+\n'
    assert paragraphs(text) == [("the", '"', "with", '"', "statement"), ("x_1", "=", "2", ".", "5")]


def test_streams_continue_from_batch_to_batch(prepared: Callable[..., Any]) -> None:
    task = prepared("pydocs_lstm")
    batches = list(itertools.islice(task.batches(0), task.per_epoch + 2))
    for batch in batches:
        assert torch.equal(batch.tokens[1:], batch.targets[:-1])
    for before, after in itertools.pairwise(batches[: task.per_epoch]):
        assert torch.equal(before.targets[-1], after.tokens[0])
    assert [bool(batch.reset) for batch in batches] == [True] + [False] * (task.per_epoch - 1) + [True, False]


def test_an_epoch_reads_the_text_once(prepared: Callable[..., Any]) -> None:
    task = prepared("pydocs_lstm")
    text = task.data["train"]
    task.data["train"] = torch.arange(len(text))
    try:
        batches = list(itertools.islice(task.batches(0), task.per_epoch))
    finally:
        task.data["train"] = text
    read_ = torch.cat([batch.tokens.flatten() for batch in batches])
    assert len(read_) == len(read_.unique())
    assert len(text) - len(read_) <= task.batch_size * (task.bptt + 1) + task.batch_size


def test_rare_words_are_unknown(prepared: Callable[..., Any]) -> None:
    task = prepared("pydocs_lstm")
    words, text = task.words, read()["train"]
    counts = Counter(text)
    assert len(words) == len(set(words)) and words[:2] == ["<unk>", "<eos>"]
    for i in range(2000):
        token = int(task.data["train"][i])
        assert words[token] == text[i] if counts[text[i]] >= 3 else token == 0


@pytest.fixture
def model() -> LSTMLanguageModel:
    return LSTMLanguageModel(11, 6, 2, 3, tied=True, dropout=0.0).double()


def gradients(model: LSTMLanguageModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_carried_state_makes_one_long_unroll(model: LSTMLanguageModel) -> None:
    text = torch.randint(11, (12, 3))
    long, end = model.unroll(text, torch.zeros_like(model.carried))
    parts = [model(part, torch.tensor(i == 0)) for i, part in enumerate(text.split(4))]
    torch.testing.assert_close(torch.cat(parts), long, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.carried, end, rtol=0, atol=1e-12)
    assert not model.carried.requires_grad


def test_gradients_of_parts_make_those_of_one_long_unroll_unless_cut(model: LSTMLanguageModel) -> None:
    text = torch.randint(11, (8, 3))
    zeros = torch.zeros_like(model.carried)
    whole = gradients(model, model.unroll(text, zeros)[0].square().sum())
    first, state = model.unroll(text[:4], zeros)
    second, _ = model.unroll(text[4:], state)
    joined = gradients(model, first.square().sum() + second.square().sum())
    for a, b in zip(joined, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model(text[:4], ONE)
    cut = gradients(model, model(text[4:], ZERO).square().sum())
    expected = gradients(model, model.unroll(text[4:], state.detach())[0].square().sum())
    for a, b in zip(cut, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_reset_starts_from_zeros_even_after_nan(model: LSTMLanguageModel) -> None:
    text = torch.randint(11, (4, 3))
    fresh = model(text, ONE)
    model.carried.fill_(float("nan"))
    assert torch.equal(model(text, ONE), fresh)
    assert not torch.equal(model(text, ZERO), fresh)


def test_the_state_stays_in_evaluation_mode_and_in_checkpoints(model: LSTMLanguageModel) -> None:
    text = torch.randint(11, (4, 3))
    model(text, ONE)
    before = model.carried.clone()
    model.eval()(text, ZERO)
    assert torch.equal(model.carried, before) and before.any()
    assert torch.equal(model.state_dict()["carried"], before)


def test_evaluation_equals_one_stream_at_a_time(prepared: Callable[..., Any]) -> None:
    task = prepared("pydocs_lstm")
    model = task.model().double()
    loss = task.evaluate(model, "test")
    text = task.data["test"]
    tokens = torch.cat((torch.tensor([task.words.index("<eos>")]), text[:-1]))
    length = -(-len(text) // STREAMS)
    total = 0.0
    with torch.no_grad():
        for x, y in zip(tokens.split(length), text.split(length), strict=True):
            logits, _ = model.unroll(x[:, None], torch.zeros(2, 1, 1, task.width, dtype=torch.float64))
            total += F.cross_entropy(logits[:, 0], y, reduction="sum").item()
    assert loss["loss"].item() == pytest.approx(total / len(text), rel=1e-12)
    assert loss["perplexity"].item() == pytest.approx(loss["loss"].exp().item())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor(tied: bool, prepared: Callable[..., Any]) -> None:
    model = prepared("pydocs_lstm", tied=tied).model()
    assert (model.output.weight is model.embedding.weight) == tied


def test_dropout_and_two_layers(prepared: Callable[..., Any]) -> None:
    task = prepared("pydocs_lstm", dropout=0.5, layers=2)
    model = task.model()
    batch = next(task.batches(0))
    assert task.loss(model, batch) != task.loss(model, batch)
    assert len(model.lstm.layers) == 2
    first, second = (task.evaluate(model, "test")["loss"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("fields", [{"bptt": 0}, {"layers": 3}, {"dropout": 1.0}, {"min_count": 0}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        PydocsLSTM(**fields)


def test_streams_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="batch_size=1000 streams of bptt=500 do not fit"):
        PydocsLSTM(batch_size=1000, bptt=500).prepare(torch.device("cpu"), None)


@pytest.mark.parametrize("training", [True, False])
def test_stacked_layers_are_torchs_lstm_with_dropout(training: bool) -> None:
    torch.manual_seed(0)
    ours = StackedLSTM(5, 7, 3, dropout=0.4).train(training)
    torch.manual_seed(0)
    torchs = nn.LSTM(5, 7, 3, dropout=0.4).train(training)
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(p, q)
    x, state = torch.randn(4, 2, 5), torch.randn(2, 3, 2, 7)
    found = []
    for call in (lambda: ours(x, state), lambda: torchs(x, (state[0], state[1]))):
        torch.manual_seed(1)
        found.append(call())
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], torch.stack(found[1][1]))
