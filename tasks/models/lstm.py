"""LSTM language models that carry their state from batch to batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.models.embedding import StableEmbedding


class Carrying(nn.Module):
    """A recurrent network with the state at the end of the last batch, as truncated backpropagation through time
    needs it: the buffer ``carried``, so that a checkpoint of the ``state_dict`` resumes exactly."""

    carried: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("carried", torch.zeros(shape))

    def start(self, reset: Tensor) -> Tensor:
        """The carried state, or zeros where ``reset`` (a boolean scalar) is true."""
        # A new tensor: backward needs the state that ``keep`` overwrites.
        return torch.where(reset, torch.zeros_like(self.carried), self.carried)

    def keep(self, end: Tensor) -> None:
        """In training mode the carried state moves on, without its gradient: so a second pass over the same
        batch starts elsewhere."""
        if self.training:
            self.carried.copy_(end.detach())


def in_own_precision(lstm: Callable[..., Any], weight: Tensor, *inputs: Tensor) -> Any:
    """lstm(*inputs), on a GPU in the precision of its weights: autocast would run it in float16 there, whatever it was
    asked for, where gradients vanish unless the loss is scaled."""
    if not weight.is_cuda:
        return lstm(*inputs)
    with torch.autocast("cuda", enabled=False):
        return lstm(*(x.to(weight.dtype) for x in inputs))


class StackedLSTM(nn.Module):
    """LSTM layers with dropout between them.

    On a CPU this is nn.LSTM with its dropout, number for number. On a GPU the latter's has a state that no checkpoint
    holds, so that a run would not resume to the bit; and in bfloat16 this one runs in float32 there.
    """

    def __init__(self, inputs: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(width if i else inputs, width) for i in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer gives (T, B, width) after each of x (T, B, inputs), from ``state`` (2, layers, B, width),
        and the state at the end."""
        ends = []
        for i, layer in enumerate(self.layers):
            x = self.dropout(x) if i else x

            def over(x: Tensor, hidden: Tensor, cell: Tensor, layer: nn.Module = layer) -> Any:
                return layer(x, (hidden, cell))

            weight = next(layer.parameters())
            x, end = in_own_precision(over, weight, x, state[0, i : i + 1], state[1, i : i + 1])
            ends.append(torch.cat(end))
        return x, torch.stack(ends, dim=1)


class LSTMLanguageModel(Carrying):
    """Embedding, LSTM, softmax, all of one width, as in Zaremba et al. (2014).

    The carried state is (2, layers, streams, width), the hidden and the cell state.

    Initialisation: all weights and biases of the LSTM uniform in ±1/√width (torch's default), embedding and
    output uniform in ±0.1, output bias 0. Zaremba et al. use one range for everything and no weight tying
    (Press and Wolf, 2017). ``stable``: the embedding is a StableEmbedding.

    Dropout is on the input, between layers and on the output, not on the recurrence.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, streams: int, tied: bool, dropout: float, stable: bool = False
    ) -> None:
        super().__init__(2, layers, streams, width)
        self.embedding = StableEmbedding(vocabulary, width) if stable else nn.Embedding(vocabulary, width)
        self.lstm = StackedLSTM(width, width, layers, dropout)
        self.output = nn.Linear(width, vocabulary)
        self.dropout = nn.Dropout(dropout)
        if not stable:
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        if tied:
            self.output.weight = self.embedding.weight
        else:
            nn.init.uniform_(self.output.weight, -0.1, 0.1)

    def unroll(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (T, B, V) after each of ``tokens`` (T, B), from ``state`` (2, layers, B, width); and the
        state at the end."""
        x = self.dropout(self.embedding(tokens))
        y, end = self.lstm(x, state)
        return self.output(self.dropout(y)), end

    def forward(self, tokens: Tensor, reset: Tensor) -> Tensor:
        """Logits (T, streams, V), continuing from the carried state, or from zeros where ``reset`` is true."""
        logits, end = self.unroll(tokens, self.start(reset))
        self.keep(end)
        return logits


class AdaptiveLSTM(Carrying):
    """Embedding, LSTM and adaptive softmax (Grave et al. 2017) for a large vocabulary, most frequent words first.

    The words before the first cut-off, and a word for each cluster behind it, are one softmax of all ``width``
    features; cluster i, between cut-offs i and i + 1, is a softmax of width / 4^(i+1) features. The carried state
    is (2, layers, streams, width). Dropout is on the input, between layers and on the output.

    Initialisation: embedding uniform in ±0.1, everything else torch's default.

    The loss waits for the device: how many words each cluster has is not known beforehand.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        width: int,
        layers: int,
        streams: int,
        cutoffs: tuple[int, ...],
        dropout: float,
    ) -> None:
        super().__init__(2, layers, streams, width)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.lstm = StackedLSTM(embedding, width, layers, dropout)
        self.output = nn.AdaptiveLogSoftmaxWithLoss(width, vocabulary, list(cutoffs))
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def unroll(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Features (T, B, width) after each of ``tokens`` (T, B), from ``state``; and the state at the end."""
        y, end = self.lstm(self.dropout(self.embedding(tokens)), state)
        return self.dropout(y), end

    def forward(self, tokens: Tensor, reset: Tensor) -> Tensor:
        """Features (T, streams, width), continuing from the carried state, or from zeros where ``reset`` is true."""
        features, end = self.unroll(tokens, self.start(reset))
        self.keep(end)
        return features
