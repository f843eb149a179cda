"""A decoder-only Transformer language model, with a plain or an adaptive softmax."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.transformer import Embedding, Stack


class AdaptiveEmbedding(nn.Module):
    """The weights of an adaptive softmax as embedding, projections included (Baevski and Auli, 2019).

    A word before the first cut-off is its row of the head; one of a later cluster its row there, of width / 4^i,
    times the cluster's projection.
    """

    def __init__(self, softmax: nn.AdaptiveLogSoftmaxWithLoss) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, tokens: Tensor) -> Tensor:
        first = self.softmax.cutoffs[0]
        x = F.embedding(tokens.clamp(max=first - 1), self.softmax.head.weight[:first])
        for (low, high), cluster in zip(pairwise(self.softmax.cutoffs), self.softmax.tail, strict=True):
            project, words = cluster.parameters()
            # Every word is looked up in every cluster: choosing them would wait for the device.
            rows = F.embedding((tokens - low).clamp(0, high - low - 1), words) @ project
            x = torch.where((tokens >= low)[..., None], rows, x)
        return x


class TransformerLM(nn.Module):
    """Embedding with sinusoidal positions, a causal stack, and an output without bias.

    Maps tokens (N, T) to features (N, T, width), of which ``output`` makes logits or, where there are ``cutoffs``,
    the loss of an adaptive softmax (whose clusters have width / 4, / 16, ... features). ``tied``: the embedding is
    the output's weights.

    Initialisation as in fairseq: a row of embedding or tied output normal with variance 1/its width, an untied
    output and projections Xavier uniform. A tied model begins by finding the word that it has just read likely, so
    that its first loss is above that of a uniform prediction (with cut-offs by more, the more words are in the
    clusters: their few features tell words apart less well).
    """

    output: nn.Linear | nn.AdaptiveLogSoftmaxWithLoss

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
        cutoffs: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, width, length, dropout)
        self.stack = Stack(layers, width, heads, hidden, dropout, pre_ln)
        if cutoffs:
            self.output = nn.AdaptiveLogSoftmaxWithLoss(width, vocabulary, list(cutoffs))
            for weight in self.output.parameters():
                nn.init.xavier_uniform_(weight)
            if tied:
                self.embedding.tokens = AdaptiveEmbedding(self.output)  # type: ignore[assignment]
                for words in (self.output.head, *(cluster[1] for cluster in self.output.tail)):  # type: ignore[index]
                    nn.init.normal_(words.weight, std=words.weight.shape[1] ** -0.5)
        else:
            self.output = nn.Linear(width, vocabulary, bias=False)
            if tied:
                self.output.weight = self.embedding.tokens.weight
            else:
                nn.init.xavier_uniform_(self.output.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        features: Tensor = self.stack(self.embedding(tokens), causal=True)
        return features
