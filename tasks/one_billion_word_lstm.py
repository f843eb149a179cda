"""The One Billion Word benchmark with a large LSTM and an adaptive softmax, as in the RAdam paper."""

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks import text
from tasks.models.lstm import AdaptiveLSTM
from tasks.sources import find
from tasks.task import SCHEMA, Split, Task

HELD_OUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{}-of-00050"
FILES = {
    "train": "training-monolingual.tokenized.shuffled/news.en-*-of-00100",
    "validation": HELD_OUT.format(1),
    "test": HELD_OUT.format(0),
}


@dataclass(config=SCHEMA)
class OneBillionWordLSTM(Task):
    """Predict the next word of shuffled sentences of news (Chelba et al. 2014, arXiv 1312.3005).

    Put the two folders of the authors' archive (training- and heldout-monolingual.tokenized.shuffled) into the
    folder ``one_billion_word`` of the data root. Its 99 training files make some 0.8e9 tokens with an <eos> a
    line, which take 3.2 GB on the device (and twice that in memory, the one time that the files are read). As usual
    the first of the 50 held-out files is the test split; the second is the validation split.

    The settings are those of Liu et al. (2020, arXiv 1908.03265), who train 14 epochs of some 312,000 batches with
    Adam's rate .001, divided by 10 at the tenth, and the gradient's norm clipped at 5 (``lr``, ``decay`` and
    ``clip_norm`` of a run). Initialisation and where the dropout is are torch's and ours.

    An epoch reads the training text, as a circle, from a seeded place on, as ``batch_size`` streams side by side;
    the state is carried from batch to batch and zero at the beginning of an epoch.

    Metric: ``loss``, nats per token of the whole split (lower is better); also ``perplexity``, its exponential.
    Evaluation reads a split as 10 contiguous streams with a carried state, each from zero; every token is
    predicted once, the first one after an <eos>. A uniform prediction is one of the adaptive softmax: all words and
    clusters of its head, and all words of a cluster, are equally likely.

    Fields:
        batch_size: streams.
        bptt: time steps of a batch, after which the gradient is cut.
        layers: of the LSTM.
        embedding: width of the embedding.
        width: of the LSTM.
        cutoffs: of the adaptive softmax, in words by their frequency; must be fewer than the vocabulary has.
        dropout: on the input, between layers, and on the output.
        min_count: times a word must appear in the training split to be in the vocabulary; else it is <unk>.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    steps: ClassVar[int] = 4_370_000

    batch_size: int = Field(default=128, ge=1)
    bptt: int = Field(default=20, ge=1)
    layers: int = Field(default=2, ge=1)
    embedding: int = Field(default=300, ge=1)
    width: int = Field(default=2048, ge=1)
    cutoffs: Annotated[tuple[Annotated[int, Field(ge=1, strict=True)], ...], Field(strict=False, min_length=1)] = (
        4_000,
        40_000,
        200_000,
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)
    min_count: int = Field(default=4, ge=1)

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        self.device = device
        self.text = text.load(find("one_billion_word", data_root, FILES), device, self.min_count)
        self.uniform = text.uniform_loss(self.text.counts, self.cutoffs)
        next(self.batches(0))  # raises if the streams do not fit

    def fingerprint(self) -> str:
        return self.text.digest

    def model(self) -> nn.Module:
        model = AdaptiveLSTM(
            len(self.text.words),
            self.embedding,
            self.width,
            self.layers,
            self.batch_size,
            self.cutoffs,
            self.dropout,
        )
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[text.Batch]:
        return text.unrolled(self.text.splits["train"], self.batch_size, self.bptt, seed, start)

    def loss(self, model: nn.Module, batch: text.Batch) -> Tensor:
        """Mean over the batch, from the carried state; in training mode the state moves on."""
        assert isinstance(model.output, nn.Module)
        return text.nll(model.output, model(batch.tokens, batch.reset), batch.targets) / batch.targets.numel()

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        assert isinstance(model, AdaptiveLSTM)

        def score(tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            features, state = model.unroll(tokens, state)
            return text.nll(model.output, features, targets), state

        return text.evaluate(model, self.text.splits[split], self.text.words.index(text.END), score)

    @property
    def worst(self) -> float:
        return self.uniform

    @property
    def initial_loss(self) -> float:
        return self.uniform
