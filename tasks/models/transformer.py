"""The Transformer of Vaswani et al. (2017), with LayerNorm after (post-LN) or before (pre-LN) a sublayer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.embedding import StableEmbedding


class Attention(nn.Module):
    """Multi-head attention of queries x (N, T, width) over ``source`` (N, S, width), or over x itself.

    ``mask`` is boolean, broadcast to (N, heads, T, S), true where attention is allowed. ``causal``: position
    t sees positions up to t.

    Initialisation as in fairseq: Xavier uniform, with gain 1/√2 for queries, keys and values (which is what
    Xavier gives for the three as one matrix), biases 0.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        for weight in (self.query.weight, *self.key_value.weight.chunk(2)):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.output.weight)
        for linear in (self.query, self.key_value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        source = x if source is None else source
        n, t, width = x.shape
        q = self.query(x).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(source).view(n, source.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        output: Tensor = self.output(y.transpose(1, 2).reshape(n, t, width))
        return output


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear; Xavier uniform, biases 0."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        for module in self:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


class Residual(nn.Module):
    """One sublayer f with its shortcut: LN(x + f(x)), or x + f(LN(x)) if ``pre_ln``."""

    def __init__(self, sublayer: nn.Module, width: int, dropout: float, pre_ln: bool) -> None:
        super().__init__()
        self.sublayer, self.norm = sublayer, nn.LayerNorm(width)
        self.dropout, self.pre_ln = nn.Dropout(dropout), pre_ln

    def forward(
        self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        y = self.norm(x) if self.pre_ln else x
        # Only attention looks at other positions.
        y = self.sublayer(y) if isinstance(self.sublayer, FeedForward) else self.sublayer(y, source, mask, causal)
        x = x + self.dropout(y)
        if not self.pre_ln:
            x = self.norm(x)
        return x


class Stack(nn.Module):
    """``layers`` layers of self-attention, attention to a memory if ``cross``, and a feed-forward network.

    With ``cross`` it is a decoder, without it an encoder, or a decoder-only language model if called with
    ``causal=True``. A pre-LN stack ends in one more LayerNorm, as otherwise its output was never normalised.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        pre_ln: bool,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.cross = cross
        self.layers = nn.ModuleList()
        for _ in range(layers):
            sublayers: list[nn.Module] = [Attention(width, heads, dropout) for _ in range(1 + cross)]
            sublayers.append(FeedForward(width, hidden, dropout))
            self.layers.append(nn.ModuleList(Residual(f, width, dropout, pre_ln) for f in sublayers))
        self.norm: nn.Module = nn.LayerNorm(width) if pre_ln else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            x = layer[0](x, None, mask, causal)
            if self.cross:
                x = layer[1](x, memory, memory_mask)
            x = layer[-1](x)
        output: Tensor = self.norm(x)
        return output


class Embedding(nn.Module):
    """√width times the embedding, plus sines and cosines of the position.

    Initialisation normal with variance 1/width, as in fairseq. The sinusoids are in fairseq's order: all
    sines, then all cosines (the paper has them alternate; the weights learn either). ``stable``: a
    StableEmbedding, whose variance is one already, in place of √width times the embedding.
    """

    positions: Tensor

    def __init__(self, vocabulary: int, width: int, length: int, dropout: float, stable: bool = False) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width={width} is odd: positions need as many sines as cosines")
        self.tokens = StableEmbedding(vocabulary, width) if stable else nn.Embedding(vocabulary, width)
        if not stable:
            nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.scale, self.dropout = 1.0 if stable else math.sqrt(width), nn.Dropout(dropout)
        rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
        positions = torch.cat((angles.sin(), angles.cos()), dim=1).float()
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.scale * self.tokens(tokens) + self.positions[: tokens.shape[1]]
        y: Tensor = self.dropout(x)
        return y


class Translator(nn.Module):
    """Encoder and decoder over one shared vocabulary, with one embedding for source and target.

    ``tied``: the output shares it too, as in the paper; else the output is Xavier uniform. No output bias.
    Sources and targets are (N, S) and (N, T) padded with ``padding``; logits are (N, T, vocabulary). Targets
    must be padded on the right: causality then hides the padding.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int,
        width: int,
        heads: int,
        hidden: int,
        length: int,
        dropout: float = 0.0,
        pre_ln: bool = False,
        tied: bool = True,
        padding: int = 0,
        stable: bool = False,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.embedding = Embedding(vocabulary, width, length, dropout, stable)
        self.encoder = Stack(layers, width, heads, hidden, dropout, pre_ln)
        self.decoder = Stack(layers, width, heads, hidden, dropout, pre_ln, cross=True)
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.tokens.weight
        else:
            nn.init.xavier_uniform_(self.output.weight)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The memory (N, S, width) and where it may be attended to (N, 1, 1, S)."""
        mask = (source != self.padding)[:, None, None, :]
        return self.encoder(self.embedding(source), mask), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """The decoder's output (N, T, width), before the output layer."""
        x: Tensor = self.decoder(self.embedding(target), causal=True, memory=memory, memory_mask=mask)
        return x

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = self.output(self.decode(target, *self.encode(source)))
        return logits

    @torch.no_grad()
    def greedy(self, source: Tensor, begin: int, end: int, length: int) -> Tensor:
        """The most likely next token, again and again: (N, at most ``length``) tokens without ``begin``,
        padded after ``end``."""
        memory, mask = self.encode(source)
        tokens = source.new_full((len(source), 1), begin)
        open_ = torch.ones_like(tokens[:, 0], dtype=torch.bool)
        for _ in range(length):
            logits = self.output(self.decode(tokens, memory, mask)[:, -1])
            following = torch.where(open_, logits.argmax(1), self.padding)
            tokens = torch.cat((tokens, following[:, None]), dim=1)
            open_ = open_ & (following != end)
            if not open_.any():
                break
        return tokens[:, 1:]
