"""The Transformer of Vaswani et al. (2017), with LayerNorm after (post-LN) or before (pre-LN) a sublayer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.embedding import StableEmbedding


class Past:
    """What a decoder remembers of the tokens it has read, so that it reads each of them once.

    Attributes:
        length: how many they are.
        kept: keys and values (N, heads, S, width / heads) of every attention: of these tokens, or of the memory.
    """

    def __init__(self) -> None:
        self.length = 0
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.kept = {attention: (k[rows], v[rows]) for attention, (k, v) in self.kept.items()}


class Attention(nn.Module):
    """Multi-head attention of queries x (N, T, width) over ``source`` (N, S, width), or over x itself.

    ``mask`` is boolean, broadcast to (N, heads, T, S), true where attention is allowed. ``causal``: position
    t sees positions up to t. ``past``: x itself is the one token after those that were read with it (T = 1);
    a ``source`` is looked at only the first time.

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
        self,
        x: Tensor,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        past: Past | None = None,
    ) -> Tensor:
        n, t, width = x.shape
        q = self.query(x).view(n, t, self.heads, -1).transpose(1, 2)
        kept = None if past is None else past.kept.get(self)
        if kept is None or source is None:
            read = x if source is None else source
            k, v = self.key_value(read).view(n, read.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            if kept is not None:
                k, v = torch.cat((kept[0], k), dim=2), torch.cat((kept[1], v), dim=2)
        else:
            k, v = kept
        if past is not None:
            past.kept[self] = k, v
        dropout = self.dropout if self.training else 0.0
        # The token after those that were read sees all of them.
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and kept is None)
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
        self,
        x: Tensor,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        past: Past | None = None,
    ) -> Tensor:
        y = self.norm(x) if self.pre_ln else x
        # Only attention looks at other positions.
        y = self.sublayer(y) if isinstance(self.sublayer, FeedForward) else self.sublayer(y, source, mask, causal, past)
        x = x + self.dropout(y)
        if not self.pre_ln:
            x = self.norm(x)
        return x


class Stack(nn.Module):
    """``layers`` layers of self-attention, attention to a memory if ``cross``, and a feed-forward network.

    With ``cross`` it is a decoder, without it an encoder, or a decoder-only language model if called with
    ``causal=True``. A pre-LN stack ends in one more LayerNorm, as otherwise its output was never normalised.

    ``dropout`` is that of every sublayer's output, ``inner_dropout`` that of the attention weights and inside the
    feed-forward networks; None: the same.
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
        inner_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.cross = cross
        self.layers = nn.ModuleList()
        inner = dropout if inner_dropout is None else inner_dropout
        for _ in range(layers):
            sublayers: list[nn.Module] = [Attention(width, heads, inner) for _ in range(1 + cross)]
            sublayers.append(FeedForward(width, hidden, inner))
            self.layers.append(nn.ModuleList(Residual(f, width, dropout, pre_ln) for f in sublayers))
        self.norm: nn.Module = nn.LayerNorm(width) if pre_ln else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            x = layer[0](x, None, mask, causal, past)
            if self.cross:
                x = layer[1](x, memory, memory_mask, past=past)
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

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        x = self.scale * self.tokens(tokens) + self.positions[start : start + tokens.shape[1]]
        y: Tensor = self.dropout(x)
        return y


class Translator(nn.Module):
    """Encoder and decoder over one shared vocabulary, with one embedding for source and target.

    ``tied``: the output shares it too, as in the paper; else the output is Xavier uniform. No output bias.
    Sources and targets are (N, S) and (N, T) padded with ``padding``; logits are (N, T, vocabulary). Targets
    must be padded on the right: causality then hides the padding. ``dropout`` also on the sums of embedding and
    position; ``inner_dropout`` as in Stack.
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
        inner_dropout: float | None = None,
        stable: bool = False,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.embedding = Embedding(vocabulary, width, length, dropout, stable)
        self.encoder = Stack(layers, width, heads, hidden, dropout, pre_ln, inner_dropout=inner_dropout)
        self.decoder = Stack(layers, width, heads, hidden, dropout, pre_ln, cross=True, inner_dropout=inner_dropout)
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.embedding.tokens.weight
        else:
            nn.init.xavier_uniform_(self.output.weight)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The memory (N, S, width) and where it may be attended to (N, 1, 1, S)."""
        mask = (source != self.padding)[:, None, None, :]
        return self.encoder(self.embedding(source), mask), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor, past: Past | None = None) -> Tensor:
        """The decoder's output (N, T, width), before the output layer.

        With ``past`` the target is the one token (N, 1) that follows what was decoded with it before.
        """
        x = self.embedding(target, 0 if past is None else past.length)
        x = self.decoder(x, causal=True, memory=memory, memory_mask=mask, past=past)
        if past is not None:
            past.length += target.shape[1]
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
