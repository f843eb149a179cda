"""The AWD-LSTM: its dropouts, its penalties, its carried state, and the real data."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import sources
from tasks.models.awd_lstm import AWDLSTM, WeightDropLSTM, embedding_dropout, locked_dropout
from tasks.ptb_lstm import FILES, HUB, PTBLSTM, scale_gradient
from tasks.text import STREAMS, Batch

ZERO, ONE = torch.tensor(False), torch.tensor(True)
DROPOUTS = ("dropout", "dropout_input", "dropout_hidden", "dropout_embedding", "weight_drop")


@pytest.fixture
def model() -> AWDLSTM:
    return AWDLSTM(11, 6, [8, 7, 6], 3, tied=True).double()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_without_dropout_a_layer_is_torchs_lstm() -> None:
    layer, other = WeightDropLSTM(5, 4, 0.0).double(), nn.LSTM(5, 4).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            getattr(other, f"{name}_l0").copy_(parameter)
    x, hidden, cell = (torch.randn(*shape).double() for shape in ((7, 3, 5), (3, 4), (3, 4)))
    y, *end = layer(x, hidden, cell)
    expected, expected_end = other(x, (hidden[None], cell[None]))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.stack(end), torch.cat(expected_end))
    for a, b in zip(gradients(layer, y.square().sum()), gradients(other, expected.square().sum()), strict=True):
        torch.testing.assert_close(a, b)
    bound = 4**-0.5
    assert all(0.5 * bound < parameter.abs().max() <= bound for parameter in layer.parameters())


def test_weight_drop_has_one_mask_for_all_time_steps_and_none_in_evaluation() -> None:
    layer = WeightDropLSTM(5, 4, 0.5).double()
    x, hidden, cell = (torch.randn(*shape).double() for shape in ((7, 3, 5), (3, 4), (3, 4)))
    torch.manual_seed(1)
    dropped = layer(x, hidden, cell)[0]
    torch.manual_seed(1)
    kept = F.dropout(torch.ones(16, 4).double(), 0.5) > 0
    assert 0 < kept.sum() < kept.numel()
    fixed = WeightDropLSTM(5, 4, 0.0).double()
    fixed.load_state_dict({**layer.state_dict(), "weight_hh": 2 * layer.weight_hh.detach() * kept})
    torch.testing.assert_close(dropped, fixed(x, hidden, cell)[0])  # the same weights at every time step
    assert not torch.equal(dropped, layer(x, hidden, cell)[0])
    layer.eval()
    fixed.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, hidden, cell)[0], fixed(x, hidden, cell)[0])


def test_locked_dropout_has_one_mask_over_time() -> None:
    y = locked_dropout(torch.ones(9, 5, 40), 0.25, training=True)
    assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.equal(y[0, 0], y[0, 1])
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y[0] > 0).float().mean().item() - 0.75) < 4 * (0.25 * 0.75 / 200) ** 0.5
    assert torch.equal(locked_dropout(y, 0.25, training=False), y)


def test_embedding_dropout_drops_words() -> None:
    weight = torch.rand(400, 3) + 1
    y = embedding_dropout(weight, 0.1, training=True)
    kept = y[:, 0] > 0
    torch.testing.assert_close(y, kept[:, None] * weight / 0.9)
    assert abs(kept.float().mean().item() - 0.9) < 4 * (0.1 * 0.9 / 400) ** 0.5
    assert torch.equal(embedding_dropout(weight, 0.1, training=False), weight)


@pytest.mark.parametrize("name", DROPOUTS)
def test_every_dropout_is_applied_in_training_alone(name: str) -> None:
    model = AWDLSTM(11, 6, [8, 6], 3, tied=True, **{name: 0.5})  # type: ignore[arg-type]
    text = torch.randint(11, (5, 3))
    raw, dropped = model(text, ONE)
    again, dropped_again = model(text, ONE)
    assert torch.equal(raw, again) == (name == "dropout")
    assert torch.equal(raw, dropped) == (name != "dropout")
    assert not torch.equal(dropped, dropped_again)
    model.eval()
    raw, dropped = model(text, ONE)
    assert torch.equal(raw, dropped) and torch.equal(raw, model(text, ONE)[0])


def test_the_carried_state_makes_one_long_unroll(model: AWDLSTM) -> None:
    text = torch.randint(11, (12, 3))
    _, long, end = model.unroll(text, torch.zeros_like(model.carried))
    parts = [model(part, torch.tensor(i == 0))[1] for i, part in enumerate(text.split([5, 3, 4]))]
    torch.testing.assert_close(torch.cat(parts), long, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.carried, end, rtol=0, atol=1e-12)
    assert not model.carried.requires_grad


def test_gradients_of_parts_make_those_of_one_long_unroll_unless_cut(model: AWDLSTM) -> None:
    text = torch.randint(11, (8, 3))
    zeros = torch.zeros_like(model.carried)

    def loss(features: Tensor) -> Tensor:
        logits: Tensor = model.output(features)
        return logits.square().sum()

    whole = gradients(model, loss(model.unroll(text, zeros)[1]))
    _, first, state = model.unroll(text[:4], zeros)
    _, second, _ = model.unroll(text[4:], state)
    for a, b in zip(gradients(model, loss(first) + loss(second)), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model(text[:4], ONE)
    cut = gradients(model, loss(model(text[4:], ZERO)[1]))
    expected = gradients(model, loss(model.unroll(text[4:], state.detach())[1]))
    for a, b in zip(cut, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_reset_starts_from_zeros_even_after_nan_and_evaluation_keeps_the_state(model: AWDLSTM) -> None:
    text = torch.randint(11, (4, 3))
    fresh = model(text, ONE)[0]
    model.carried.fill_(float("nan"))
    assert torch.equal(model(text, ONE)[0], fresh)
    before = model.carried.clone()
    assert before.isfinite().all() and before.any() and torch.equal(model.state_dict()["carried"], before)
    model.eval()(text, ZERO)
    assert torch.equal(model.carried, before)


def test_a_future_word_changes_nothing_before_it(model: AWDLSTM) -> None:
    text = torch.randint(11, (6, 3))
    changed = text.clone()
    changed[4] = (text[4] + 1) % 11
    a, b = (model.unroll(words, torch.zeros_like(model.carried))[0] for words in (text, changed))
    assert torch.equal(a[:4], b[:4]) and not torch.equal(a[4], b[4])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_tensor(tied: bool, prepared: Callable[..., Any]) -> None:
    model = prepared("ptb_lstm", tied=tied).model()
    assert (model.output.weight is model.embedding.weight) == tied
    assert model.widths == [32, 24 if tied else 32]


def test_the_penalties_are_their_formulas(prepared: Callable[..., Any]) -> None:
    task = prepared("ptb_lstm", dropout=0.5, ar=2.0, tar=3.0, variable_bptt=False)
    model = task.model()
    batch = next(task.batches(0))
    torch.manual_seed(1)
    loss = task.loss(model, batch)
    torch.manual_seed(1)
    raw, dropped = model(batch.tokens, ONE)
    assert not torch.equal(raw, dropped)
    expected = F.cross_entropy(model.output(dropped).flatten(0, 1), batch.targets.flatten())
    expected += 2 * (dropped**2).mean() + 3 * ((raw[1:] - raw[:-1]) ** 2).mean()
    torch.testing.assert_close(loss, expected)


def test_the_gradient_of_a_batch_is_in_proportion_to_its_length(prepared: Callable[..., Any]) -> None:
    task = prepared("ptb_lstm")
    model = task.model()
    batch = next(batch for batch in task.batches(0) if len(batch.tokens) == 9)
    batch = Batch(batch.tokens, batch.targets, ONE)
    loss = task.loss(model, batch)
    logits = model.output(model(batch.tokens, ONE)[1])
    mean = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(loss, mean)
    for a, b in zip(gradients(model, loss), gradients(model, 9 / task.bptt * mean), strict=True):
        torch.testing.assert_close(a, b)
    assert scale_gradient(torch.tensor(math.nan), 2.0).isnan()


def test_batches_of_fixed_bptt_have_one_shape(prepared: Callable[..., Any]) -> None:
    task = prepared("ptb_lstm", variable_bptt=False)
    assert {batch.tokens.shape for batch in itertools.islice(task.batches(0), 300)} == {(6, 8)}


def test_evaluation_equals_one_word_at_a_time(prepared: Callable[..., Any]) -> None:
    task = prepared("ptb_lstm", ar=1.0, dropout=0.5)
    model = task.model().double()
    found = task.evaluate(model, "test")
    targets = task.text.splits["test"].long()
    tokens = torch.cat((torch.tensor([task.text.words.index("<eos>")]), targets[:-1]))
    length = -(-len(targets) // STREAMS)
    total = 0.0
    model.eval()
    with torch.no_grad():
        for i, (x, y) in enumerate(zip(tokens, targets, strict=True)):
            if i % length == 0:
                state = torch.zeros(2, 1, model.carried.shape[-1], dtype=torch.float64)
            _, features, state = model.unroll(x[None, None], state)
            total -= model.output(features)[0, 0].log_softmax(0)[y].item()
    assert found["loss"].item() == pytest.approx(total / len(targets), rel=1e-12)
    assert found["perplexity"].item() == pytest.approx(math.exp(total / len(targets)))


@pytest.mark.parametrize(("layers", "parameters"), [(1, 5_293_200), (2, 13_632_400), (3, 24_221_600)])
def test_the_papers_parameter_counts(layers: int, parameters: int) -> None:
    task = PTBLSTM(layers=layers)
    task.text, task.device = type("Text", (), {"words": range(10_000)}), torch.device("meta")  # type: ignore[assignment]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in task.model().parameters()) == parameters


def test_the_defaults_are_the_protocols() -> None:
    assert {f.name: getattr(PTBLSTM(), f.name) for f in dataclasses.fields(PTBLSTM)} == {  # type: ignore[arg-type]
        "batch_size": 20, "bptt": 70, "variable_bptt": True, "layers": 3, "embedding": 400, "hidden": 1150,
        "tied": True, "dropout": 0.4, "dropout_input": 0.4, "dropout_hidden": 0.25, "dropout_embedding": 0.1,
        "weight_drop": 0.5, "ar": 2.0, "tar": 1.0,
    }  # fmt: skip


def test_the_real_data(real_data: str) -> None:
    task = PTBLSTM(layers=1)
    try:
        task.prepare(torch.device("cpu"), real_data)
    except sources.Missing as error:
        pytest.skip(str(error))
    assert {split: len(words) for split, words in task.text.splits.items()} == {
        "train": 929_589, "validation": 73_760, "test": 82_430
    }  # fmt: skip
    assert len(task.text.words) == 10_000
    assert task.text.words[:5] == ["the", "<unk>", "<eos>", "N", "of"]
    assert task.worst == task.initial_loss == math.log(10_000)
    lengths = [len(batch.tokens) for batch in itertools.islice(task.batches(0), 200)]
    assert 60 < sum(lengths) / 200 < 75 and max(lengths) > 75
    # The hub's rows are these lines without the spaces around them; written back they are the same file.
    ((part, path),) = sources.find("ptb", real_data, {"test": FILES["test"]}).items()
    rows = [{"sentence": line.strip()} for line in path[0].read_text().splitlines()]
    assert "".join(map(HUB.line, rows)) == path[0].read_text() and part in HUB.sha256


@pytest.mark.parametrize("fields", [{"bptt": 1}, {"layers": 0}, {"dropout": 1.0}, {"weight_drop": -0.1}, {"ar": -1.0}])
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(fields))):
        PTBLSTM(**fields)
