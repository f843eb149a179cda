"""A word-level language model of Python's own documentation: the embedded recurrent task."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import to_device
from tasks.models.lstm import LSTMLanguageModel
from tasks.task import SCHEMA, Split, Task, digest
from tasks.text import END, UNKNOWN, Batch, evaluate, unrolled

HELD_OUT = 0.1  # at most this share of the text in the validation split, and again in the test split
REPEAT = 8  # a paragraph of so many tokens that was seen before is a copy, a shorter one may be chance
STREAMS = 16  # in evaluation


@dataclass(config=SCHEMA)
class PydocsLSTM(Task):
    """Predict the next word of the documentation topics of the Python standard library
    (``pydoc_data.topics``, PSF licence; what ``help("with")`` prints) with an LSTM.

    The topics repeat each other (``compound`` contains ``for``). A paragraph is kept where it first appears,
    a topic that keeps less than half of its text is dropped, and whole topics make the splits, chosen by a
    hash of their names. With Python 3.11.7: 61,022 tokens train, 7565 validation, 7603 test, and a
    vocabulary of 1546. The text differs between versions of Python, and with it the fingerprint: results are
    comparable within one version.

    Words are lower case, punctuation marks are words, a paragraph ends in <eos>; words that the training
    split has fewer than ``min_count`` times are <unk>. An epoch reads the training text, as a circle, from a
    seeded place on, as ``batch_size`` streams side by side; the state is carried from batch to batch and
    zero at the beginning of an epoch. This is not Penn Treebank (930,000 tokens, 10,000 words); a smaller,
    more regular text, on which perplexities are lower.

    Metric: ``loss``, nats per token of the whole split (lower is better); also ``perplexity``, its
    exponential. Evaluation reads a split as 16 contiguous streams, each from a zero state.

    Fields:
        batch_size: streams.
        bptt: time steps of a batch, after which the gradient is cut.
        width: of embedding and LSTM.
        layers: of the LSTM.
        dropout: on the input, between layers, and on the output.
        tied: embedding and output share their weights.
        min_count: times a word must appear in the training split to be in the vocabulary.
        stable_embedding: LayerNorm after the embedding, for 8-bit optimizers: tasks/models/embedding.py.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    steps: ClassVar[int] = 300
    later: ClassVar[tuple[str, ...]] = ("stable_embedding",)

    batch_size: int = Field(default=20, ge=1)
    bptt: int = Field(default=25, ge=1)
    width: int = Field(default=96, ge=1)
    layers: int = Field(default=1, ge=1, le=2)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    tied: bool = True
    min_count: int = Field(default=3, ge=1)
    stable_embedding: bool = False

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        vocabulary, splits = encode(self.min_count)
        self.device, self.words = device, vocabulary
        self.digest = digest("\n".join(vocabulary), *splits.values())
        self.data = {name: to_device(tokens, device) for name, tokens in splits.items()}
        self.per_epoch = (len(self.data["train"]) // self.batch_size - 1) // self.bptt
        next(self.batches(0))  # raises if the streams do not fit

    def fingerprint(self) -> str:
        return self.digest

    def model(self) -> nn.Module:
        shape = (len(self.words), self.width, self.layers, self.batch_size)
        model = LSTMLanguageModel(*shape, self.tied, self.dropout, self.stable_embedding)
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        return unrolled(self.data["train"], self.batch_size, self.bptt, seed, start)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch, from the carried state; in training mode the state moves on."""
        logits = model(batch.tokens, batch.reset)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        assert isinstance(model, LSTMLanguageModel)

        def score(tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            logits, state = model.unroll(tokens, state)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), state

        # Every token is predicted once: the first of the split after an <eos>.
        return evaluate(model, self.data[split], self.words.index(END), score, STREAMS)

    @property
    def worst(self) -> float:
        return math.log(len(self.words))

    @property
    def initial_loss(self) -> float:
        return math.log(len(self.words))


def paragraphs(text: str) -> list[tuple[str, ...]]:
    """The tokens of each paragraph; the rules under headings and in tables are left out."""
    text = re.sub(r"^[ *=~^+|-]{3,}$", "", text, flags=re.MULTILINE)
    found = (tuple(re.findall(r"\w+|[^\w\s]", part.lower())) for part in re.split(r"\n\s*\n", text))
    return [part for part in found if part]


@cache
def read() -> dict[Split, list[str]]:
    """The tokens of the three splits, without a paragraph in two of them."""
    from pydoc_data.topics import topics

    seen: set[tuple[str, ...]] = set()
    texts: dict[str, list[str]] = {}
    for name in sorted(topics):
        parts = paragraphs(topics[name])
        fresh = [part for part in dict.fromkeys(parts) if len(part) < REPEAT or part not in seen]
        seen.update(parts)
        if 2 * sum(map(len, fresh)) >= sum(map(len, parts)):
            texts[name] = [token for part in fresh for token in (*part, END)]
    limit = HELD_OUT * sum(map(len, texts.values()))
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    held_out: tuple[Split, ...] = ("validation", "test")
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        fitting = (split for split in held_out if len(splits[split]) + len(texts[name]) <= limit)
        splits[next(fitting, "train")] += texts[name]
    return splits


@cache
def encode(min_count: int) -> tuple[list[str], dict[Split, Tensor]]:
    """The vocabulary, most frequent words first, and the splits as numbers."""
    splits = read()
    counts = Counter(splits["train"])
    frequent = sorted((w for w in counts if counts[w] >= min_count and w != END), key=lambda w: (-counts[w], w))
    vocabulary = [UNKNOWN, END, *frequent]
    index = {word: i for i, word in enumerate(vocabulary)}
    return vocabulary, {name: torch.tensor([index.get(word, 0) for word in words]) for name, words in splits.items()}
