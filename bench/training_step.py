"""A training step as a run takes it, against a plain loop, against itself without the harness, and in faster ways.

Of each task, all on one thread of a CPU, or on the GPU:

    plain loop  DataLoader, the eager model, torch.optim.Adam(fused=True), no logging, no checks; on a GPU with TF32
                and operations that do not repeat themselves, as torch comes
    bare        the model, batches and optimizer of a run, and nothing else
    ours        runners.train's own loop without probes: loss, rate, checks for divergence
    probed      the same with the norms of gradient and update at every step
    bfloat16, channels_last, compiled, everything
                ours in that way; everything is all of them, and the optimizer compiled too
    cuda_graph, graph_everything
                on a GPU: ours with the passes as a CUDA graph; and with bfloat16, channels_last and the optimizer
                compiled besides

A turn has the steps between two looks at the losses, fewer where they would last longer than TURN: then the looks come
oftener than in a run, and what they cost shows as more. Where batches differ in shape, ours are of the commonest one,
and the plain loop's are those of its own that are nearest to it in size.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.measure import fastest, interleaved, ratio
from bench.plain import loop_of
from runners.config import Place, Probes, Run, UserError, compose_run, name_of
from runners.loss import compiler_there, loss_of
from runners.timing import Stepper
from runners.train import CHECK_EVERY, Training, prepare
from tasks.common import of_one_shape

TITLE = "A training step"

EMBEDDED: dict[str, list[str]] = {
    name: [f"task={name}"] for name in ("digits_resnet", "pydocs_lstm", "phrases_transformer")
}
REAL: dict[str, list[str]] = {
    "cifar10_resnet8": ["task=cifar10_resnet", "task.depth=8"],
    "cifar10_resnet20": ["task=cifar10_resnet", "task.depth=20"],
    "ptb_lstm_small": ["task=ptb_lstm_small"],
    "multi30k_transformer": ["task=multi30k_transformer", "task.max_tokens=256"],
}
"""Measured where there is a data root that has them."""

COMPILED, CHANNELS_LAST = ["model_execution=compiled"], ["task.channels_last=true"]
BFLOAT16, GRAPH = ["precision=bfloat16"], ["model_execution=cuda_graph"]
TURN, ROUNDS, BUDGET = 0.5, 20, 20_000
"""Seconds of a turn, turns of each, and the budget of the runs, of which they take the first steps."""


def plain_loop(run: Run, device: torch.device) -> Iterator[Tensor]:
    """What anyone would write, a step at a time; the data stays in memory, as a DataLoader wants it."""
    loop = loop_of(name_of(run.task), run.task)
    model = run.task.model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr, fused=True)
    epoch: Callable[[], Any] = loop.epoch
    if not run.task.one_shape:
        own: Any = next(run.task.batches(0))
        size = own[0].numel()
        alike: Any = sorted(itertools.islice(loop.epoch(), 200), key=lambda batch: abs(batch[0].numel() - size))[:50]
        epoch = lambda: DataLoader(alike, batch_size=None, shuffle=True)  # noqa: E731
    while True:
        for batch in epoch():
            loss = loop.loss(model, [part.to(device) for part in batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss


def as_torch_comes(call: Callable[[], None]) -> Callable[[], None]:
    """A call without what runners.train.prepare sets up so that a run can be repeated."""

    def free() -> None:
        repeatable = torch.are_deterministic_algorithms_enabled()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
            torch.use_deterministic_algorithms(False)
            try:
                call()
            finally:
                torch.use_deterministic_algorithms(repeatable)

    return free


def bare(run: Run) -> Iterator[Tensor]:
    """The steps of a run without anything around them."""
    stepper = Stepper(run)
    for batch in stepper.batches:
        yield stepper.step(batch)


def turn(steps: Iterator[Any], count: int) -> Callable[[], None]:
    """The next ``count`` of some steps, which must be there: a run that diverged has no more."""

    def take() -> None:
        for _ in range(count):
            next(steps)

    return take


def composed(words: list[str], place: Place) -> Run:
    """A run whose task is prepared and has batches of one shape."""
    run, _ = compose_run([*words, "decay=constant", f"steps={BUDGET}", "probes.norms=[]"])
    prepare(run.task, place)
    if not run.task.one_shape:
        run.task.batches = of_one_shape(run.task.batches)  # type: ignore[method-assign]
    return run


def ways(words: list[str], compiled: bool, device: str) -> dict[str, list[str]]:
    """The faster ways of a task on a type of device, in words of a run."""
    layout = CHANNELS_LAST if hasattr(compose_run(words)[0].task, "channels_last") else []
    found = {"bfloat16": BFLOAT16, **({"channels_last": CHANNELS_LAST} if layout else {})}
    if compiled:
        found |= {"compiled": COMPILED, "everything": [*COMPILED, *BFLOAT16, *layout, "execution=compiled"]}
    if device == "cuda":
        optimizer = ["execution=compiled"] if compiled else []
        found |= {"cuda_graph": GRAPH, "graph_everything": [*GRAPH, *BFLOAT16, *layout, *optimizer]}
    return found


def of_task(
    name: str, words: list[str], place: Place, compiled: bool, rounds: int = ROUNDS, turn_s: float = TURN
) -> pd.DataFrame:
    """The rows of a task."""
    device = place.torch_device()
    run = composed(words, place)
    cpu = run if device.type == "cpu" else composed(words, Place(device="cpu", data_root=place.data_root))
    count = max(1, min(CHECK_EVERY, round(turn_s / Stepper(run).seconds(2))))
    faster = ways(words, compiled, device.type)
    calls = {"plain loop": as_torch_comes(turn(plain_loop(cpu, device), count)), "bare": turn(bare(run), count)}
    runs = {
        "ours": run,
        "probed": run.replace(probes=Probes(norms="all")),
        **{way: composed([*words, *more], place) for way, more in faster.items()},
    }
    for way, one in runs.items():
        # One item is all the steps from look to look.
        calls[way] = turn(Training(one, one.task, device).steps(every=count), 1)
    seconds = interleaved(calls, rounds, device, turn=0.0)
    kind = type(run.task)
    listed = len(Probes().steps("norms", kind.steps)) / kind.steps
    table = pd.DataFrame([
        {"task": name, "way": way, "ms": 1000 * fastest(taken) / count,
         "speedup": ratio(seconds["plain loop"], taken), "steps_a_turn": count, "rounds": rounds}
        for way, taken in seconds.items()
    ]).set_index("way")  # fmt: skip
    table.loc["ours", "cost"] = ratio(seconds["ours"], seconds["bare"]) - 1
    table.loc["probed", "cost"] = ratio(seconds["probed"], seconds["ours"]) - 1
    table.loc["probed", "cost_of_default"] = table.cost["probed"] * listed
    if compiled:
        cold, warm = compile_seconds(runs["everything"], place)
        table.loc["everything", ["compile_s", "compile_again_s"]] = cold, warm
    return table.reset_index()[["task", "way", *table.columns.drop("task")]]


def compile_seconds(run: Run, place: Place) -> tuple[float, float]:
    """What compiling the model's passes adds to the first step of a process, and of the next process."""
    context = multiprocessing.get_context("spawn")
    known = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    found = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            for _ in range(2):
                with concurrent.futures.ProcessPoolExecutor(1, context) as process:
                    found.append(process.submit(first_step, run, place).result())
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if known is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = known
    return found[0], found[1]


def first_step(run: Run, place: Place) -> float:
    """How many seconds longer the first loss and gradient take than the second."""
    device = prepare(run.task, place)
    loss, batch = loss_of(run, run.task, run.task.model()), next(run.task.batches(0))
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        loss(batch).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[0] - seconds[1]


def measure(place: Place, quick: bool) -> pd.DataFrame:
    """All tasks whose data is there; if quick, the digits alone, without compiling."""
    if quick:
        return of_task("digits_resnet", EMBEDDED["digits_resnet"], place, compiled=False, rounds=2, turn_s=0.02)
    compiled = True
    try:
        compiler_there(place.torch_device(), "inductor", "compiling", "nothing that is compiled")
    except UserError as error:
        print(f"not measured: {error}")
        compiled = False
    tables = [of_task(name, words, place, compiled) for name, words in EMBEDDED.items()]
    for name, words in REAL.items() if place.data else ():
        try:
            tables.append(of_task(name, words, place, compiled))
        except UserError as error:
            print(f"{name} is left out: {error}")
    return pd.concat(tables, ignore_index=True)


def summary(table: pd.DataFrame) -> str:
    """Milliseconds a step of every way, and what the harness costs."""
    order = list(dict.fromkeys(table.way))
    names = list(dict.fromkeys(table.task))
    wide = (
        table.pivot(index="task", columns="way", values="ms").loc[names, order].map("{:.4g}".format, na_action="ignore")
    )
    best = table[~table.way.isin(["plain loop", "bare", "probed"])].groupby("task").speedup.max()
    wide["times as fast as plain"] = best.loc[names].map("{:.2f}".format)
    harness = pd.DataFrame({
        "harness": table[table.way == "ours"].set_index("task").cost,
        "a probed step": table[table.way == "probed"].set_index("task").cost,
        "probes at their default": table[table.way == "probed"].set_index("task").cost_of_default,
    }).loc[names].map("{:+.1%}".format)  # fmt: skip
    parts = [
        "Milliseconds of a step in the fastest turn; in the last column, how many times as fast as the plain loop the "
        "fastest way is: a median over neighbouring turns, so that drift cancels, and not the quotient of two columns. "
        "*Plain loop*: torch's DataLoader, eager float32 model and fastest optimizer, no logging. *Bare*: this "
        "project's task, loss and optimizer in a loop. *Ours*: the same as a run trains, with logging and checks. "
        "*Probed*: with norms at every step. The others are ours with one thing changed, and *everything* with all "
        "that the task has of them, the optimizer compiled too. Empty: a task without images.",
        wide.fillna("").to_markdown(disable_numparse=True),
        "What the harness adds to the bare steps, and probes to those: at every step, and at the default's share of "
        "the steps of a run of the task's own budget.",
        harness.to_markdown(disable_numparse=True),
    ]
    if "compile_s" in table:
        seconds = table.dropna(subset="compile_s").set_index("task")[["compile_s", "compile_again_s"]]
        seconds.columns = pd.Index(["first process", "next process"])
        parts += [
            "Seconds to compile the model in bfloat16.",
            seconds.map("{:.0f}".format).to_markdown(disable_numparse=True),
        ]
    return "\n\n".join(parts)


TRIED = """What the ways are worth together, on a ResNet-8 on the AMD EPYC, in milliseconds a step (another run, so not
to be held against the table): bfloat16 109, and channels-last 107; bfloat16 and compiled 96, and channels-last 95, and
a compiled optimizer 94. Of the last, convolutions of oneDNN take 59, which no compiler changes, and the fused rest of
the passes 34. Those of a ResNet-20 take 172 of 240, at 180 GFLOP/s."""
