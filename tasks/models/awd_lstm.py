"""The AWD-LSTM of Merity et al. (2018): an LSTM language model that is regularised everywhere."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.lstm import Carrying, in_own_precision


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of x (T, B, width) with one mask (B, width) for all time steps (variational dropout)."""
    return x * F.dropout(torch.ones_like(x[0]), p, training) if training and p else x


def embedding_dropout(weight: Tensor, p: float, training: bool) -> Tensor:
    """The embedding (V, width) with whole words dropped: all occurrences of a word in a batch, or none."""
    return weight * F.dropout(torch.ones_like(weight[:, :1]), p, training) if training and p else weight


class WeightDropLSTM(nn.Module):
    """One LSTM layer with DropConnect on its hidden-to-hidden weights: one mask for all time steps and streams.

    Maps x (T, B, inputs) and a state, hidden and cell (B, width), to y (T, B, width) and the state at the end.
    Initialisation: everything uniform in ±1/√width, torch's default.
    """

    def __init__(self, inputs: int, width: int, weight_drop: float) -> None:
        super().__init__()
        self.weight_drop = weight_drop
        self.weight_ih = nn.Parameter(torch.empty(4 * width, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih = nn.Parameter(torch.empty(4 * width))
        self.bias_hh = nn.Parameter(torch.empty(4 * width))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dropped = F.dropout(self.weight_hh, self.weight_drop, self.training)
        weights = (self.weight_ih, dropped, self.bias_ih, self.bias_hh)
        # cuDNN warns unless they are one piece of memory, in this order.
        sizes = [weight.numel() for weight in weights]
        pieces = torch.cat([weight.flatten() for weight in weights]).split(sizes)
        views = [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)]

        def over(x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.lstm(
                x, state, views, True, 1, 0.0, self.training, False, False
            )  # biases, layers, dropout, training, bidirectional, batch first

        y, hidden, cell = in_own_precision(over, dropped, x, hidden[None], cell[None])
        return y, hidden[0], cell[0]


class AWDLSTM(Carrying):
    """Embedding, LSTM layers of ``widths``, softmax.

    Dropout, as in the authors' code: of words (``dropout_embedding``), of the input (``dropout_input``), between
    layers (``dropout_hidden``) and of the output (``dropout``), each locked over time; and of the hidden-to-hidden
    weights (``weight_drop``). ``tied``: the output is the embedding without its dropout, and the last width must
    be that of the embedding. The carried state is (2, streams, sum of widths), the hidden and the cell state of
    all layers side by side.

    Initialisation as in the authors' code: embedding and output uniform in ±0.1, output bias 0.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        widths: Sequence[int],
        streams: int,
        tied: bool,
        dropout: float = 0.0,
        dropout_input: float = 0.0,
        dropout_hidden: float = 0.0,
        dropout_embedding: float = 0.0,
        weight_drop: float = 0.0,
    ) -> None:
        super().__init__(2, streams, sum(widths))
        self.widths = list(widths)
        self.dropout, self.dropout_input = dropout, dropout_input
        self.dropout_hidden, self.dropout_embedding = dropout_hidden, dropout_embedding
        self.embedding = nn.Embedding(vocabulary, embedding)
        inputs = [embedding, *widths[:-1]]
        self.layers = nn.ModuleList(
            WeightDropLSTM(i, width, weight_drop) for i, width in zip(inputs, widths, strict=True)
        )
        self.output = nn.Linear(widths[-1], vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        if tied:
            self.output.weight = self.embedding.weight
        else:
            nn.init.uniform_(self.output.weight, -0.1, 0.1)

    def unroll(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the last layer gives (T, B, width) after each of ``tokens`` (T, B), from ``state``
        (2, B, sum of widths); the same after dropout; and the state at the end."""
        weight = embedding_dropout(self.embedding.weight, self.dropout_embedding, self.training)
        x = locked_dropout(F.embedding(tokens, weight), self.dropout_input, self.training)
        ends, raw = [], x
        for i, layer in enumerate(self.layers):
            hidden, cell = (part.split(self.widths, dim=-1)[i].contiguous() for part in state)
            raw, *end = layer(x, hidden, cell)
            ends.append(torch.stack(end))
            last = i == len(self.layers) - 1
            x = locked_dropout(raw, self.dropout if last else self.dropout_hidden, self.training)
        return raw, x, torch.cat(ends, dim=-1)

    def forward(self, tokens: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's output (T, streams, width) before and after dropout, continuing from the carried state,
        or from zeros where ``reset`` is true; ``output`` makes logits of the latter."""
        raw, dropped, end = self.unroll(tokens, self.start(reset))
        self.keep(end)
        return raw, dropped
