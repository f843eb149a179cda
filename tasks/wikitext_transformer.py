"""WikiText, word by word, with a decoder-only Transformer."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks import text
from tasks.common import evaluating, shuffled
from tasks.models.transformer_lm import TransformerLM
from tasks.sources import Hub, fetch
from tasks.task import SCHEMA, Split, Task, generator

FILES = {"train": "*train*", "validation": "*valid*", "test": "*test*"}
NAMES = {"wikitext2": "wikitext-2-v1", "wikitext103": "wikitext-103-v1"}
SHA256: dict[str, dict[str, str]] = {
    "wikitext2": {
        "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    },
    "wikitext103": {},
}
HUB = {
    corpus: Hub(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {split: split for split in FILES},
        lambda row: row["text"] or " \n",  # the hub has no line break where nothing stands before it
        {"name": name},
        SHA256[corpus],
    )
    for corpus, name in NAMES.items()
}
CHUNK = 1024  # tokens in evaluation: bounds the memory of the logits


class Batch(NamedTuple):
    """Tokens (batch_size, context) and the tokens that follow."""

    tokens: Tensor
    targets: Tensor


@dataclass(config=SCHEMA)
class WikitextTransformer(Task):
    """Predict the next word of Wikipedia articles (Merity et al. 2017, arXiv 1609.07843), word level.

    WikiText-2 (folder ``wikitext2``) has 2,088,628 tokens train, 217,646 validation, 245,569 test with an <eos> a
    line, and 33,278 words; WikiText-103 (folder ``wikitext103``) the same held-out articles, 103 million tokens and
    267,735 words: with it, set ``cutoffs`` as Baevski and Auli (2019, arXiv 1809.10853) do, [20000, 60000].

    An epoch cuts the training text, as a circle and from a seeded place on, into pieces of ``context`` tokens and
    shuffles them; each is predicted from its own words alone.

    Metric: ``loss``, nats per word of the whole split (lower is better); also ``perplexity``, its exponential.
    Evaluation predicts every token once, the first of the split after an <eos>. The windows of ``context`` tokens
    do not overlap, so that the first words of each have little to go by; with a ``stride`` a window begins that
    many tokens after the one before, and predicts only what that one has not (a lower loss, and slower).

    Fields:
        corpus: wikitext2 or wikitext103.
        batch_size: pieces of text.
        context: tokens of a piece.
        layers: of the Transformer.
        width: of the embedding and of every layer.
        heads: of attention.
        hidden: width inside the feed-forward layers.
        dropout: on embedded words, attention weights, inside feed-forward layers, and at the end of each sublayer.
        pre_ln: LayerNorm before each sublayer, not after it.
        tied: embedding and output share their weights.
        cutoffs: of an adaptive softmax, in words by their frequency; none: an ordinary softmax. Its loss waits for
            the device.
        stride: tokens between windows of evaluation; null: ``context``.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    steps: ClassVar[int] = 20_000

    corpus: Literal["wikitext2", "wikitext103"] = "wikitext2"
    batch_size: int = Field(default=16, ge=1)
    context: int = Field(default=256, ge=1)
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=256, ge=2)
    heads: int = Field(default=4, ge=1)
    hidden: int = Field(default=1024, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    pre_ln: bool = False
    tied: bool = True
    cutoffs: Annotated[tuple[Annotated[int, Field(ge=1, strict=True)], ...], Field(strict=False)] = ()
    stride: Annotated[int, Field(ge=1)] | None = None

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        if self.stride is not None and self.stride > self.context:
            raise ValueError(f"stride={self.stride} is more than context={self.context}: tokens would be left out")
        self.device = device
        self.text = text.load(fetch(self.corpus, data_root, FILES, HUB[self.corpus]), device)
        self.uniform = text.uniform_loss(self.text.counts, self.cutoffs)
        next(self.batches(0))  # raises if a batch does not fit

    def fingerprint(self) -> str:
        return self.text.digest

    def model(self) -> nn.Module:
        model = TransformerLM(
            len(self.text.words),
            self.layers,
            self.width,
            self.heads,
            self.hidden,
            self.context,
            self.dropout,
            self.pre_ln,
            self.tied,
            self.cutoffs,
        )
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        train = self.text.splits["train"]
        piece = torch.arange(self.context + 1, device=self.device)
        for epoch, order in shuffled(len(train) // self.context, self.batch_size, seed, start, self.device):
            offset = int(torch.randint(len(train), (), generator=generator(seed, epoch, 1)))
            window = train[(offset + order[:, None] * self.context + piece) % len(train)].long()
            yield Batch(window[:, :-1], window[:, 1:])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model.output, nn.Module)
        return text.nll(model.output, model(batch.tokens), batch.targets) / batch.targets.numel()

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        targets = self.text.splits[split]
        tokens = torch.cat((targets.new_full((1,), self.text.words.index(text.END)), targets[:-1]))
        size, stride = len(targets), self.stride or self.context
        assert isinstance(model.output, nn.Module)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        piece = torch.arange(self.context, device=self.device)
        # The last window is the first that reaches the end.
        starts = torch.arange(0, max(size - self.context, 0) + stride, stride, device=self.device)
        with evaluating(model):
            for start in starts.split(max(1, CHUNK // self.context)):
                at = start[:, None] + piece
                fresh = (at < size) & ((start[:, None] == 0) | (piece >= self.context - stride))
                at = at.clamp(max=size - 1)
                y = torch.where(fresh, targets[at].long(), -100)
                total += text.nll(model.output, model(tokens[at].long()), y)
            loss = total / size
            return {"loss": loss, "perplexity": loss.exp()}

    @property
    def worst(self) -> float:
        return self.uniform

    @property
    def initial_loss(self) -> float:
        return self.uniform
