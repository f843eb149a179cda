"""The decoder-only Transformer: causality, adaptive inputs, evaluation in windows, and the real data."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor, nn

from tasks import sources
from tasks.models.transformer_lm import AdaptiveEmbedding, TransformerLM
from tasks.text import nll, uniform_loss
from tasks.wikitext_transformer import FILES, HUB, WikitextTransformer


def log_probabilities(model: TransformerLM, tokens: Tensor) -> Tensor:
    """Of every word (T, V) after each of tokens (T,)."""
    features = model(tokens[None])[0]
    if isinstance(model.output, nn.AdaptiveLogSoftmaxWithLoss):
        return model.output.log_prob(features)
    logits: Tensor = model.output(features)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("pre_ln", [True, False])
def test_a_future_word_changes_nothing_before_it(pre_ln: bool) -> None:
    model = TransformerLM(11, 2, 8, 2, 16, 6, pre_ln=pre_ln).double()
    text = torch.randint(11, (6,))
    changed = text.clone()
    changed[4] = (text[4] + 1) % 11
    a, b = log_probabilities(model, text), log_probabilities(model, changed)
    torch.testing.assert_close(a[:4], b[:4], rtol=0, atol=1e-12)
    assert (a[4:] - b[4:]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor(tied: bool) -> None:
    model = TransformerLM(11, 1, 8, 2, 16, 6, tied=tied)
    assert (model.output.weight is model.embedding.tokens.weight) == tied


def test_adaptive_inputs_are_the_outputs_weights() -> None:
    model = TransformerLM(30, 1, 16, 2, 16, 6, cutoffs=(5, 12))
    embedding, output = model.embedding.tokens, model.output
    assert isinstance(embedding, AdaptiveEmbedding) and isinstance(output, nn.AdaptiveLogSoftmaxWithLoss)
    rows = embedding(torch.arange(30))
    (down1, words1), (down2, words2) = ([layer.weight for layer in cluster] for cluster in output.tail)
    assert words1.shape == (7, 4) and words2.shape == (18, 1)
    torch.testing.assert_close(rows, torch.cat((output.head.weight[:5], words1 @ down1, words2 @ down2)))
    parameters = {name for name, _ in model.named_parameters() if not name.startswith("stack")}
    assert len(parameters) == 1 + 2 * 2  # nothing beside the output
    untied = TransformerLM(30, 1, 16, 2, 16, 6, cutoffs=(5, 12), tied=False)
    assert untied.embedding.tokens.weight.shape == (30, 16)


@pytest.mark.parametrize("cutoffs", [(), (8, 20)])
@pytest.mark.parametrize("stride", [None, 12, 5, 1])
def test_evaluation_equals_one_word_at_a_time(
    stride: int | None, cutoffs: tuple[int, ...], prepared: Callable[..., Any]
) -> None:
    task = prepared("wikitext_transformer", stride=stride, cutoffs=cutoffs)
    model = task.model().double()
    found = task.evaluate(model, "test")
    targets = task.text.splits["test"].long()
    tokens = torch.cat((torch.tensor([task.text.words.index("<eos>")]), targets[:-1]))
    context, step = task.context, stride or task.context
    total = 0.0
    with torch.no_grad():
        for i, y in enumerate(targets):
            # The first window that has this word in it.
            start = 0 if i < context else step * math.ceil((i + 1 - context) / step)
            total -= log_probabilities(model, tokens[start : i + 1])[-1, y].item()
    assert found["loss"].item() == pytest.approx(total / len(targets), rel=1e-12)
    assert found["perplexity"].item() == pytest.approx(math.exp(total / len(targets)))


def test_adaptive_training(prepared: Callable[..., Any]) -> None:
    task = prepared("wikitext_transformer", cutoffs=(8, 20))
    model = task.model()
    batch = next(task.batches(0))
    loss = task.loss(model, batch)
    expected = torch.stack([log_probabilities(model, words)[range(12), y] for words, y in zip(*batch, strict=True)])
    torch.testing.assert_close(loss, -expected.mean())
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_an_epoch_reads_the_text_once(prepared: Callable[..., Any]) -> None:
    task = prepared("wikitext_transformer")
    train = task.text.splits["train"]
    size = len(train)
    task.text.splits["train"] = torch.arange(size, dtype=torch.int32)
    try:
        batches = list(itertools.islice(task.batches(0), size // 12 // 8))
    finally:
        task.text.splits["train"] = train
    read = torch.cat([batch.tokens for batch in batches])
    assert torch.equal(torch.cat([batch.targets for batch in batches]), (read + 1) % size)
    assert torch.equal(read[:, 1:], (read[:, :-1] + 1) % size)
    assert read.numel() == len(read.unique()) > size - 12 * 9
    starts = read[:, 0]
    assert not torch.equal(starts, starts.sort().values)


def test_the_real_data(real_data: str) -> None:
    task = WikitextTransformer(layers=1)
    try:
        task.prepare(torch.device("cpu"), real_data)
    except sources.Missing as error:
        pytest.skip(str(error))
    assert {split: len(words) for split, words in task.text.splits.items()} == {
        "train": 2_088_628, "validation": 217_646, "test": 245_569
    }  # fmt: skip
    assert len(task.text.words) == 33_278
    assert task.worst == task.initial_loss == math.log(33_278)
    # The hub's rows are these lines, but empty where nothing stands before the line break.
    (path,) = sources.find("wikitext2", real_data, {"test": FILES["test"]})["test"]
    content = path.read_text()
    rows = [{"text": line if line.strip() else ""} for line in content.splitlines(keepends=True)]
    assert "".join(map(HUB["wikitext2"].line, rows)) == content


def test_wikitext_103_is_one_value_away(tmp_path: Path) -> None:
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / "wikitext103").mkdir(exist_ok=True)
        (tmp_path / "wikitext103" / name).write_text(" = a b = \n" * 20)
    task = WikitextTransformer(corpus="wikitext103", batch_size=2, context=5)
    task.prepare(torch.device("cpu"), str(tmp_path))
    assert sorted(task.text.words) == ["<eos>", "<unk>", "=", "a", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stride": 13}, "stride=13 is more than context=12"),
        ({"cutoffs": (8, 1000)}, "must increase, to less than the"),
        ({"batch_size": 10_000}, "batch_size=10000 is larger"),
    ],
)
def test_what_does_not_fit_is_an_error(
    fields: dict[str, Any], message: str, data_root: Callable[[str], str | None]
) -> None:
    task = WikitextTransformer(**{"context": 12, **fields})
    with pytest.raises(ValueError, match=message):
        task.prepare(torch.device("cpu"), data_root("wikitext_transformer"))


@pytest.mark.parametrize("fields", [{"corpus": "wikitext3"}, {"context": 0}, {"cutoffs": (0,)}, {"cutoffs": (1.5,)}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        WikitextTransformer(**fields)


def test_the_adaptive_loss_at_initialisation() -> None:
    model = TransformerLM(4000, 1, 64, 2, 64, 16, tied=False, cutoffs=(200, 1000))
    tokens = torch.randint(4000, (40, 17))
    loss = nll(model.output, model(tokens[:, :-1]), tokens[:, 1:]).item() / 640
    assert abs(loss - uniform_loss(tokens.flatten().bincount(minlength=4000), (200, 1000))) < 0.7
