"""What the translation tasks on real data share: pairs of sentences, joint BPE, batches by tokens, the Transformer."""

import abc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tasks.common import evaluating, to_device
from tasks.decoding import beam_search, bleu
from tasks.models.transformer import Translator
from tasks.sources import cached, optional
from tasks.task import SCHEMA, Split, Task, digest, generator

Language = Literal["de", "en"]

PAD, BEGIN, END, SPECIAL = range(4)  # BPE's own tokens follow from SPECIAL on
FILES = {"train": "train.*", "validation": "val*.*", "test": "test.*"}
CHUNK = 4096  # tokens at a time in evaluation: bounds the memory of the logits


class Batch(NamedTuple):
    """Padded tokens, (N, T) each: source up to <eos>, target shifted right (from <bos> on), target up to <eos>."""

    source: Tensor
    before: Tensor
    target: Tensor


class Side(NamedTuple):
    """The sentences of one language, end to end, each with its <eos>: tokens, and where each of them starts and
    how long it is. The last one is not a sentence but a filling, see Batches."""

    tokens: Tensor
    starts: Tensor
    lengths: Tensor

    def padded(self, indices: Tensor, length: int) -> Tensor:
        """Some sentences as (N, length)."""
        grid = torch.arange(length, device=indices.device)
        inside = grid < self.lengths[indices, None]
        where = torch.where(inside, self.starts[indices, None] + grid, 0)
        return torch.where(inside, self.tokens[where].long(), PAD)


class Group(NamedTuple):
    """The batch of the sentences first, ..., first + rows - 1 of an order, padded to ``length``."""

    first: int
    rows: int
    length: int


class Batches:
    """How sentences of given lengths make batches of at most ``max_tokens`` tokens, padding included.

    A batch is as long as its bucket, 8, 12, 16, 20, 28, 36, 48, ... tokens (each a quarter longer, a multiple of
    4), and has max_tokens // length sentences: a handful of shapes in all. What is left over of a bucket goes into
    batches of the next longer one, so a single batch, of the longest, is not full; index N, the filling, fills it
    (its tokens are no targets: the loss of this batch is the mean over fewer). So every sentence is in one batch,
    but those longer than ``max_tokens``, which are in none. fairseq sorts an epoch by length instead, which drops
    nothing either and gives every batch a shape of its own.
    """

    def __init__(self, lengths: Tensor, max_tokens: int) -> None:
        longest = min(int(lengths.max()), max_tokens)
        bounds = [8]
        while bounds[-1] < longest:
            bounds.append(4 * math.ceil(1.25 * bounds[-1] / 4))
        bounds[-1] = min(bounds[-1], max_tokens)
        self.bucket = torch.bucketize(lengths, torch.tensor(bounds))
        self.groups: list[Group] = []
        first = end = 0
        for i, length in enumerate(bounds):
            rows = max_tokens // length
            end = int((self.bucket <= i).sum())
            while first + rows <= end:
                self.groups.append(Group(first, rows, length))
                first += rows
        if first < end:
            self.groups.append(Group(first, rows, length))
        self.used = end
        self.filled = self.groups[-1].first + self.groups[-1].rows if end else 0

    def order(self, random: torch.Generator | None = None) -> Tensor:
        """The sentences' indices as the groups count them: by bucket, and within one in order or shuffled."""
        size = len(self.bucket)
        order = torch.arange(size) if random is None else torch.randperm(size, generator=random)
        order = order[self.bucket[order].argsort(stable=True)][: self.used]
        return F.pad(order, (0, self.filled - self.used), value=size)


class Pairs:
    """The sentence pairs of a split, on the device."""

    def __init__(self, source: Side, target: Side, device: torch.device) -> None:
        # A batch has source and target of one length: the papers count the tokens of the larger side.
        self.lengths = torch.maximum(source.lengths, target.lengths)[:-1]
        self.target_tokens = int(target.lengths.sum())
        self.source, self.target = (Side(*(to_device(part, device) for part in side)) for side in (source, target))
        self.source_lengths = source.lengths[:-1]

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Tensor, length: int) -> Batch:
        target = self.target.padded(indices, length)
        before = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        # <eos> is only a target.
        return Batch(self.source.padded(indices, length), before.masked_fill(before == END, PAD), target)


@dataclass(config=SCHEMA)
class Translation(Task):
    """Translate sentences with the Transformer of Vaswani et al. (2017), as fairseq's recipes train it.

    Text is read with its whitespace made single spaces; pairs with an empty side are left out. A byte-level BPE of
    ``vocabulary`` tokens (three of them special) is trained on both languages of the training split with the
    library ``tokenizers``; it knows every text, so there are no unknown words, and decoding gives the text back.
    The papers' recipes tokenise with Moses and subword-nmt instead, and report BLEU of tokenised text.

    A batch is a function of (seed, step): see Batches. An epoch has every training pair once, in a new order.
    Batches have few shapes, not one.

    The training loss is the mean over the target tokens of the batch (with <eos>) of the cross-entropy to the
    smoothed target, as torch smooths: ``label_smoothing`` of the probability uniform over the vocabulary. The
    evaluated loss is not smoothed.

    Averaging the last n checkpoints, taken every k steps of T, is the optimizer's part: ``optimizer=gadam
    optimizer.every=k optimizer.start=T-(n-1)k`` with ``optimizer@optimizer.inner`` the rule that trains; runs are
    evaluated on the average.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    one_shape: ClassVar[bool] = False

    source: Language = "de"
    target: Language = "en"
    lowercase: bool = True
    vocabulary: int = Field(default=10_000, gt=SPECIAL + 256)
    max_tokens: int = Field(default=4000, ge=8)
    layers: int = Field(default=6, ge=1)
    width: int = Field(default=512, ge=2, multiple_of=2)
    heads: int = Field(default=4, ge=1)
    hidden: int = Field(default=1024, ge=1)
    dropout: float = Field(default=0.3, ge=0, lt=1)
    inner_dropout: float = Field(default=0.0, ge=0, lt=1)
    pre_ln: bool = False
    tied: bool = True
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    decode: int = Field(default=10_000, ge=0)
    beam: int = Field(default=5, ge=1)
    length_penalty: float = Field(default=1.0, ge=0)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if self.source == self.target:
            raise ValueError(f"source and target are both {self.target}")

    @abc.abstractmethod
    def files(self, data_root: str | None) -> dict[str, list[Path]]:
        """The files of the splits: train, validation, test."""

    def prepare(self, device: torch.device, data_root: str | None) -> None:
        files = {split: readable(found) for split, found in self.files(data_root).items()}
        tokenizers = optional("tokenizers")
        languages, lowercase, vocabulary = (self.source, self.target), self.lowercase, self.vocabulary
        options = [*languages, lowercase, vocabulary, tokenizers.__version__]
        data = cached(
            "translation-1",
            [path for split in files.values() for path in split],
            options,
            lambda: encode({name: read(paths, languages, lowercase) for name, paths in files.items()}, vocabulary),
        )
        self.device = device
        self.tokenizer = tokenizers.Tokenizer.from_str(data["tokenizer"])
        self.size = SPECIAL + int(self.tokenizer.get_vocab_size())
        self.digest = digest(data["tokenizer"], *(tensor for split in data["splits"].values() for tensor in split))
        self.data = {
            name: Pairs(side(source, m, [END]), side(target, n, []), device)
            for name, (source, m, target, n) in data["splits"].items()
        }
        self.training = Batches(self.data["train"].lengths, self.max_tokens)
        if not self.training.groups:
            raise ValueError(f"no sentence pair of the training split has at most max_tokens={self.max_tokens} tokens")
        # Positions: of every sentence in its bucket, and of the longest translation.
        longest = max(int(pairs.lengths.max()) for pairs in self.data.values())
        self.length = max(Batches(torch.tensor([longest]), 2 * longest + 8).groups[0].length, int(allowed(longest)))

    def fingerprint(self) -> str:
        return self.digest

    def model(self) -> nn.Module:
        model = Translator(
            self.size,
            self.layers,
            self.width,
            self.heads,
            self.hidden,
            self.length,
            self.dropout,
            self.pre_ln,
            self.tied,
            PAD,
            self.inner_dropout,
        )
        return model.to(self.device)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        data, groups = self.data["train"], self.training.groups
        epoch, begin = divmod(start, len(groups))
        while True:
            random = generator(seed, epoch)
            order = to_device(self.training.order(random), self.device)
            for i in torch.randperm(len(groups), generator=random).tolist()[begin:]:
                first, rows, length = groups[i]
                yield data.batch(order[first : first + rows], length)
            epoch, begin = epoch + 1, 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.source, batch.before).flatten(0, 1)
        return F.cross_entropy(logits, batch.target.flatten(), ignore_index=PAD, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, Tensor]:
        data = self.data[split]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        plan = Batches(data.lengths, max(CHUNK, int(data.lengths.max())))
        order = to_device(plan.order(), self.device)
        with evaluating(model):
            for first, rows, length in plan.groups:
                batch = data.batch(order[first : first + rows], length)
                logits = model(batch.source, batch.before).flatten(0, 1)
                total += F.cross_entropy(logits, batch.target.flatten(), ignore_index=PAD, reduction="sum")
        metrics = {"loss": total / data.target_tokens}
        if self.decode:
            score, _ = bleu(self.translate(model, split), self.references(split))
            metrics["bleu"] = total.new_tensor(score)
        return metrics

    def translate(self, model: nn.Module, split: Split) -> list[str]:
        """Translations of the first ``decode`` sources of a split, in their order; at most 1.5 n + 10 tokens for a
        source of n."""
        data = self.data[split]
        lengths = data.source_lengths[: self.decode]
        translator = cast(Translator, model)
        plan = Batches(lengths, max(CHUNK // self.beam, int(lengths.max())))
        order = plan.order()
        translations = [""] * len(lengths)
        with evaluating(model):
            for first, rows, length in plan.groups:
                # Without the filling.
                indices = order[first : min(first + rows, plan.used)]
                source = data.source.padded(to_device(indices, self.device), length)
                limit = to_device(allowed(lengths[indices]), self.device)
                tokens, _ = beam_search(translator, source, BEGIN, END, limit, self.beam, self.length_penalty)
                for i, text in zip(indices.tolist(), self.text(tokens), strict=True):
                    translations[i] = text
        return translations

    def references(self, split: Split) -> list[str]:
        """The right translations of the first ``decode`` sources of a split."""
        data = self.data[split]
        size = min(self.decode, len(data))
        longest = int(data.lengths[:size].max())
        return self.text(data.target.padded(torch.arange(size, device=self.device), longest))

    def text(self, tokens: Tensor) -> list[str]:
        """The sentences of tokens (N, T), as far as their <eos>."""
        rows = (row[: row.index(END)] if END in row else row for row in tokens.tolist())
        pieces = [[token - SPECIAL for token in row if token >= SPECIAL] for row in rows]
        return [text.strip() for text in self.tokenizer.decode_batch(pieces)]

    @property
    def signature(self) -> str:
        """sacreBLEU's signature of ``bleu``."""
        return bleu(["a"], ["a"])[1]

    @property
    def worst(self) -> float:
        return math.log(self.size)

    @property
    def initial_loss(self) -> float:
        return math.log(self.size)


def allowed(length: Any) -> Any:
    """How many tokens a translation of so many may have."""
    return 3 * length // 2 + 10


def side(tokens: Tensor, lengths: Tensor, filling: list[int]) -> Side:
    """The sentences of one language, with the filling."""
    tokens, lengths = (torch.cat((a, a.new_tensor(b))) for a, b in ((tokens, filling), (lengths, [len(filling)])))
    # A start past the end would be of an empty filling: nothing of it is read.
    return Side(tokens, lengths.cumsum(0) - lengths, lengths)


def readable(paths: list[Path]) -> list[Path]:
    """Of a split's files, the one of JSON lines or the two of plain text."""
    plain = [path for path in paths if path.suffix in {".de", ".en"}]
    return sorted(plain) if plain else paths[:1]


def read(paths: list[Path], languages: tuple[str, str], lowercase: bool = False) -> list[tuple[str, str]]:
    """The pairs of a split, from files of plain text, one for each language and a sentence a line, whose suffix is
    the language, or from one file of JSON lines ``{"de": ..., "en": ...}``. Pairs with an empty side are left out."""
    texts: list[list[str]]
    if paths[0].suffix in {".de", ".en"}:
        named = {path.suffix[1:]: path for path in paths}
        if set(named) != set(languages):
            raise FileNotFoundError(f"{paths[0]} has no counterpart in the other language")
        texts = [named[language].read_text(encoding="utf-8").split("\n") for language in languages]
        texts = [lines[:-1] if lines[-1] == "" else lines for lines in texts]
        if len(texts[0]) != len(texts[1]):
            raise ValueError(
                f"{named[languages[0]]} has {len(texts[0])} lines, {named[languages[1]]} has {len(texts[1])}"
            )
    else:
        with paths[0].open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = [[row[language] for row in rows] for language in languages]
    texts = [[" ".join(line.split()) for line in lines] for lines in texts]
    if lowercase:
        texts = [[line.lower() for line in lines] for lines in texts]
    return [(source, target) for source, target in zip(*texts, strict=True) if source and target]


def encode(splits: dict[str, list[tuple[str, str]]], vocabulary: int) -> dict[str, Any]:
    """The tokenizer, trained on the split ``train``, as JSON, and of every split the tokens and the lengths of the
    sources, and of the targets, end to end with their <eos>."""
    t = optional("tokenizers")
    tokenizer = t.Tokenizer(t.models.BPE())
    # A space before the first word, so that it is the same token as elsewhere.
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = t.decoders.ByteLevel()
    # Without prefixes or suffixes of words, whose numbers would depend on the order of a hash table.
    trainer = t.trainers.BpeTrainer(
        vocab_size=vocabulary - SPECIAL,
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in splits["train"] for text in pair), trainer)

    def flat(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [[*(SPECIAL + i for i in encoding.ids), END] for encoding in tokenizer.encode_batch(texts)]
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return tokens, torch.tensor([len(row) for row in rows])

    return {
        "tokenizer": tokenizer.to_str(),
        "splits": {
            name: [tensor for i in (0, 1) for tensor in flat([pair[i] for pair in pairs])]
            for name, pairs in splits.items()
        },
    }
