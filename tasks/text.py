"""What the language models share: words as numbers, streams for truncated backpropagation, whole-split evaluation."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.common import evaluating, to_device
from tasks.sources import cached
from tasks.task import Split, digest, generator

UNKNOWN, END = "<unk>", "<eos>"
STREAMS = 10  # in evaluation
CHUNK = 64  # time steps in evaluation: bounds the memory of the logits

Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Text(NamedTuple):
    """A data set of words as numbers.

    Attributes:
        words: the vocabulary, most frequent in the training split first.
        counts: how often the training split has each word (V,).
        splits: the text of each split, int32.
        digest: of words and splits.
    """

    words: list[str]
    counts: Tensor
    splits: dict[Split, Tensor]
    digest: str


def load(files: Mapping[str, Sequence[Path]], device: torch.device, min_count: int = 1) -> Text:
    """Read files of one sentence a line, words between spaces; <eos> ends every line, also an empty one.

    The first time, the words are counted and numbered; from then on this comes from the cache.

    Args:
        min_count: times the training split must have a word; a rarer one is <unk>, as is any that only a
            held-out split has.
    """
    paths = list(chain.from_iterable(files.values()))
    options = (min_count, {split: len(part) for split, part in files.items()})
    value: dict[str, Any] = cached("words-1", paths, options, lambda: encode(files, min_count))
    splits = {cast(Split, split): to_device(value[split], device) for split in files}
    return Text(value["words"], value["counts"], splits, value["digest"])


def encode(files: Mapping[str, Sequence[Path]], min_count: int) -> dict[str, Any]:
    """What ``load`` keeps in the cache."""
    found = Counter(chain.from_iterable(map(words_of, files["train"])))
    counts = {word: n for word, n in found.items() if n >= min_count or word in (UNKNOWN, END)}
    counts[UNKNOWN] = counts.get(UNKNOWN, 0) + found.total() - sum(counts.values())
    words = sorted(counts, key=lambda word: (-counts[word], word))
    index = {word: i for i, word in enumerate(words)}
    unknown = index[UNKNOWN]
    value: dict[str, Any] = {"words": words, "counts": torch.tensor([counts[word] for word in words])}
    for split, paths in files.items():
        parts = [np.fromiter((index.get(word, unknown) for word in words_of(path)), np.int32) for path in paths]
        value[split] = torch.from_numpy(np.concatenate(parts))
    value["digest"] = digest("\n".join(words), *(value[split] for split in files))
    return value


def words_of(path: Path) -> Iterator[str]:
    """The words of a file, and <eos> after every line."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield from line.split()
            yield END


class Batch(NamedTuple):
    """Tokens (T, B), the tokens that follow, and whether an epoch begins (boolean scalar)."""

    tokens: Tensor
    targets: Tensor
    reset: Tensor


def unrolls(length: int, bptt: int, variable: bool, seed: int, epoch: int) -> list[int]:
    """The time steps of each batch of an epoch that predicts ``length`` tokens a stream.

    All are ``bptt``, and what remains is left out; or, if ``variable``, AWD-LSTM's (Merity et al. 2018): the mean
    is ``bptt``, or half of it with probability 0.05, the deviation 5, the smallest 5; the last batch is what
    remains, unless that is a single step.
    """
    if not variable:
        return [bptt] * (length // bptt)
    numbers = generator(seed, epoch, 1)
    count = length // 5 + 1
    mean = torch.where(torch.rand(count, generator=numbers) < 0.95, float(bptt), bptt / 2)
    sizes = (mean + 5 * torch.randn(count, generator=numbers)).int().clamp(min=5)
    whole: list[int] = sizes[sizes.cumsum(0) <= length].tolist()
    rest = length - sum(whole)
    return [*whole, rest] if rest > 1 else whole


def unrolled(
    text: Tensor, batch_size: int, bptt: int, seed: int, start: int, variable: bool = False
) -> Iterator[Batch]:
    """The batches of steps start+1, start+2, ...: an epoch reads the text, as a circle, from a seeded place on, as
    ``batch_size`` streams side by side, each batch where the last one ended.

    Raises:
        ValueError: if not one batch fits.
    """
    length = len(text) // batch_size
    # The last token of a stream is only a target.
    if not unrolls(length - 1, bptt, variable, seed, 0):
        raise ValueError(f"batch_size={batch_size} streams of bptt={bptt} do not fit {len(text)} training tokens")
    device = text.device
    streams = torch.arange(batch_size, device=device) * length
    resets = (torch.zeros((), dtype=torch.bool, device=device), torch.ones((), dtype=torch.bool, device=device))
    epoch = 0
    while start >= len(sizes := unrolls(length - 1, bptt, variable, seed, epoch)):
        epoch, start = epoch + 1, start - len(sizes)
    while True:
        # Where the epoch begins to read: otherwise every epoch of every seed had the same streams.
        at = int(torch.randint(len(text), (), generator=generator(seed, epoch))) + sum(sizes[:start])
        for i in range(start, len(sizes)):
            rows = torch.arange(at, at + sizes[i] + 1, device=device)[:, None]
            window = text[(rows + streams) % len(text)].long()
            yield Batch(window[:-1], window[1:], resets[i == 0])
            at += sizes[i]
        epoch, start = epoch + 1, 0
        sizes = unrolls(length - 1, bptt, variable, seed, epoch)


def nll(output: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    """The sum of the negative log-likelihoods of targets (...) after features (..., width), -100 counting nothing.

    Args:
        output: a linear layer, or an adaptive softmax.
    """
    features, targets = features.flatten(0, -2), targets.flatten()
    if isinstance(output, nn.AdaptiveLogSoftmaxWithLoss):
        known = targets >= 0
        return -output(features[known].to(output.head.weight.dtype), targets[known]).output.sum()
    return F.cross_entropy(output(features), targets, reduction="sum")


def uniform_loss(counts: Tensor, cutoffs: Sequence[int] = ()) -> float:
    """Nats per word of the training split, for a softmax that finds every word equally likely; with cut-offs, for
    an adaptive softmax that finds all words and clusters of its head, and all words of a cluster, equally likely.

    Raises:
        ValueError: if the vocabulary has no words behind the last cut-off.
    """
    if not cutoffs:
        return math.log(len(counts))
    if list(cutoffs) != sorted({*cutoffs}) or cutoffs[-1] >= len(counts):
        raise ValueError(f"cutoffs={tuple(cutoffs)} must increase, to less than the {len(counts)} words there are")
    bounds = [*cutoffs, len(counts)]
    inside = sum(
        int(counts[low:high].sum()) * math.log(high - low) for low, high in pairwise(bounds)
    )  # of the clusters
    return math.log(cutoffs[0] + len(cutoffs)) + inside / int(counts.sum())


def evaluate(model: nn.Module, text: Tensor, first: int, score: Score, streams: int = STREAMS) -> dict[str, Tensor]:
    """Loss (nats per token) and perplexity of a whole text, read as contiguous streams with a carried state.

    Args:
        model: has the buffer ``carried``, whose last dimension but one is the stream.
        first: what precedes the text, so that its first token is predicted too.
        score: maps tokens (T, B), targets (T, B), -100 where there is none, and the state to the sum of the
            negative log-likelihoods and the state that follows.
    """
    tokens = torch.cat((text.new_full((1,), first), text[:-1]))
    length = -(-len(text) // streams)
    short = streams * length - len(text)
    tokens = F.pad(tokens, (0, short)).view(streams, length).T
    targets = F.pad(text, (0, short), value=-100).view(streams, length).T
    carried = model.carried
    assert isinstance(carried, Tensor)
    with evaluating(model):
        state = carried.new_zeros(*carried.shape[:-2], streams, carried.shape[-1])
        total = torch.zeros((), dtype=torch.float64, device=text.device)
        for x, y in zip(tokens.split(CHUNK), targets.split(CHUNK), strict=True):
            part, state = score(x.long(), y.long(), state)
            total += part
        loss = total / len(text)
        return {"loss": loss, "perplexity": loss.exp()}
