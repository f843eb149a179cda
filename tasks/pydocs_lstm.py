"""A word-level language model of Python's own documentation: the embedded recurrent task."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import evaluating, to_device
from tasks.models.lstm import LSTMLanguageModel
from tasks.task import SCHEMA, Split, Task, digest, generator

UNKNOWN, END = "<unk>", "<eos>"
HELD_OUT = 0.1  # at most this share of the text in the validation split, and again in the test split
REPEAT = 8  # a paragraph of so many tokens that was seen before is a copy, a shorter one may be chance
STREAMS = 16  # in evaluation
CHUNK = 64  # time steps in evaluation: bounds the memory of the logits


class Batch(NamedTuple):
    """Tokens (bptt, batch_size), the tokens that follow, and whether an epoch begins (boolean scalar)."""

    tokens: Tensor
    targets: Tensor
    reset: Tensor


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
        size = len(self.data["train"])
        # The last token of a stream is only a target.
        self.per_epoch = (size // self.batch_size - 1) // self.bptt
        if self.per_epoch < 1:
            raise ValueError(
                f"batch_size={self.batch_size} streams of bptt={self.bptt} do not fit {size} training tokens"
            )
        streams = torch.arange(self.batch_size, device=device) * (size // self.batch_size)
        self.grid = torch.arange(self.bptt + 1, device=device)[:, None] + streams
        self.resets = (
            torch.zeros((), dtype=torch.bool, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )

    def fingerprint(self) -> str:
        return self.digest

    def model(self) -> nn.Module:
        shape = (len(self.words), self.width, self.layers, self.batch_size)
        model = LSTMLanguageModel(*shape, self.tied, self.dropout, self.stable_embedding)
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        text = self.data["train"]
        epoch, first = divmod(start, self.per_epoch)
        while True:
            # Where the epoch begins to read: otherwise every epoch of every seed had the same batches.
            offset = int(torch.randint(len(text), (), generator=generator(seed, epoch)))
            for i in range(first, self.per_epoch):
                window = text[(self.grid + (offset + i * self.bptt)) % len(text)]
                yield Batch(window[:-1], window[1:], self.resets[i == 0])
            epoch, first = epoch + 1, 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch, from the carried state; in training mode the state moves on."""
        logits = model(batch.tokens, batch.reset)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        text = self.data[split]
        # Every token is predicted once: the first of the split after an <eos>.
        tokens = torch.cat((text.new_full((1,), self.words.index(END)), text[:-1]))
        length = math.ceil(len(text) / STREAMS)
        short = STREAMS * length - len(text)
        tokens = F.pad(tokens, (0, short)).view(STREAMS, length).T
        targets = F.pad(text, (0, short), value=-100).view(STREAMS, length).T
        carried = model.carried
        assert isinstance(carried, Tensor) and callable(model.unroll)
        with evaluating(model):
            state = carried.new_zeros(2, carried.shape[1], STREAMS, carried.shape[3])
            total = torch.zeros((), dtype=torch.float64, device=text.device)
            for x, y in zip(tokens.split(CHUNK), targets.split(CHUNK), strict=True):
                logits, state = model.unroll(x, state)
                total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
            loss = total / len(text)
            return {"loss": loss, "perplexity": loss.exp()}

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
