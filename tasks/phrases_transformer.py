"""English to German phrases with a post-LN Transformer: the embedded translation task."""

import datetime
import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import sacrebleu
import torch
import torch.nn.functional as F
from babel import Locale, dates, lists, numbers, units
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import evaluating, shuffled, steps_per_epoch, to_device
from tasks.models.transformer import Translator
from tasks.task import SCHEMA, Split, Task, digest

PAD, BEGIN, END, UNKNOWN = range(4)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
LENGTH = 16  # tokens of a source, and of a target with its <eos>; longer phrases are left out
FREQUENT = 8  # times a word must appear in the training split to be one token
CHUNK = 256  # phrases at a time in evaluation


class Batch(NamedTuple):
    """Padded tokens, (N, 16) each: source, target shifted right (from <bos> on), target (up to <eos>)."""

    source: Tensor
    before: Tensor
    target: Tensor


class Pair(NamedTuple):
    """An English phrase and its German translation."""

    source: str
    target: str


@dataclass(config=SCHEMA)
class PhrasesTransformer(Task):
    """Translate English phrases into German with the Transformer of Vaswani et al. (2017), made narrow.

    Dates, times, periods, quantities with units, amounts of money, numbers, names of currencies, territories
    and languages, and lists of them, as the Unicode CLDR tables in Babel write them (Unicode License). Equal
    sources are one pair; a hash of the source decides its split, so no source phrase is in two:
    with Babel 2.18, 7242 train, 883 validation, 838 test. The phrases depend on the version of Babel, and
    with them the fingerprint.

    A token is a word that is frequent in the training split, a letter of any other word, a digit or a mark,
    with the space before it; source and target share the vocabulary. Every phrase is padded to 16
    tokens, so every batch has one shape. This is not WMT or IWSLT translation: the phrases are short and
    regular, and BLEU is far higher than on sentences.

    Metric: ``loss``, nats per target token (with <eos>) of the whole split, lower is better. Also, of greedy
    translations of the split's first ``decode`` phrases: ``exact_match`` (share of phrases that are right to
    the letter) and ``bleu`` (sacrebleu's corpus BLEU with its defaults, 0 to 100).

    Fields:
        batch_size: phrases a step; the remainder of an epoch is left out.
        layers: of the encoder, and of the decoder.
        width: of embedding and layers.
        heads: of every attention.
        hidden: width of the feed-forward networks.
        dropout: on embeddings, sublayers, attention weights and inside the feed-forward networks.
        pre_ln: LayerNorm before the sublayers, not after (which needs no warmup: Xiong et al., 2020).
        tied: the output layer shares the weights of the embedding.
        decode: phrases of a split to translate in an evaluation.
        stable_embedding: LayerNorm after the embedding, for 8-bit optimizers: tasks/models/embedding.py.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    steps: ClassVar[int] = 300
    later: ClassVar[tuple[str, ...]] = ("stable_embedding",)

    batch_size: int = Field(default=64, ge=1)
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=32, ge=2, multiple_of=2)
    heads: int = Field(default=2, ge=1)
    hidden: int = Field(default=128, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    pre_ln: bool = False
    tied: bool = True
    decode: int = Field(default=200, ge=1)
    stable_embedding: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        self.vocabulary, splits = encode()
        steps_per_epoch(len(splits["train"].source), self.batch_size)
        self.device = device
        parts = (tensor for split in splits.values() for tensor in (split.source, split.target))
        self.digest = digest("\n".join(self.vocabulary), *parts)
        self.data = {name: Batch(*(to_device(tensor, device) for tensor in split)) for name, split in splits.items()}

    def fingerprint(self) -> str:
        return self.digest

    def model(self) -> nn.Module:
        model = Translator(
            len(self.vocabulary),
            self.layers,
            self.width,
            self.heads,
            self.hidden,
            LENGTH,
            self.dropout,
            self.pre_ln,
            self.tied,
            padding=PAD,
            stable=self.stable_embedding,
        )
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        data = self.data["train"]
        for _, indices in shuffled(len(data.source), self.batch_size, seed, start, self.device):
            yield Batch(*(tensor[indices] for tensor in data))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.source, batch.before)
        return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=PAD)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        data = self.data[split]
        size = len(data.source)
        total = torch.zeros((), dtype=torch.float64, device=data.source.device)
        with evaluating(model):
            for i in range(0, size, CHUNK):
                part = Batch(*(tensor[i : i + CHUNK] for tensor in data))
                logits = model(part.source, part.before).flatten(0, 1)
                total += F.cross_entropy(logits, part.target.flatten(), ignore_index=PAD, reduction="sum")
            translated = self.translate(model, data.source[: self.decode])
        right = self.text(data.target[: self.decode])
        exact = sum(a == b for a, b in zip(translated, right, strict=True)) / len(right)
        bleu = sacrebleu.corpus_bleu(translated, [right]).score
        return {
            "loss": total / (data.target != PAD).sum(),
            "exact_match": total.new_tensor(exact),
            "bleu": total.new_tensor(bleu),
        }

    def translate(self, model: nn.Module, source: Tensor) -> list[str]:
        """Greedy translations, of at most 16 tokens, of sources (N, S)."""
        greedy = model.greedy
        assert callable(greedy)
        with evaluating(model):
            return self.text(greedy(source, BEGIN, END, LENGTH))

    def text(self, tokens: Tensor) -> list[str]:
        """The phrases of tokens (N, T), as far as their <eos>."""
        phrases = []
        for row in tokens.tolist():
            end = row.index(END) if END in row else len(row)
            phrases.append("".join(self.vocabulary[token] for token in row[:end] if token != PAD).strip())
        return phrases

    @property
    def worst(self) -> float:
        return math.log(len(self.vocabulary))

    @property
    def initial_loss(self) -> float:
        return math.log(len(self.vocabulary))


def phrases() -> Iterator[Pair]:
    """All pairs, with repetitions. The numbers in them are drawn with a fixed seed."""
    english, german = Locale.parse("en"), Locale.parse("de")
    draw = random.Random(0).randrange

    def both(write, *args, **options) -> Pair:  # type: ignore[no-untyped-def]
        return Pair(*(write(*args, **options, locale=locale) for locale in (english, german)))

    def number() -> float:
        whole = draw(10 ** (1 + draw(3)))
        return whole if draw(2) else whole + draw(1, 10) / 10

    names: dict[str, list[Pair]] = {}
    for kind in ("territories", "languages", "currencies"):
        table, other = getattr(english, kind), getattr(german, kind)
        names[kind] = [Pair(table[key], other[key]) for key in sorted(table) if key in other]
        yield from names[kind]
    for _ in range(1500):
        kind = ("territories", "languages")[draw(2)]
        few = [names[kind][draw(len(names[kind]))] for _ in range(2 + draw(2))]
        style: Literal["standard", "or"] = "or" if draw(2) else "standard"
        yield Pair(
            lists.format_list([pair.source for pair in few], style, english),
            lists.format_list([pair.target for pair in few], style, german),
        )
    first = datetime.datetime(1980, 1, 1)
    for _ in range(2500):
        moment = first + datetime.timedelta(minutes=draw(60 * 365 * 24 * 60))
        yield both(dates.format_date, moment.date(), format=("full", "long", "medium")[draw(3)])
        if draw(2):
            yield both(dates.format_time, moment, format="short")
    for unit, seconds in dates.TIMEDELTA_UNITS:
        for count in range(1, 61):
            delta = datetime.timedelta(seconds=seconds * count * (1, -1)[draw(2)])
            # The threshold: else 21 days would be 3 weeks.
            yield both(dates.format_timedelta, delta, granularity=unit, threshold=10**6, add_direction=True)
    for unit in sorted(set(english._data["unit_patterns"]) & set(german._data["unit_patterns"])):
        if not units.get_unit_name(unit, "long", english):
            continue  # a few inherit their words, which Babel does not follow: it would print their keys
        for _ in range(10):
            yield both(units.format_unit, number(), unit, length="long")
    for currency in sorted(set(english.currencies) & set(german.currencies)):
        for _ in range(6):
            yield both(numbers.format_currency, number(), currency, format_type="name")
    for _ in range(600):
        yield both(numbers.format_decimal, draw(10 ** (3 + draw(5))) / 10 ** draw(3))
        yield both(numbers.format_percent, draw(1000) / 1000, format=None)
        big = 10 ** (3 + draw(9)) * (1 + draw(99) / 10)
        yield both(numbers.format_compact_decimal, big, format_type="long", fraction_digits=1)


def pieces(phrase: str) -> list[str]:
    """Words, digits and marks, each with the space before it: joined, they are the phrase again."""
    return re.findall(r" ?(?:[^\W\d_]+|.)", phrase)


@cache
def read() -> dict[Split, list[Pair]]:
    """The pairs of the three splits, ordered by the hash of their sources, too long ones included."""
    targets: dict[str, str] = {}
    for pair in phrases():
        source, target = (" ".join(text.split()) for text in pair)
        targets.setdefault(source, target)
    splits: dict[Split, list[Pair]] = {"train": [], "validation": [], "test": []}
    ranked = sorted((hashlib.sha256(source.encode()).digest(), source) for source in targets)
    for rank, source in ranked:
        # Not the leading byte: the order within a split comes from it.
        tenth = int.from_bytes(rank[-4:], "big") % 10
        name: Split = "validation" if tenth == 0 else "test" if tenth == 1 else "train"
        splits[name].append(Pair(source, targets[source]))
    return splits


@cache
def encode() -> tuple[list[str], dict[Split, Batch]]:
    """The vocabulary, and the splits as padded numbers on the CPU."""
    splits = read()
    counts = Counter(piece for pair in splits["train"] for text in pair for piece in pieces(text))
    words = sorted((p for p in counts if counts[p] >= FREQUENT), key=lambda p: (-counts[p], p))
    letters = {letter for piece in counts if counts[piece] < FREQUENT for letter in spell(piece)}
    vocabulary = [*SPECIAL, *words, *sorted(letters - set(words))]
    index = {piece: i for i, piece in enumerate(vocabulary)}

    def tokens(text: str) -> list[int]:
        found: list[int] = []
        for piece in pieces(text):
            found += [index[piece]] if piece in index else [index.get(part, UNKNOWN) for part in spell(piece)]
        return found

    batches: dict[Split, Batch] = {}
    for name, pairs in splits.items():
        rows = [(tokens(pair.source), [*tokens(pair.target), END]) for pair in pairs]
        rows = [(source, target) for source, target in rows if max(len(source), len(target)) <= LENGTH]
        source, target = (torch.tensor([row[i] + [PAD] * (LENGTH - len(row[i])) for row in rows]) for i in (0, 1))
        before = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        # <eos> is only a target.
        batches[name] = Batch(source, before.masked_fill(before == END, PAD), target)
    return vocabulary, batches


def spell(piece: str) -> list[str]:
    """The letters of a piece, the space before it with the first."""
    return re.findall(r" ?.", piece)
