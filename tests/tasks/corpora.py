"""Tiny texts in the form of the real corpora: a word follows another by chance, from a few that may."""

import random
from pathlib import Path

from tasks import phrases_transformer

WORDS = 37


def sentences(count: int, seed: int) -> str:
    """Lines of 3 to 12 words, of which one in a hundred appears nowhere else."""
    chance = random.Random(seed)
    lines, word = [], 0
    for i in range(count):
        line = []
        for _ in range(chance.randint(3, 12)):
            word = (5 * word + chance.choice((1, 1, 1, 2, 5))) % WORDS
            line.append(f"rare{seed}{i}" if chance.random() < 0.01 else f"word{word}")
        lines.append(f" {' '.join(line)} \n")
    return "".join(lines)


def write_text(folder: Path, train: str, validation: str, test: str) -> None:
    """About 6000 words to train, 500 to hold out, in files of these names."""
    for seed, (name, count) in enumerate(((train, 700), (validation, 60), (test, 60)), start=1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(sentences(count, seed))


def write_billion(folder: Path) -> None:
    """Two training files and two held-out ones, in the folders of the archive."""
    training, held_out = ("training", "heldout")
    write_text(
        folder,
        f"{training}-monolingual.tokenized.shuffled/news.en-00001-of-00100",
        f"{held_out}-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050",
        f"{held_out}-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050",
    )
    (folder / f"{training}-monolingual.tokenized.shuffled/news.en-00002-of-00100").write_text(sentences(100, 4))


def write_parallel(folder: Path, *names: str) -> None:
    """German and English phrases of the embedded task, line by line, in files of these names and .de and .en."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = phrases_transformer.read()["train"]
    for i, (name, count) in enumerate(zip(names, (1500, 60, 60), strict=True)):
        part = pairs[2000 * i : 2000 * i + count]
        (folder / f"{name}.de").write_text("".join(f"{pair.target}\n" for pair in part))
        (folder / f"{name}.en").write_text("".join(f"{pair.source}\n" for pair in part))
