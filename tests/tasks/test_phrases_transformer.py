"""Phrases: the splits, the padding, the decoding and the metrics."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.models.transformer import Translator
from tasks.phrases_transformer import BEGIN, END, LENGTH, PAD, Batch, PhrasesTransformer, pieces, read


@pytest.fixture(scope="module")
def task(prepared: Callable[..., Any]) -> PhrasesTransformer:
    task: PhrasesTransformer = prepared("phrases_transformer", layers=2)
    return task


@pytest.fixture
def model(trained: Translator) -> Translator:
    return copy.deepcopy(trained)


@pytest.fixture(scope="module")
def trained(task: PhrasesTransformer) -> Translator:
    """Trained for a moment, so that its translations have different lengths."""
    torch.manual_seed(0)
    model = task.model()
    assert isinstance(model, Translator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for batch in itertools.islice(task.batches(0), 60):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    return model.double()


def test_no_source_is_in_two_splits(task: PhrasesTransformer) -> None:
    splits = read()
    sources = [pair.source for pairs in splits.values() for pair in pairs]
    assert len(sources) == len(set(sources)) > 9000
    rows = [tuple(row) for data in task.data.values() for row in data.source.tolist()]
    assert len(rows) == len(set(rows)) > 7000
    for name in ("validation", "test"):
        assert 0.08 < len(splits[name]) / len(sources) < 0.12


def test_phrases_are_translations() -> None:
    known = dict(pair for pairs in read().values() for pair in pairs)
    assert known["Germany"] == "Deutschland" and known["Finnish"] == "Finnisch"
    assert known["in 3 weeks"] == "in 3 Wochen" or known["3 weeks ago"] == "vor 3 Wochen"
    dates = {source: target for source, target in known.items() if source.startswith("Monday, May 2")}
    assert dates and all(target.startswith("Montag, 2") and ". Mai " in target for target in dates.values())


def test_tokens_spell_the_phrases(task: PhrasesTransformer) -> None:
    for name, pairs in read().items():
        known = dict(pairs)
        data = task.data[name]
        for source, target in zip(task.text(data.source), task.text(data.target), strict=True):
            # A letter that the training split lacks is unknown.
            assert "<unk>" in source + target or known[source] == target


def test_pieces_join_to_the_phrase() -> None:
    assert pieces("in 21 days (UTC)") == ["in", " 2", "1", " days", " (", "UTC", ")"]


def test_targets_are_shifted(task: PhrasesTransformer) -> None:
    for source, before, target in task.data.values():
        assert source.shape[1] == before.shape[1] == target.shape[1] == LENGTH
        assert (before[:, 0] == BEGIN).all() and ((target == END).sum(1) == 1).all()
        follows = before[:, 1:] != PAD
        assert torch.equal(before[:, 1:][follows], target[:, :-1][follows])
        assert not (before == END).any()
        # As many inputs as targets: nothing is predicted from padding.
        assert torch.equal((before != PAD).sum(1), (target != PAD).sum(1))


def test_padding_does_not_change_the_loss(task: PhrasesTransformer, model: Translator) -> None:
    batch = next(task.batches(0))
    total, count = 0.0, 0
    for source, before, target in zip(*batch, strict=True):
        s, t = int((source != PAD).sum()), int((target != PAD).sum())
        logits = model(source[None, :s], before[None, :t])
        total += F.cross_entropy(logits[0], target[:t], reduction="sum").item()
        count += t
    assert task.loss(model, batch).item() == pytest.approx(total / count, rel=1e-12)


def test_evaluation_equals_one_phrase_at_a_time(
    task: PhrasesTransformer, model: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Batch(*(tensor[:90] for tensor in task.data["test"]))
    monkeypatch.setitem(task.data, "test", few)
    monkeypatch.setattr("tasks.phrases_transformer.CHUNK", 40)
    losses: list[Tensor] = []
    model.eval()
    with torch.no_grad():
        for source, before, target in zip(*few, strict=True):
            s, t = int((source != PAD).sum()), int((target != PAD).sum())
            logits = model(source[None, :s], before[None, :t])[0]
            losses.extend(F.cross_entropy(logits, target[:t], reduction="none"))
    expected = torch.stack(losses).mean().item()
    assert task.evaluate(model, "test")["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("position", [1, 7, 15])
def test_a_later_target_changes_no_earlier_logit(task: PhrasesTransformer, model: Translator, position: int) -> None:
    source, before, _ = next(task.batches(0))
    changed = before.clone()
    changed[:, position] = 4 + (changed[:, position] + 1) % 100
    a, b = model(source, before), model(source, changed)
    assert torch.equal(a[:, :position], b[:, :position])
    assert not torch.equal(a[:, position], b[:, position])


def test_every_source_token_can_change_the_translation(task: PhrasesTransformer, model: Translator) -> None:
    source, before, _ = (tensor[:1] for tensor in next(task.batches(0)))
    for i in range(int((source != PAD).sum())):
        changed = source.clone()
        changed[0, i] = 4 + (changed[0, i] + 1) % 100
        assert not torch.equal(model(changed, before)[:, 0], model(source, before)[:, 0])


def test_greedy_decoding_equals_a_naive_one(task: PhrasesTransformer, model: Translator) -> None:
    source = task.data["validation"].source[:20]
    model.eval()
    expected = []
    for row in source:
        tokens = [BEGIN]
        while len(tokens) <= LENGTH and tokens[-1] != END:
            logits = model(row[row != PAD][None], torch.tensor([tokens]))
            tokens.append(int(logits[0, -1].argmax()))
        expected.append(tokens[1:])
    decoded = model.greedy(source, BEGIN, END, LENGTH)
    assert len({len(tokens) for tokens in expected}) > 1
    for tokens, row in zip(expected, decoded.tolist(), strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {PAD}


def test_bleu_and_exact_match_are_of_the_strings(
    task: PhrasesTransformer, model: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [task.text(task.data["validation"].target)[i] for i in range(task.decode)]
    wrong = [phrase if i % 3 else "vor " + phrase[:-1] for i, phrase in enumerate(right)]
    monkeypatch.setattr(task, "translate", lambda model, source: wrong[: len(source)])
    metrics = task.evaluate(model, "validation")
    assert metrics["exact_match"].item() == sum(i % 3 > 0 for i in range(task.decode)) / task.decode
    assert metrics["bleu"].item() == sacrebleu.corpus_bleu(wrong, [right]).score
    assert 0 < metrics["bleu"] < 100
    monkeypatch.setattr(task, "translate", lambda model, source: right)
    assert task.evaluate(model, "validation")["bleu"].item() == pytest.approx(100)


def test_translate_gives_text(task: PhrasesTransformer, model: Translator) -> None:
    found = task.translate(model, task.data["test"].source[:3])
    assert len(found) == 3 and all("<" not in phrase for phrase in found)


@pytest.mark.parametrize("fields", [{"width": 33}, {"heads": 5}, {"dropout": -0.1}, {"layers": 0}, {"pre_ln": "maybe"}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        PhrasesTransformer(**fields)
