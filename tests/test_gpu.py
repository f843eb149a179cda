"""What only a real GPU can show: its kernels repeat themselves, agree with the CPU's, and can be replayed as graphs."""

import copy
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from optimizers import engine
from optimizers import execution as compiling
from optimizers.rule import available
from runners.config import Place, Run, UserError, compose_run
from runners.store import Result, Store
from runners.train import Interrupted, prepare, train
from tests.optimizers.problems import difference, run, start
from tests.optimizers.test_compiled import OPTIONS, STEPS, TOLERANCE, no_compiler, optimizer_of
from tests.runners.test_loss import EMBEDDED
from tests.tasks.conftest import SMALL

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

PLACE = Place(device="cuda")
WAYS: dict[str, list[str]] = {
    "eager": [],
    "bfloat16": ["precision=bfloat16"],
    "compiled": ["model_execution=compiled", "execution=compiled"],
    "cuda_graph": ["model_execution=cuda_graph"],
    "cuda_graph_bfloat16": ["model_execution=cuda_graph", "precision=bfloat16", "execution=compiled"],
}


HEADS_OF_64 = ["task.width=128", "task.heads=2"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def prepared(task: str, way: str, *more: str) -> Run:
    if "execution=compiled" in WAYS[way] and (reason := no_compiler()):
        pytest.skip(reason)
    found, _ = compose_run([*EMBEDDED[task], *WAYS[way], "lr=.01", "steps=40", "warmup=untuned_linear", *more])
    prepare(found.task, PLACE)
    return found


def result(run: Run, store: Store, **options: Any) -> Result:
    return train(run, run.task, PLACE.torch_device(), store, **options)


def same(one: Result, other: Result) -> None:
    assert one.summary["metrics"] == other.summary["metrics"]
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, other.tables[name], check_exact=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("task", EMBEDDED)
def test_a_run_repeats_itself_to_the_bit_whatever_ran_before(task: str, way: str, store: Store) -> None:
    run = prepared(task, way)
    first = result(run, store)
    result(run.replace(seed=run.seed + 1, lr=0.1), store)
    same(result(run, store), first)
    assert first.summary["environment"]["device"] == "cuda"


@pytest.mark.parametrize("way", ["bfloat16", "cuda_graph_bfloat16"])
def test_fused_attention_repeats_itself(way: str, store: Store) -> None:
    run = prepared("phrases_transformer", way, *HEADS_OF_64)
    same(result(run, store), result(run, store))


@pytest.mark.parametrize("task", EMBEDDED)
def test_graphs_are_the_eager_passes_to_the_bit(task: str, store: Store) -> None:
    same(result(prepared(task, "cuda_graph"), store), result(prepared(task, "eager"), store))


@pytest.mark.parametrize("task", EMBEDDED)
def test_the_first_losses_are_those_of_the_cpu(task: str, store: Store) -> None:
    """The same weights, which are drawn on the CPU, and the same batches; dropout draws other numbers."""
    words = ["steps=10", *(["task.dropout=0"] if "task.dropout=.1" in EMBEDDED[task] else [])]
    there = prepared(task, "eager", *words)
    on_gpu = result(there, store).tables["history"].loss
    here = copy.copy(there.task)
    prepare(here, Place(device="cpu"))
    on_cpu = train(there.replace(task=here), here, torch.device("cpu"), store).tables["history"].loss
    assert on_gpu.to_numpy() == pytest.approx(on_cpu.to_numpy(), rel=1e-3)


@pytest.mark.parametrize("task", EMBEDDED)
def test_in_bfloat16_they_are_near(task: str, store: Store) -> None:
    exact, rounded = (result(prepared(task, way, "steps=10"), store) for way in ("eager", "bfloat16"))
    assert rounded.tables["history"].loss.to_numpy() == pytest.approx(exact.tables["history"].loss.to_numpy(), rel=0.03)


@pytest.mark.parametrize("way", ["eager", "cuda_graph"])
def test_a_run_resumes_to_the_bit(way: str, store: Store) -> None:
    run = prepared("pydocs_lstm", way, "task.layers=2")
    straight = result(run, store)

    def stop(t: int) -> None:
        if t == 25:
            raise Interrupted

    with pytest.raises(Interrupted):
        result(run, store, checkpoint_every=10, progress=stop)
    resumed = result(run, store, checkpoint_every=10)
    assert resumed.summary["seconds"]["from_step"] == 25
    same(resumed, straight)


@pytest.mark.parametrize("execution", ["eager", "flat", "compiled"])
@pytest.mark.parametrize("name", available())
def test_every_rule_agrees_with_the_cpu(name: str, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if execution == "compiled" and (reason := no_compiler()):
        pytest.skip(reason)
    # The matrix stays where it is, and the vector is joined; few places take less time to compile.
    monkeypatch.setattr(engine, "ALONE", 12)
    monkeypatch.setattr(compiling, "SLOTS", 2)

    def end(device: str, execution: str) -> list[Tensor]:
        params = [nn.Parameter(p.detach().to(device)) for p in start()]
        return [p.cpu() for p in run(optimizer_of(name, params, execution, **OPTIONS), params, 1, STEPS)]

    assert difference(end("cuda:0", execution), end("cpu", "eager")) < 10 * TOLERANCE


@pytest.mark.parametrize("task", ["multi30k_transformer", "ptb_lstm", "cifar10_resnet", "wikitext_transformer"])
def test_the_papers_tasks_train_as_graphs(task: str, store: Store) -> None:
    words = [f"task.{key}={value}" for key, value in SMALL[task].items() if not isinstance(value, tuple)]
    run, _ = compose_run([f"task={task}", *words, "lr=.001", "steps=60"])
    try:
        prepare(run.task, PLACE)
    except UserError as error:
        pytest.skip(str(error))
    same(result(run.replace(model_execution="cuda_graph"), store), result(run, store))
