"""An LSTM language model that carries its state from batch to batch."""

import torch
from torch import Tensor, nn

from tasks.models.embedding import StableEmbedding


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM, softmax, all of one width, as in Zaremba et al. (2014).

    Truncated backpropagation through time needs the state at the end of the last batch. It is the buffer
    ``carried`` (2, layers, streams, width), the hidden and the cell state, so that a checkpoint of the
    ``state_dict`` resumes exactly.

    Initialisation: all weights and biases of the LSTM uniform in ±1/√width (torch's default), embedding and
    output uniform in ±0.1, output bias 0. Zaremba et al. use one range for everything and no weight tying
    (Press and Wolf, 2017). ``stable``: the embedding is a StableEmbedding.

    Dropout is on the input, between layers and on the output, not on the recurrence.
    """

    carried: Tensor

    def __init__(
        self, vocabulary: int, width: int, layers: int, streams: int, tied: bool, dropout: float, stable: bool = False
    ) -> None:
        super().__init__()
        self.embedding = StableEmbedding(vocabulary, width) if stable else nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout if layers > 1 else 0.0)
        self.output = nn.Linear(width, vocabulary)
        self.dropout = nn.Dropout(dropout)
        if not stable:
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        if tied:
            self.output.weight = self.embedding.weight
        else:
            nn.init.uniform_(self.output.weight, -0.1, 0.1)
        self.register_buffer("carried", torch.zeros(2, layers, streams, width))

    def unroll(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (T, B, V) after each of ``tokens`` (T, B), from ``state`` (2, layers, B, width); and the
        state at the end."""
        x = self.dropout(self.embedding(tokens))
        y, (hidden, cell) = self.lstm(x, (state[0], state[1]))
        return self.output(self.dropout(y)), torch.stack((hidden, cell))

    def forward(self, tokens: Tensor, reset: Tensor) -> Tensor:
        """Logits (T, streams, V), continuing from the carried state, or from zeros where ``reset`` (a boolean
        scalar) is true. In training mode the carried state moves on, without its gradient: so a second pass
        over the same batch starts elsewhere."""
        # A new tensor: backward needs the state that the copy below overwrites.
        state = torch.where(reset, torch.zeros_like(self.carried), self.carried)
        logits, end = self.unroll(tokens, state)
        if self.training:
            self.carried.copy_(end.detach())
        return logits
