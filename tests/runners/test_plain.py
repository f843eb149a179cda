"""The plain loops: what they write out equals what this project does, piece by piece, on small generated data."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runners import experiment as experiments
from runners import plain
from runners.config import Place, Run, UserError, compose_run
from runners.experiment import Design, load
from runners.plain import Images, Loop, Sentences, Words, bucketed, factor
from runners.store import Store
from runners.train import prepare, train
from tasks.task import generator
from tests.tasks.corpora import write_text
from tests.tasks.generated import write_images
from tests.tasks.test_translation import CORPUS, write_plain

SETTINGS = ["optimizer=adamw", "warmup=untuned_linear", "decay=milestones", "optimizer.beta2=0.9", "steps=45"]
SMALL: dict[str, list[str]] = {
    "cifar10_resnet": ["task=cifar10_resnet", "task.depth=8", "task.batch_size=8", "weight_decay=1e-2", "lr=.01"],
    "ptb_lstm": [
        "task=ptb_lstm_small", "task.batch_size=8", "task.bptt=6", "task.embedding=16", "task.hidden=16",
        "clip_norm=0.05", "lr=.03",
    ],
    "multi30k_transformer": [
        "task=multi30k_transformer", "task.vocabulary=320", "task.max_tokens=200", "task.layers=1", "task.width=16",
        "task.heads=2", "task.hidden=32", "task.decode=0", "task.dropout=0", "weight_decay=1e-2", "lr=.003",
    ],
}  # fmt: skip
CPU = torch.device("cpu")
Runs = dict[str, Run]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "cifar10", "img", "label", classes=10)
    write_text(folder / "ptb", "ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
    write_plain(folder / "multi30k", CORPUS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNTUNED_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    """A small run of each task, prepared."""
    made = {task: compose_run([*SETTINGS, *words, "seed=7"])[0] for task, words in SMALL.items()}
    for run in made.values():
        prepare(run.task, Place(device="cpu", data_root=str(root)))
    return made


# The schedule and the steps.


def test_the_schedule_is_the_warmup_times_the_decay(runs: Runs) -> None:
    design = Design(load("sanity"))
    for run in (*design.base.values(), *runs.values()):
        t = torch.arange(1, run.steps + 1, dtype=torch.float64)
        expected = run.warmup.factor(t, run.optimizer.second_moment_beta) * run.decay.factor(t, run.steps)
        given = torch.tensor([factor(run, i) for i in range(1, run.steps + 1)], dtype=torch.float64)
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=0)
        assert given.min() < 0.011 < 0.999 < given.max()


@pytest.mark.parametrize("name", SMALL)
def test_on_the_same_batches_it_trains_as_a_run(
    runs: Runs, name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, clipping, schedule, weight decay and when losses and metrics are taken, with the task's own batches."""
    run = runs[name].replace(steps=14)  # 4 after the second milestone

    class Same(Loop):
        def __init__(self, task: Any) -> None:
            self.task = task

        def epoch(self) -> list[Any]:
            return list(itertools.islice(self.task.batches(run.seed), run.steps))

        def loss(self, model: Any, batch: Any) -> Tensor:
            return self.task.loss(model, batch)

        def evaluate(self, model: Any, split: Any) -> float:
            assert not model.training and not torch.is_grad_enabled()
            return float(self.task.evaluate(model, split)[self.task.metric])

    monkeypatch.setattr(plain, "OTHER_SEEDS", 0)
    monkeypatch.setitem(plain.LOOPS, name, Same)
    measured, losses = plain.train(run)
    result = train(run, run.task, CPU, store)
    # Rounding grows from step to step.
    assert losses == pytest.approx(list(result.tables["history"].loss), rel=1e-3)
    for split in ("validation", "test"):
        assert measured[split] == pytest.approx(result.summary["metrics"][split][run.task.metric], rel=2e-3)
    assert measured["epochs"] == 1 and measured["seconds"] > 0


def test_one_step_is_the_projects_to_rounding(runs: Runs, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, with losses of float64: nothing but rounding of float32 differs there."""
    run = runs["ptb_lstm"].replace(steps=12)
    task = run.task
    made = type(task).model
    monkeypatch.setattr(type(task), "model", lambda self: made(self).double())
    monkeypatch.setattr(plain, "OTHER_SEEDS", 0)
    stream = int(torch.randint(len(task.text.splits["train"]), (), generator=generator(run.seed, 0)))  # type: ignore[attr-defined]
    monkeypatch.setattr(Words, "epoch", starting(stream))
    _, losses = plain.train(run)
    history = train(run, task, CPU, store).tables["history"].loss  # kept in float32
    assert losses == pytest.approx(list(history), rel=1e-6)


def starting(at: int) -> Callable[[Words], Any]:
    """Words.epoch, with the text beginning at a given word."""
    epoch = Words.epoch

    def chosen(self: Words) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", lambda high, size: torch.tensor(-at))
            return epoch(self)

    return chosen


# The batches and the losses.


def test_images_are_normalised_crops_and_mirrors(runs: Runs) -> None:
    task: Any = runs["cifar10_resnet"].task
    loop = Images(task)
    of = {image.contiguous().numpy().tobytes(): i for i, image in enumerate(task.data["train"].images)}
    views = list(itertools.product(range(9), range(9), (False, True)))
    rows, columns, mirrored = (torch.tensor(part) for part in zip(*views, strict=True))
    seen, places = [], set()
    torch.manual_seed(0)
    for index in range(40):
        image = task.data["train"].images[index]
        every = task.normalise(task.augmented(torch.full_like(rows, index), rows, columns, mirrored))
        distance = (every - loop.train(image)).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        places.add(int(distance.argmin()))
        torch.testing.assert_close(loop.evaluation(image), task.normalise(image), rtol=0, atol=1e-5)
    assert len(places) > 25
    loop.train = lambda image: image  # the order alone
    for images, labels in loop.epoch():
        assert len(labels) == 8
        indices = [of[image.numpy().tobytes()] for image in images]
        assert labels.tolist() == task.data["train"].labels[indices].tolist()
        seen += indices
    assert len(seen) == len(set(seen)) == 67 * 8 == len(loop.epoch()) * 8 and seen != sorted(seen)
    model = task.model()
    images, labels = next(iter(task.batches(0)))
    assert torch.equal(loop.loss(model, (images, labels)), F.cross_entropy(model(images), labels))


def test_windows_of_words_and_their_losses_are_the_tasks(runs: Runs) -> None:
    task: Any = runs["ptb_lstm"].task
    text = task.text.splits["train"]
    loop = Words(task)
    windows = starting(int(torch.randint(len(text), (), generator=generator(3, 0))))(loop)
    torch.manual_seed(0)
    model = task.model()
    batches = task.batches(3)
    for words, following in windows:
        batch = next(batches)
        assert torch.equal(words, batch.tokens) and torch.equal(following, batch.targets)
        ours, theirs = loop.loss(model, (words, following)), task.loss(model, batch)
        torch.testing.assert_close(ours, theirs)
    assert bool(next(batches).reset)  # as many windows as an epoch of the task has
    first = [loop.epoch()[0][0] for _ in range(5)]
    assert len({tuple(window[:, 0].tolist()) for window in first}) > 1 and loop.state is None


def test_sentences_and_their_losses_are_the_tasks(runs: Runs) -> None:
    task: Any = runs["multi30k_transformer"].task
    loop = Sentences(task)
    lengths = task.data["train"].lengths
    batches = bucketed(lengths.tolist(), task.max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    groups = task.training.groups
    assert len(batches) == len(loop.epoch()) == len(groups)
    filled = task.training.filled - task.training.used
    rows = sorted(group.rows for group in groups)
    rows[rows.index(groups[-1].rows)] -= filled
    assert sorted(len(batch) for batch in batches) == sorted(rows)
    torch.manual_seed(0)
    model = task.model()
    longest = int(lengths.max())
    for indices in batches[:5]:
        ours = loop.loss(model, loop.collate([loop.splits["train"][i] for i in indices]))
        # The task pads further, which changes nothing.
        theirs = task.loss(model, task.data["train"].batch(torch.tensor(indices), longest))
        torch.testing.assert_close(ours, theirs)


def test_sentences_that_are_too_long_are_left_out() -> None:
    lengths = [3, 8, 9, 40, 41, 12, 30]
    batches = bucketed(lengths, 40)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 5, 6]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 40 for batch in batches)


# Evaluation.


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_equals_the_tasks(runs: Runs, name: str) -> None:
    task: Any = runs[name].task
    torch.manual_seed(1)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for batch in itertools.islice(task.batches(1), 25):  # so that it is not the one of a new model
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    loop = plain.LOOPS[name](task)
    for split in ("validation", "test"):
        expected = float(task.evaluate(model, split)[task.metric])
        model.eval()
        with torch.no_grad():
            given = loop.evaluate(model, split)
        model.train()
        assert given == pytest.approx(expected, rel=1e-5)
        assert abs(expected - task.worst) > 0.02


# The command.


@pytest.fixture
def command(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command line, on the experiment ``small`` of two seeds a task."""
    (tmp_path / "experiment").mkdir()
    write_experiment(tmp_path)
    monkeypatch.setattr(experiments, "CONF", tmp_path)

    def call(*words: str) -> None:
        plain.main(["small", "--results", str(tmp_path / "results"), "--data-root", str(root), *words])

    return call


def write_experiment(folder: Path, steps: int = 45, beta2: float = 0.9, **tasks: list[str]) -> None:
    lines = [
        "question: Alike?", "source: none", "cost: none", "reference: adamw", "arms: {adamw: [optimizer=adamw]}",
        f"overrides: [warmup=untuned_linear, decay=milestones, optimizer.beta2={beta2}, steps={steps}]", "tasks:",
    ]  # fmt: skip
    for task, words in (tasks or SMALL).items():
        name, *overrides = (word for word in words if not word.startswith("lr="))
        settings = f"overrides: [{', '.join(overrides)}], lrs: [0.01], tuning_seeds: 2"
        lines.append(f"  {task}: {{task: {name.removeprefix('task=')}, {settings}}}")
    (folder / "experiment" / "small.yaml").write_text("\n".join(lines))


def rows_of(folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    results = folder / "results" / "small"
    return pd.read_csv(results / f"plain_{name}.csv"), pd.read_csv(results / f"plain_curves_{name}.csv")


def test_it_trains_every_run_and_writes_it(command: Callable[..., None], tmp_path: Path) -> None:
    command("--tasks", "ptb_lstm", "multi30k_transformer")
    command("--tasks", "cifar10_resnet", "--seeds", "1000")
    for name in SMALL:
        rows, curves = rows_of(tmp_path, name)
        seeds = 1 if name == "cifar10_resnet" else 2
        assert list(rows.seed) == [1000, 1001][:seeds] and set(rows.steps) == {45} and (rows.seconds > 0).all()
        assert rows.run.nunique() == rows.test.nunique() == rows.validation.nunique() == seeds
        assert set(rows.metric) == {"accuracy" if seeds == 1 else "loss"}
        assert list(curves.step) == [20, 40, 45] * seeds and curves.loss.notna().all()
        first, last = (curves[curves.step == step].loss.mean() for step in (20, 45))
        assert last < first  # it learns
    rows, _ = rows_of(tmp_path, "cifar10_resnet")
    assert set(rows.epochs.round(4)) == {round(45 / 67, 4)}


def test_what_is_there_is_not_made_again(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def stub(run: Run) -> tuple[dict[str, float], list[float]]:
        calls.append(run.seed)
        return {"validation": 1.0, "test": float(run.seed), "epochs": 1.0, "seconds": 2.0}, [1.0] * 20 + [3.0, 4.0]

    monkeypatch.setattr(plain, "train", stub)
    chosen = {"ptb_lstm": SMALL["ptb_lstm"]}
    write_experiment(tmp_path, **chosen)
    command("--seeds", "1001")
    assert calls == [1001]
    before = (tmp_path / "results" / "small" / "plain_ptb_lstm.csv").read_text()
    command()
    assert calls == [1001, 1000] and "seed 1001 (2 of 2): there already" in capsys.readouterr().out
    rows, curves = rows_of(tmp_path, "ptb_lstm")
    assert list(rows.test) == [1000, 1001] and before.splitlines()[1] in rows.to_csv(index=False)
    assert list(curves.step) == [20, 22] * 2 and list(curves.loss) == [1, 3.5] * 2
    command()
    assert len(calls) == 2
    write_experiment(tmp_path, steps=46, **chosen)  # other settings: other runs, in place of the old
    command("--seeds", "1000")
    after, curves = rows_of(tmp_path, "ptb_lstm")
    assert len(calls) == 3 and list(after.steps) == [46, 45] and len(curves) == 4
    assert after.run[0] != rows.run[0] and after.run[1] == rows.run[1]


def test_mistakes_are_one_line(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    def line(*words: str) -> str:
        with pytest.raises(SystemExit):
            command(*words)
        return capsys.readouterr().err

    assert line("--tasks", "ptb_lst") == "error: small has no task 'ptb_lst'; did you mean 'ptb_lstm'?\n"
    ptb = SMALL["ptb_lstm"]
    write_experiment(tmp_path, ptb=[*ptb, "task.ar=2.0"])
    assert line() == "error: the plain loops have task.ar=0.0, and ptb_lstm has 2.0\n"
    write_experiment(tmp_path, digits=["task=digits_resnet"])
    assert "there is no plain loop for digits_resnet" in line()
    text = (tmp_path / "experiment" / "small.yaml").read_text()
    (tmp_path / "experiment" / "small.yaml").write_text(text.replace("[0.01]", "[0.01, 0.1]"))
    assert "of one arm and one lr" in line()
    for change, named in (("optimizer=adam", "optimizer.name"), ("decay=linear", "decay.name")):
        run, _ = compose_run([*SETTINGS, *ptb, change])
        with pytest.raises(UserError, match=f"the plain loops have {named}=.* and ptb_lstm has "):
            plain.check(run)
