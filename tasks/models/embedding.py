"""The stable embedding of Dettmers et al. (2022)."""

from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """Embedding with LayerNorm after it, for optimizers whose state has 8 bits.

    Initialisation Xavier uniform. The output has a variance of about one from the start on and whatever the
    weights become. The weights are marked ``full_precision_state``: an optimizer with 8-bit state keeps theirs
    in 32 bits, for rare words have large and rare gradients. A weight tied to it is the same and so marked, too.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        nn.init.xavier_uniform_(self.weight)
        self.weight.full_precision_state = True  # type: ignore[attr-defined]
        self.norm = nn.LayerNorm(width)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.norm(super().forward(input))
        return y
