"""Plain torch loops beside an experiment's runs: ``python -m runners.plain sanity``.

Every run of the experiment has a counterpart that is trained under the same settings by what anyone would write:
torch.optim.AdamW, LambdaLR, DataLoader, torchvision's transforms, clip_grad_norm_. Of this project it uses the model
and the raw data alone (bytes of images, numbers of words and of tokens, as the task's ``prepare`` leaves them), and
the settings: not its optimizers, schedules, batches, losses or evaluation. So where the two end alike, these are right.

They are alike in distribution, not run by run: a counterpart has random numbers of its own, its first weights among
them, and its samples are independent of the run's. What is meant by the settings is written out here:

- The rate of step t = 1, 2, ... is lr min(1, (1 - beta2) t / 2), times gamma for every milestone passed.
- Weight decay is AdamW's, on all parameters; clipping is of the global norm, before the step.
- The loss of a step is that of its batch before the step, in training mode: with label smoothing where there is some.
- A metric is that of the last weights, over the whole split, in evaluation mode: BatchNorm's running averages, no
  dropout, no label smoothing.

results/<experiment>/plain_<task>.csv         a row a run, when it is trained; a row that is there is not made again
results/<experiment>/plain_curves_<task>.csv  the training loss, as means of 20 steps; ``step`` is the last of them

Work is split over processes by task, one process a task: ``--tasks ptb_small``.
"""

import abc
import argparse
import itertools
import math
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from runners import experiment as experiments
from runners.config import ROOT, Place, Run, UserError, name_of, nearest
from runners.experiment import Cell, Design
from runners.store import write_whole
from runners.train import environment, prepare
from tasks.sources import optional
from tasks.task import Split

THIN = 20
"""Steps whose losses are averaged to a point of the curve."""
OTHER_SEEDS = 500_000
"""Added to a run's seed, so that its counterpart does not start from the same weights."""
ASSUMED: dict[str, tuple[Any, ...]] = {
    "optimizer.name": ("adamw",), "warmup.name": ("untuned_linear",), "decay.name": ("milestones",),
    "weight_decay_mode": ("none", "decoupled"), "weight_decay_on": ("all",), "precision": ("float32",),
    "initialisation": (None,), "task.train_all": (False,), "task.augment": (True,), "task.channels_last": (False,),
    "task.variable_bptt": (False,), "task.ar": (0.0,), "task.tar": (0.0,),
}  # fmt: skip
"""What the loops do not do otherwise: a run with another value has no counterpart."""


Batches = Collection[Any] | DataLoader[Any]


class Loop(abc.ABC):
    """What differs between the tasks: batches, loss and metric."""

    @abc.abstractmethod
    def __init__(self, task: Any) -> None:
        """Take the raw data and the settings out of a prepared task."""

    @abc.abstractmethod
    def epoch(self) -> Batches:
        """The batches of an epoch, in a new order."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: Any) -> Tensor:
        """The training loss of a batch."""

    @abc.abstractmethod
    def evaluate(self, model: Any, split: Split) -> float:
        """The task's metric over a split, of a model in evaluation mode."""


class Images(Loop):
    """CIFAR: shuffled images, cropped from 4 pixels of black padding and mirrored; the rest of an epoch is left out."""

    def __init__(self, task: Any) -> None:
        t = optional("torchvision.transforms")
        official = torch.cat([task.data[split].images for split in ("train", "validation")])
        std, mean = zip(*(torch.std_mean(channel.float() / 255) for channel in official.unbind(1)), strict=True)
        convert = [t.ConvertImageDtype(torch.float32), t.Normalize([float(x) for x in mean], [float(x) for x in std])]
        self.batch_size = task.batch_size
        self.train = t.Compose([t.RandomCrop(official.shape[-1], padding=4), t.RandomHorizontalFlip(), *convert])
        self.evaluation = t.Compose(convert)
        self.splits = task.data

    def loader(self, split: Split, transform: Any, **options: Any) -> DataLoader[Any]:
        """A DataLoader that transforms every image by itself."""
        images, labels = self.splits[split]

        def collate(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            return torch.stack([transform(image) for image, _ in batch]), torch.stack([label for _, label in batch])

        return DataLoader(TensorDataset(images, labels), self.batch_size, collate_fn=collate, **options)

    def epoch(self) -> Batches:
        return self.loader("train", self.train, shuffle=True, drop_last=True)

    def loss(self, model: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluate(self, model: Any, split: Split) -> float:
        """The share of images that are classified right."""
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in self.loader(split, self.evaluation))
        return right / len(self.splits[split].labels)


class Words(Loop):
    """The LSTM on Penn Treebank: the text as parallel streams, read in windows of ``bptt`` words; the state goes on
    from window to window without its gradient, and is zero at the beginning of an epoch, for which the text, as a
    circle, begins at a random word."""

    def __init__(self, task: Any) -> None:
        self.batch_size, self.bptt = task.batch_size, task.bptt
        self.splits = {split: text.long() for split, text in task.text.splits.items()}
        self.end = task.text.words.index("<eos>")

    def epoch(self) -> Batches:
        text = self.splits["train"]
        text = text.roll(int(torch.randint(len(text), ())))
        length = len(text) // self.batch_size
        streams = text[: length * self.batch_size].view(self.batch_size, length).T
        self.state: Tensor | None = None
        return [
            (streams[i : i + self.bptt], streams[i + 1 : i + 1 + self.bptt])
            for i in range(0, length - self.bptt, self.bptt)
        ]

    def loss(self, model: Any, batch: Any) -> Tensor:
        words, following = batch
        state = zeros(model, words.shape[1]) if self.state is None else self.state.detach()
        _, features, self.state = model.unroll(words, state)
        return F.cross_entropy(model.output(features).flatten(0, 1), following.flatten())

    def evaluate(self, model: Any, split: Split) -> float:
        """Nats per word. The split is read as ten parts, one after the other, each from a zero state; its first word is
        predicted after an <eos>."""
        text = self.splits[split]
        before = torch.cat((torch.tensor([self.end]), text[:-1]))
        total = 0.0
        for words, following in zip(before.chunk(10), text.chunk(10), strict=True):
            state = zeros(model, 1)
            for x, y in zip(words.split(500), following.split(500), strict=True):
                _, features, state = model.unroll(x[:, None], state)
                total += float(F.cross_entropy(model.output(features[:, 0]), y, reduction="sum"))
        return total / len(text)


def zeros(model: Any, streams: int) -> Tensor:
    """The state of the LSTM before the first word: hidden and cell."""
    state: Tensor = model.embedding.weight.new_zeros(2, streams, sum(model.widths))
    return state


class Sentences(Loop):
    """The Transformer on Multi30k: batches of sentences of similar lengths, each padded to its longest."""

    padding, begin = 0, 1

    def __init__(self, task: Any) -> None:
        self.max_tokens, self.label_smoothing = task.max_tokens, task.label_smoothing
        self.splits = {
            name: list(zip(sentences(pairs.source), sentences(pairs.target), strict=True))
            for name, pairs in task.data.items()
        }

    def epoch(self) -> Batches:
        pairs: Any = self.splits["train"]
        batches = bucketed([max(map(len, pair)) for pair in pairs], self.max_tokens)
        return DataLoader(pairs, batch_sampler=batches, collate_fn=self.collate)

    def collate(self, pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Sources, targets as the decoder reads them (after <bos>, without the last token), and targets: (N, T)."""
        begin = torch.tensor([self.begin])
        rows = [(source, torch.cat((begin, target[:-1])), target) for source, target in pairs]
        columns = [[row[i] for row in rows] for i in range(3)]
        return [pad_sequence(column, batch_first=True, padding_value=self.padding) for column in columns]

    def loss(self, model: Any, batch: Any) -> Tensor:
        return self.cross_entropy(model, batch, label_smoothing=self.label_smoothing)

    def cross_entropy(self, model: Any, batch: Any, **options: Any) -> Tensor:
        """Over the target tokens, <eos> among them."""
        source, before, target = batch
        logits = model(source, before)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=self.padding, **options)

    def evaluate(self, model: Any, split: Split) -> float:
        """Nats per target token."""
        pairs: Any = sorted(self.splits[split], key=lambda pair: max(map(len, pair)))
        loader = DataLoader(pairs, batch_size=50, collate_fn=self.collate)
        total = sum(float(self.cross_entropy(model, batch, reduction="sum")) for batch in loader)
        return total / sum(len(target) for _, target in pairs)


def sentences(side: Any) -> list[Tensor]:
    """The sentences that a task keeps end to end; its last one is not a sentence."""
    return list(side.tokens.long().split(side.lengths.tolist()))[:-1]


def bucketed(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The sentences, by index, as batches in random order; those longer than ``max_tokens`` are left out.

    Lengths fall into buckets of up to 8, 12, 16, 20, 28, ... tokens, each a quarter longer and a multiple of 4. A
    batch has as many sentences as fit ``max_tokens`` if all had the bucket's length; what is left over joins the next
    bucket.
    """
    shuffled = torch.randperm(len(lengths)).tolist()
    batches: list[list[int]] = []
    waiting: list[int] = []
    low, high = 0, 8
    while low < min(max(lengths), max_tokens):
        high = min(high, max_tokens)
        waiting += [i for i in shuffled if low < lengths[i] <= high]
        size = max_tokens // high
        while len(waiting) >= size:
            batches.append(waiting[:size])
            waiting = waiting[size:]
        low, high = high, 4 * math.ceil(1.25 * high / 4)
    if waiting:
        batches.append(waiting)
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


LOOPS: dict[str, type[Loop]] = {
    "cifar10_resnet": Images, "cifar100_resnet": Images, "ptb_lstm": Words,
    "multi30k_transformer": Sentences, "iwslt14_transformer": Sentences,
}  # fmt: skip
"""The loop of each task."""


def train(run: Run) -> tuple[dict[str, Any], list[float]]:
    """Train the counterpart of a run, whose task is prepared on the CPU.

    Returns:
        its metrics, epochs and seconds (of training alone), and the loss of every step.

    Raises:
        UserError: if it ends with a metric that is not finite.
    """
    loop = LOOPS[name_of(run.task)](run.task)
    started = time.perf_counter()
    torch.manual_seed(OTHER_SEEDS + run.seed)
    model: nn.Module = run.task.model()
    rule: Any = run.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), run.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=run.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: factor(run, done + 1))
    model.train()
    losses: list[float] = []
    while len(losses) < run.steps:
        epoch = loop.epoch()
        for batch in itertools.islice(epoch, run.steps - len(losses)):
            loss = loop.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            if run.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip_norm)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        metrics = {split: loop.evaluate(model, split) for split in ("validation", "test")}
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"the plain loop of {name_of(run.task)}, seed {run.seed}, diverged")
    return {**metrics, "epochs": run.steps / len(epoch), "seconds": round(seconds, 3)}, losses


def factor(run: Run, t: int) -> float:
    """What the rate of step t = 1, 2, ... is multiplied by: the untuned linear warmup, and the milestones passed."""
    rule: Any = run.optimizer
    decay: Any = run.decay
    passed = sum(t > round(share * run.steps) for share in decay.at)
    warmup: float = min(1.0, (1 - rule.beta2) * t / 2)
    return warmup * decay.gamma**passed


def check(run: Run) -> None:
    """Raise UserError for a run that has settings which the loops do not follow."""
    if name_of(run.task) not in LOOPS:
        raise UserError(f"there is no plain loop for {name_of(run.task)}{nearest('', LOOPS)}")
    science = run.science
    flat = {f"{key}.{name}": v for key, part in science.items() if isinstance(part, dict) for name, v in part.items()}
    for key, known in ASSUMED.items():
        if (value := (science | flat).get(key, known[0])) not in known:
            raise UserError(f"the plain loops have {key}={known[0]}, and {name_of(run.task)} has {value}")


class Table:
    """The rows of one task's counterparts, and their curves, in two files that are always whole."""

    def __init__(self, folder: Path, task: str) -> None:
        self.path, self.curves = folder / f"plain_{task}.csv", folder / f"plain_curves_{task}.csv"

    def has(self, run_id: str) -> bool:
        """Whether the run's counterpart is there."""
        return self.path.exists() and run_id in set(pd.read_csv(self.path).run)

    def add(self, row: dict[str, Any], losses: list[float]) -> None:
        """Add a run, in place of one with the same seed: it was of other settings."""
        points = [
            {"task": row["task"], "seed": row["seed"], "step": i + len(part), "loss": sum(part) / len(part)}
            for i in range(0, len(losses), THIN)
            if (part := losses[i : i + THIN])
        ]
        # The row last: where it is, its curve is.
        for path, new in ((self.curves, pd.DataFrame(points)), (self.path, pd.DataFrame([row]))):
            if path.exists():
                old = pd.read_csv(path)
                new = pd.concat([old[old.seed != row["seed"]], new]).sort_values("seed", kind="stable")
            write_whole(path, new.to_csv(index=False, float_format="%.9g"))


def mirror(design: Design, folder: Path, place: Place, tasks: list[str], seeds: list[int]) -> None:
    """Train the counterparts that are missing, of these tasks and seeds (all, if none are named)."""
    if len(design.base) > len(design.experiment.tasks) or any(len(p.lrs) > 1 for p in design.experiment.tasks.values()):
        raise UserError(f"{design.experiment.name}: the plain loops go beside an experiment of one arm and one lr")
    cells = [
        cell
        for cell in design.cells(lambda cell: None)
        if (not tasks or cell.task in tasks) and (not seeds or cell.seed in seeds)
    ]
    for cell in cells:
        check(cell.run)
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = [cell for cell in cells if cell.task == task]
        device = prepare(of_task[0].run.task, place)
        for i, cell in enumerate(of_task, start=1):
            said = f"{task}, seed {cell.seed} ({i} of {len(of_task)})"
            run_id = cell.run.id(cell.run.task.fingerprint())
            if Table(folder, task).has(run_id):
                print(f"{said}: there already", flush=True)
                continue
            row, losses = _row(cell, run_id, device)
            Table(folder, task).add(row, losses)
            print(f"{said}: test {row['metric']} {row['test']:.5g} after {row['seconds']:.0f} s", flush=True)


def _row(cell: Cell, run_id: str, device: torch.device) -> tuple[dict[str, Any], list[float]]:
    """The row of a cell's counterpart; ``run`` is the id of the run whose counterpart it is."""
    measured, losses = train(cell.run)
    named = {"task": cell.task, "seed": cell.seed, "steps": cell.run.steps, "epochs": measured.pop("epochs")}
    where = {key: environment(device)[key] for key in ("device_name", "torch")}
    return {**named, "metric": cell.run.task.metric, **measured, **where, "run": run_id}, losses


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m runners.plain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiment", help="a file in conf/experiment/, without .yaml")
    parser.add_argument("--tasks", nargs="+", default=[], help="of the experiment (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="of its runs, from 1000 on (default: all)")
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the tables")
    parser.add_argument("--data-root", default=None, help="folder of local data sets (or set UNTUNED_DATA)")
    words = parser.parse_args(argv)
    try:
        design = Design(experiments.load(words.experiment))
        for task in words.tasks:
            if task not in design.experiment.tasks:
                raise UserError(f"{words.experiment} has no task {task!r}{nearest(task, design.experiment.tasks)}")
        place = Place(device="cpu", data_root=words.data_root)
        mirror(design, Path(words.results) / words.experiment, place, words.tasks, words.seeds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
