"""The stable embedding, and the tasks that can use it."""

from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from runners.config import plain
from tasks.models.embedding import StableEmbedding
from tasks.models.lstm import LSTMLanguageModel
from tasks.models.transformer import Translator
from tasks.phrases_transformer import PhrasesTransformer
from tasks.pydocs_lstm import PydocsLSTM


def test_output_has_mean_0_and_variance_1_whatever_the_weights() -> None:
    torch.manual_seed(0)
    layer = StableEmbedding(50, 64)
    bound = (6 / (50 + 64)) ** 0.5
    assert layer.weight.abs().max() <= bound and layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    tokens = torch.randint(50, (7, 3))
    for factor in (1.0, 100.0):
        with torch.no_grad():
            layer.weight.mul_(factor)
        y = layer(tokens)
        torch.testing.assert_close(y, nn.functional.layer_norm(layer.weight[tokens], (64,)))
        torch.testing.assert_close(y.var(-1, correction=0), torch.ones(7, 3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "transformer"])
def test_its_state_stays_in_full_precision(kind: str, tied: bool) -> None:
    torch.manual_seed(0)
    if kind == "lstm":
        model: nn.Module = LSTMLanguageModel(80, 64, 1, 2, tied, 0.0, stable=True)
        arguments: tuple[Any, ...] = (torch.randint(80, (4, 2)), torch.tensor(True))
    else:
        model = Translator(80, 1, 64, 2, 64, 4, tied=tied, stable=True)
        arguments = (torch.randint(1, 80, (2, 4)), torch.randint(1, 80, (2, 4)))
    optimizer = optimizers.EightBit(model.parameters(), lr=0.01)
    model(*arguments).square().sum().backward()
    optimizer.step()
    coded = {name for name, p in model.named_parameters() if optimizer.state[p]["m"].dtype == torch.uint8}
    assert coded and not any("embedding" in name for name in coded)
    assert ("output.weight" in coded) is not tied


def test_without_it_models_are_what_they_were() -> None:
    # The same numbers are drawn, in the same order.
    torch.manual_seed(3)
    model = LSTMLanguageModel(20, 8, 1, 2, True, 0.0)
    torch.manual_seed(3)
    nn.Embedding(20, 8)
    lstm = nn.LSTM(8, 8)
    assert torch.equal(model.lstm.layers[0].weight_hh_l0, lstm.weight_hh_l0)
    assert "embedding.norm.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("task", [PydocsLSTM, PhrasesTransformer])
def test_a_task_that_does_not_use_it_keeps_its_id(task: Any) -> None:
    assert "stable_embedding" not in plain(task()) and plain(task(stable_embedding=True))["stable_embedding"] is True
    prepared = task(stable_embedding=True)
    prepared.prepare(torch.device("cpu"), None)
    model = prepared.model()
    assert any(isinstance(module, StableEmbedding) for module in model.modules())
    prepared.stable_embedding = False
    assert not any(isinstance(module, StableEmbedding) for module in prepared.model().modules())
