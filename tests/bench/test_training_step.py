"""The measured steps: what is in the tables, and that a plain loop takes the steps that a run takes."""

import os
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from bench import plain as loops
from bench import training_step as part
from runners.config import Place, compose_run
from runners.train import Training, prepare
from tasks.common import shapes
from tests.pretend_gpu import GPU, pretend_gpu

CPU = Place(device="cpu")


def test_quick_measures_the_digits_without_compiling() -> None:
    table = part.measure(CPU, quick=True)
    assert list(table.way) == ["plain loop", "bare", "ours", "probed", "bfloat16"]
    assert set(table.task) == {"digits_resnet"} and (table.ms > 0).all() and (table.speedup > 0).all()
    rows = table.set_index("way")
    assert rows.cost.notna().to_dict() == {way: way in ("ours", "probed") for way in rows.index}
    # The default probes 100 steps and every 20th of the other 500.
    assert rows.cost_of_default["probed"] == pytest.approx(rows.cost["probed"] * 125 / 600)
    assert "compile_s" not in table
    text = part.summary(table)
    assert "| digits_resnet |" in text and "probes at their default" in text and "Seconds to compile" not in text


@pytest.mark.parametrize("name", part.EMBEDDED)
def test_a_plain_loop_takes_steps_of_the_same_batches(name: str) -> None:
    run, _ = compose_run(part.EMBEDDED[name])
    prepare(run.task, CPU)
    loop = loops.loop_of(name, run.task)
    ours, plain = next(run.task.batches(0)), next(iter(loop.epoch()))
    assert len(plain) >= 2
    assert all(shapes(a) == shapes(b) for a, b in zip(plain, ours, strict=False))
    assert [part.dtype for part in plain] == [part.dtype for part in ours[: len(plain)]]
    model = run.task.model()
    assert loop.loss(model, plain).item() == pytest.approx(run.task.initial_loss, abs=0.7)
    losses = [loss.item() for _, loss in zip(range(12), part.plain_loop(run, torch.device("cpu")), strict=False)]
    assert losses[-1] < losses[0]


def test_a_plain_loop_takes_the_batches_nearest_to_ours_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Loop:
        def epoch(self) -> list[tuple[torch.Tensor]]:
            return [(torch.zeros(n),) for n in range(1, 101)]

        def loss(self, model: torch.nn.Linear, batch: list[torch.Tensor]) -> torch.Tensor:
            taken.append(batch[0].numel())
            return model.bias.sum()

    sizes = types.SimpleNamespace(
        one_shape=False, model=lambda: torch.nn.Linear(1, 1), batches=lambda seed: iter([(torch.zeros(70),)])
    )
    monkeypatch.setattr(part, "loop_of", lambda name, task: Loop())
    monkeypatch.setattr(part, "name_of", lambda task: "sizes")
    run: Any = types.SimpleNamespace(task=sizes, lr=0.1)
    for _ in zip(range(50), part.plain_loop(run, torch.device("cpu")), strict=False):
        pass
    assert sorted(taken) == list(range(45, 95)) or sorted(taken) == list(range(46, 96))


def test_the_plain_and_the_own_lstm_have_one_loss() -> None:
    run, _ = compose_run(part.EMBEDDED["pydocs_lstm"])
    prepare(run.task, CPU)
    model, loop = run.task.model(), loops.Topics(run.task)
    batches = list(loop.epoch())
    for i, batch in enumerate(batches[:3]):
        expected = run.task.loss(model, type(next(run.task.batches(0)))(*batch, torch.tensor(i == 0)))
        assert loop.loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_task_with_batches_of_several_shapes_is_measured_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.digits_resnet import DigitsResNet

    batches = DigitsResNet.batches

    def varied(self: DigitsResNet, seed: int, start: int = 0) -> Any:
        for i, batch in enumerate(batches(self, seed, start)):
            yield type(batch)(*(tensor[: 8 if i % 3 else 5] for tensor in batch))

    monkeypatch.setattr(DigitsResNet, "batches", varied)
    monkeypatch.setattr(DigitsResNet, "one_shape", False)
    run = part.composed(part.EMBEDDED["digits_resnet"], CPU)
    assert {len(batch.labels) for _, batch in zip(range(6), run.task.batches(0), strict=False)} == {8}
    steps = Training(run, run.task, torch.device("cpu")).steps(every=2)
    assert [next(steps) for _ in range(2)] == [(2, None), (4, None)]


def test_the_ways_are_those_that_a_task_has() -> None:
    digits = part.ways(part.EMBEDDED["digits_resnet"], compiled=True, device="cpu")
    assert list(digits) == ["bfloat16", "compiled", "everything"]
    cifar = part.ways(part.REAL["cifar10_resnet8"], compiled=True, device="cpu")
    assert list(cifar) == ["bfloat16", "channels_last", "compiled", "everything"]
    assert "channels_last" in part.ways(part.REAL["cifar10_resnet8"], compiled=False, device="cpu")
    run, _ = compose_run([*part.REAL["cifar10_resnet8"], *cifar["everything"]])
    assert (run.precision, run.execution, run.model_execution) == ("bfloat16", "compiled", "compiled")
    assert run.science["task"]["channels_last"]


def test_compiling_is_timed_in_two_processes_with_one_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    def step(run: Any, place: Place) -> float:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        files = list(Path(folder).iterdir())
        (Path(folder) / "program").touch()
        folders.append(folder)
        return 9.0 - 8 * len(files)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.setattr(part, "first_step", step)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda count, context: ThreadPoolExecutor(count))
    assert part.compile_seconds(compose_run([])[0], CPU) == (9.0, 1.0)
    assert folders[0] == folders[1] != "mine" == os.environ["TORCHINDUCTOR_CACHE_DIR"]


def test_the_summary_has_every_way_of_every_task() -> None:
    rows = [
        {"task": task, "way": way, "ms": ms, "speedup": 200 / ms, "cost": cost, "cost_of_default": share,
         "compile_s": compiled, "compile_again_s": again}
        for task in ("b", "a")
        for way, ms, cost, share, compiled, again in (
            ("plain loop", 200.0, None, None, None, None), ("ours", 100.0, 0.0123, None, None, None),
            ("probed", 120.0, 0.2, 0.041, None, None), ("everything", 40.0, None, None, 61.0, 7.0),
        )
    ]  # fmt: skip
    text = part.summary(pd.DataFrame([*rows, {"task": "a", "way": "channels_last", "ms": 90.0, "speedup": 2.2}]))
    for told in ("| 5.00 ", "+1.2%", "+20.0%", "+4.1%", "first process", " 61 ", " 7 "):
        assert told in text, told
    assert text.index("| b ") < text.index("| a ") and "nan" not in text


def test_a_gpu_has_graphs_too() -> None:
    words = part.REAL["cifar10_resnet8"]
    here, there = (part.ways(words, compiled=True, device=device) for device in ("cpu", "cuda"))
    assert set(there) - set(here) == {"cuda_graph", "graph_everything"}
    run, _ = compose_run([*words, *there["graph_everything"]])
    assert (run.precision, run.execution, run.model_execution) == ("bfloat16", "compiled", "cuda_graph")
    assert "execution=compiled" not in part.ways(words, compiled=False, device="cuda")["graph_everything"]


def test_all_of_it_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = part.ways
    # Autocast knows by itself that there is no GPU.
    monkeypatch.setattr(part, "ways", lambda *words: {"cuda_graph": ways(*words)["cuda_graph"]})
    monkeypatch.setattr(Place, "torch_device", lambda self: GPU if self.device == "cuda" else torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        with pretend_gpu():
            words = ["task=digits_resnet", "task.width=2", "task.batch_size=8"]
            table = part.of_task("digits", words, Place(device="cuda"), compiled=False, rounds=1, turn_s=0.02)
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(table.way) == ["plain loop", "bare", "ours", "probed", "cuda_graph"]
    assert (table.ms > 0).all() and "cuda_graph" in part.summary(table)


def test_a_plain_loop_is_as_torch_comes() -> None:
    seen = []

    def look() -> None:
        cudnn = torch.backends.cudnn
        seen.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.allow_tf32))

    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            part.as_torch_comes(look)()
            look()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, False, True), (True, True, False)]
