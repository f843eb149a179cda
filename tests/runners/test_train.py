"""One run: repeatable and resumable to the bit, honest about divergence and about what the optimizer used."""

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from optimizers import decays, warmups
from optimizers.engine import Engine
from optimizers.lookahead import Lookahead
from optimizers.radam import RAdam
from optimizers.scaling import Linear, Sqrt
from optimizers.sgd import SGD
from runners import forward
from runners import train as training
from runners.config import Place, Probes, Run, compose_run
from runners.experiment import value
from runners.initialisations import GradInit
from runners.store import Result, Store
from runners.train import Interrupted, make_optimizer, prepare, train
from runners.worker import Job, carry_out
from tasks.digits_resnet import DigitsResNet
from tests.pretend_gpu import GPU, pretend_gpu
from tests.runners.conftest import tiny_run, trained
from tests.runners.tiny import Tiny


def same(one: Result, other: Result) -> None:
    """Equal to the bit."""
    assert one.summary["metrics"] == other.summary["metrics"]
    assert one.tables.keys() == other.tables.keys()
    for name, table in one.tables.items():
        pd.testing.assert_frame_equal(table, other.tables[name], check_exact=True)


LSTM = ["task=pydocs_lstm", "task.batch_size=4", "task.bptt=5", "task.width=8", "task.dropout=.1", "lr=.01", "steps=20"]
DIGITS = ["task=digits_resnet", "task.width=4", "task.batch_size=16", "lr=.01", "steps=20"]
EVERYTHING = {"update_quantiles": (2, 9, 20), "gradient_histogram": (1, 17)}
RUNS = {
    "tiny": lambda: tiny_run(steps=20, probes=EVERYTHING),
    "lookahead": lambda: tiny_run(steps=20, optimizer=Lookahead(k=3, momentum="pullback"), probes=EVERYTHING),
    "radam": lambda: tiny_run(steps=20, optimizer=RAdam(), weight_decay=0.1, weight_decay_on="matrices", clip_norm=0.1),
    "bfloat16": lambda: tiny_run(steps=20, precision="bfloat16", execution="eager"),
    "digits": lambda: compose_run(DIGITS)[0],
    "lstm": lambda: compose_run(LSTM)[0],
    "gradinit": lambda: tiny_run(steps=20, initialisation=GradInit(iterations=5), probes={"l1_norms": "all"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_repeated_or_resumed_it_is_the_same_to_the_bit(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    run = RUNS[name]()
    straight = trained(run, store)
    torch.randn(3)  # the state of the global generator does not matter
    same(trained(run, store), straight)

    def stop(t: int) -> None:
        if t == 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        trained(run, store, checkpoint_every=3, progress=stop)
    assert store.checkpoint(straight.summary["id"]).exists()
    resumed = trained(run, store, checkpoint_every=3)
    assert resumed.summary["seconds"]["from_step"] == 8
    same(resumed, straight)


# Autocast knows by itself that there is no GPU.
@pytest.mark.parametrize("name", sorted(set(RUNS) - {"bfloat16"}))
def test_on_a_gpu_a_run_is_the_same_and_waits_at_looks_alone(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECK_EVERY", 5)
    run = RUNS[name]()
    run = run.replace(probes=Probes(norms="all", l1_norms="all", update_quantiles="all", gradient_histogram="all"))
    here = trained(run, store)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    looks: list[list[str]] = []
    with pretend_gpu() as waits:
        run.task.prepare(GPU, None)
        there = train(run, run.task, GPU, store, progress=lambda t: (looks.append(waits[:]), waits.clear())[1])
    assert looks[1:] == [["_to_copy from the GPU"]] * 3
    assert there.summary["environment"]["device"] == "cuda"
    for key, table in here.tables.items():
        pd.testing.assert_frame_equal(there.tables[key], table, rtol=1e-4, atol=1e-6)
    for split, metrics in here.summary["metrics"].items():
        assert there.summary["metrics"][split] == pytest.approx(metrics, rel=1e-5)


def test_on_a_gpu_what_cannot_be_repeated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(Place, "torch_device", lambda self: GPU)
    try:
        with pretend_gpu():
            assert prepare(Tiny(), Place(device="cuda")) == GPU
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


# -- evaluation of averaged weights --------------------------------------------------------------------------


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_averaged_weights_are_evaluated_with_their_own_batch_norm_statistics(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by hand: the average is copied into a model of its own, torch's update_bn is run on it, and it is evaluated;
    training's weights and statistics are untouched."""
    monkeypatch.setattr(forward, "BATCHES", 5)
    made: list[tuple[nn.Module, Engine]] = []
    seen: list[dict[str, Tensor]] = []
    make, evaluate = training.make_optimizer, DigitsResNet.evaluate

    def keep(run: Run, model: nn.Module) -> Engine:
        made.append((model, make(run, model)))
        return made[-1][1]

    def look(self: DigitsResNet, model: nn.Module, split: Any) -> dict[str, Tensor]:
        seen.append(buffers_of(model))
        return evaluate(self, model, split)

    monkeypatch.setattr(training, "make_optimizer", keep)
    monkeypatch.setattr(DigitsResNet, "evaluate", look)
    run, without = (compose_run([*DIGITS, f"optimizer={name}", "lr=.1", "seed=2"])[0] for name in ("gadam", "adamw"))
    result = trained(run, store)
    trained(without, store)
    (model, optimizer), (plain, _) = made
    same_state = plain.state_dict()
    assert all(torch.equal(value, same_state[name]) for name, value in model.state_dict().items())

    copy = run.task.model()
    copy.load_state_dict(model.state_dict())
    for p, own in zip(copy.parameters(), model.parameters(), strict=True):
        p.data.copy_(optimizer.state[own]["average"])
    batches = itertools.islice(run.task.batches(training._stream(2, "evaluation")), 5)
    torch.optim.swa_utils.update_bn([batch.images for batch in batches], copy)
    for name, buffer in copy.named_buffers():
        assert torch.equal(buffer, seen[0][name]) and torch.equal(buffer, seen[1][name]), name
        assert not torch.equal(buffer, same_state[name]), name
    assert result.summary["metrics"]["test"] == {k: float(v) for k, v in evaluate(run.task, copy, "test").items()}


def test_without_an_average_or_batch_norm_nothing_is_estimated_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    update = forward.update_bn
    monkeypatch.setattr(forward, "update_bn", lambda *given: (called.append(given), update(*given)))
    trained(tiny_run(), store)
    assert not called
    losses: list[Any] = []
    loss = Tiny.loss
    monkeypatch.setattr(Tiny, "loss", lambda self, *given: (losses.append(1), loss(self, *given))[1])
    trained(tiny_run(optimizer=Lookahead()), store)
    assert called and len(losses) == 30  # there is an average, but no layer that keeps statistics


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_estimating_anew_leaves_everything_as_it_was(precision: str) -> None:
    run = compose_run([*DIGITS, f"precision={precision}"])[0]
    run.task.prepare(torch.device("cpu"), None)
    model = run.task.model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator, momenta = torch.get_rng_state(), [getattr(m, "momentum", None) for m in model.modules()]
    with (  # noqa: PT012 - also when the evaluation fails
        pytest.raises(KeyError),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
        forward.reestimated(run.task, model, 3),
    ):
        assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator) and all(m.training for m in model.modules())
    assert [getattr(m, "momentum", None) for m in model.modules()] == momenta


def test_another_seed_is_another_run(store: Store) -> None:
    one, other = (trained(tiny_run(seed=seed), store) for seed in (1, 2))
    assert not np.isclose(one.tables["history"].loss, other.tables["history"].loss).any()


def test_arms_of_a_seed_share_initialisation_and_data(store: Store) -> None:
    first = {trained(tiny_run(optimizer=o), store).tables["history"].loss[0] for o in (RAdam(), SGD(), Lookahead())}
    assert len(first) == 1


def test_checkpoints_come_as_often_as_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHECK_EVERY", 5)
    saved: list[int] = []
    monkeypatch.setattr(training.Checkpoint, "save", lambda self, t: saved.append(t))
    trained(tiny_run(steps=30), store, checkpoint_every=7)
    assert saved == [10, 20]  # the first looks at the device at least 7 steps after the last; none at the end
    saved.clear()
    trained(tiny_run(steps=30), store, checkpoint_every=5)
    assert saved == [5, 10, 15, 20, 25]


def interrupted(run: Run, store: Store) -> Path:
    """The checkpoint of a run that was stopped at step 25."""

    def stop(t: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        trained(run, store, checkpoint_every=10, progress=stop)
    return store.checkpoint(run.id(run.task.fingerprint()))


@pytest.mark.parametrize("how", ["cut", "garbage", "empty", "other version", "other parts", "no probe"])
def test_a_checkpoint_that_cannot_be_used_is_not(how: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(steps=40)
    straight = trained(run, store)
    path = interrupted(run, store)
    data = path.read_bytes()
    if how == "cut":  # kill -9 in the middle of writing cannot do this, a failing disk can
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif how == "other parts":  # of a version of the code that named a layer otherwise
        saved = torch.load(path, weights_only=True)
        saved["model"] = {f"old.{name}": value for name, value in saved["model"].items()}
        torch.save(saved, path)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other version":
        with monkeypatch.context() as patch:
            patch.setattr(training, "environment", lambda device: {"torch": "0.4"})
            interrupted(run, store)
    else:
        run = run.replace(probes=training.Probes(update_quantiles=(3,)))
    again = trained(run, store, checkpoint_every=10)
    assert again.summary["seconds"]["from_step"] == 0
    pd.testing.assert_frame_equal(again.tables["history"], straight.tables["history"], check_exact=True)
    assert ("quantiles" in again.tables) is (how == "no probe")


def test_the_old_checkpoint_stays_when_a_new_one_cannot_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted(tiny_run(steps=60), store)
    old = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(training.UserError, match="No space left on device"):
        interrupted(tiny_run(steps=60), store)
    assert path.read_bytes() == old and not list(path.parent.glob(".*"))


# -- divergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 24, 25, 26, 39, 40])
@pytest.mark.parametrize("how", ["nan", "inf", "huge"])
def test_divergence_has_its_exact_step_and_a_truncated_history(how: str, at: int, store: Store) -> None:
    probes = {"update_quantiles": (1, 30), "gradient_histogram": (30,)}
    result = trained(tiny_run(steps=40, task={"how": how, "at": at}, probes=probes), store)
    summary, history = result.summary, result.tables["history"]
    assert (summary["status"], summary["diverged_at"]) == ("diverged", at)
    assert list(history.step) == list(range(1, at + 1))
    assert np.isfinite(history.loss[: at - 1]).all() and not history.loss.iloc[-1] <= 10
    last = at if how == "huge" else at - 1
    assert summary["last_finite"] == ({"step": last, "loss": float(history.loss[last - 1])} if last else None)
    assert summary["metrics"] == {} and value(summary, "test") == value(summary, "validation") == summary["worst"]
    assert list(result.tables["quantiles"].step) == [t for t in (1, 30) if t <= at]
    assert list(result.tables["histogram"].step) == [t for t in (30,) if t <= at]
    assert store.publish(result) and store.status(summary["id"]) == "diverged"


def test_up_to_its_end_a_diverged_run_is_the_healthy_one(store: Store) -> None:
    healthy = trained(tiny_run(steps=40), store).tables["history"]
    diverged = trained(tiny_run(steps=40, task={"how": "nan", "at": 33}), store).tables["history"]
    pd.testing.assert_frame_equal(diverged[:32], healthy[:32], check_exact=True)


@pytest.mark.parametrize(("at", "seen"), [(20, 21), (40, 40)])
def test_broken_weights_are_divergence_too(at: int, seen: int, store: Store) -> None:
    # Their loss was finite; it shows in the next step's loss, or after the last step in the evaluation.
    summary = trained(tiny_run(steps=40, task={"how": "weights", "at": at}), store).summary
    assert (summary["status"], summary["diverged_at"], summary["metrics"]) == ("diverged", seen, {})


# -- errors --------------------------------------------------------------------------------------------------


def job_of(run: Run) -> Job:
    run.task.prepare(torch.device("cpu"), None)
    return Job(run.id(run.task.fingerprint()), run)


def test_an_exception_is_an_error_that_is_recorded_and_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, place = job_of(tiny_run(task={"how": "raise", "at": 4})), Place(device="cpu", store=str(store.root))
    for _ in range(2):
        event = carry_out(job, place, {})
        assert (event.kind, event.text) == ("error", "in two lines")
        assert store.status(job.run_id) == "error" and "the task is broken" in store.error(job.run_id)
        assert not store.claimed(job.run_id)
    monkeypatch.setattr(type(job.run.task), "loss", lambda self, model, batch: model(batch[1]).square().mean())
    assert carry_out(job, place, {}).kind == "done"
    assert store.status(job.run_id) == "done"


def test_data_that_changed_since_the_plan_stops_the_sweep(store: Store) -> None:
    job = job_of(tiny_run())
    event = carry_out(Job("f" * 16, job.run), Place(device="cpu", store=str(store.root)), {})
    assert event.kind == "failed" and "the data of task tiny has changed" in event.text
    assert not store.ids()


def test_a_run_that_somebody_has_is_left_to_them(store: Store) -> None:
    job = job_of(tiny_run())
    with store.claim(job.run_id):
        assert carry_out(job, Place(device="cpu", store=str(store.root)), {}).kind == "elsewhere"
    assert not store.ids()


def test_a_result_without_a_probe_that_is_now_asked_for_is_replaced_and_keeps_what_it_had(store: Store) -> None:
    place = Place(device="cpu", store=str(store.root))
    for probes in ({"update_quantiles": (2,)}, {"gradient_histogram": (3,)}, {"update_quantiles": (5,), "norms": ()}):
        assert carry_out(job_of(tiny_run(probes=probes)), place, {}).kind == "done"
    (run_id,) = store.ids()
    tables = store.result(run_id).tables
    assert list(tables["quantiles"].step) == [2, 5] and list(tables["histogram"].step) == [3]
    assert tables["history"].update_rms.notna().all()
    seconds = store.summary(run_id)["seconds"]  # type: ignore[index]
    assert carry_out(job_of(tiny_run(probes={"update_quantiles": (2, 5)})), place, {}).kind == "done"
    assert store.summary(run_id)["seconds"] == seconds  # type: ignore[index] # not trained again
    assert len(list((store.root / ".aside").iterdir())) == 2


# -- what is recorded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", list(warmups.WARMUPS))
@pytest.mark.parametrize("decay", list(decays.DECAYS))
def test_the_lr_and_warmup_columns_are_what_the_optimizer_used(
    warmup: str, decay: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    advance = Engine._advance

    def spy(self: Engine, *arguments: Any) -> None:
        used.append(arguments[-2])
        advance(self, *arguments)

    monkeypatch.setattr(Engine, "_advance", spy)
    omega = warmups.make(warmup, **({"tau": 7.5} if warmup in ("linear", "exponential") else {}))
    own = {"milestones": {"at": (0.4, 0.7)}, "inverse_sqrt": {"tau": 5.0}, "refined": {"run": "0" * 16}}.get(decay, {})
    eta = decays.make(decay, **own)
    if isinstance(eta, decays.Refined):
        eta = eta.from_norms([9.0, 4.0, 1.0, 2.0, 5.0])
    run = tiny_run(warmup=omega, decay=eta, lr=0.005, scaling=Linear(base=4))  # the batch is 16
    history = trained(run, store).tables["history"]
    np.testing.assert_allclose(history.lr, used, rtol=1e-12)
    t = torch.arange(1, 31, dtype=torch.float64)
    np.testing.assert_array_equal(history.warmup, omega.factor(t, 0.999))


def by_hand(run: Run) -> dict[str, list[Any]]:
    """Losses, gradients and changes of the parameters of every step, from a loop of its own."""
    run.task.prepare(torch.device("cpu"), None)
    torch.manual_seed(run.seed)
    model = run.task.model()
    torch.manual_seed(training._stream(run.seed, "training"))
    optimizer = make_optimizer(run, model)
    batches = run.task.batches(run.seed)
    kept: dict[str, list[Any]] = {"loss": [], "gradient": [], "change": []}

    def flat(tensors: Any) -> np.ndarray:
        return np.concatenate([t.detach().double().flatten().numpy() for t in tensors])

    for _ in range(run.steps):
        loss = run.task.loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        before = flat(model.parameters())
        gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
        kept["loss"].append(loss.item())
        kept["gradient"].append(flat(gradients))
        optimizer.step()
        kept["change"].append(flat(model.parameters()) - before)
    return kept


def test_probes_equal_direct_computation_at_the_listed_steps_only(store: Store) -> None:
    probes = {
        "norms": (1, 4, 30, 99),
        "l1_norms": (1, 4, 30),
        "update_quantiles": (2, 30),
        "gradient_histogram": (1, 7),
    }
    scaled = {"lr": 0.01, "scaling": Sqrt(base=4)}  # to .02
    run = tiny_run(probes=probes, clip_norm=0.05, warmup=warmups.UntunedLinear(), weight_decay=0.1, **scaled)
    tables, direct = trained(run, store).tables, by_hand(run)
    history = tables["history"]
    np.testing.assert_allclose(history.loss, direct["loss"], rtol=1e-6)
    for t in range(1, 31):
        row = history.iloc[t - 1]
        if t in (1, 4, 30):
            change = direct["change"][t - 1]
            assert row.gradient_norm == pytest.approx(np.linalg.norm(direct["gradient"][t - 1]), rel=1e-5)
            assert row.gradient_norm > 0.05  # before clipping
            assert row.gradient_l1 == pytest.approx(np.abs(direct["gradient"][t - 1]).sum(), rel=1e-5)
            assert row.update_rms == pytest.approx(np.sqrt((change**2).mean()), rel=1e-4)
        else:
            assert math.isnan(row.gradient_norm) and math.isnan(row.update_rms)
    assert list(tables["quantiles"].step) == [2, 30] and list(tables["histogram"].step) == [1, 7]
    for _, row in tables["quantiles"].iterrows():
        sizes = np.abs(direct["change"][int(row.step) - 1]) / 0.02
        for q in (10, 25, 50, 75, 90):
            expected = np.quantile(sizes, q / 100, method="nearest")
            assert row[f"q{q}"] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    for _, row in tables["histogram"].iterrows():
        logs = np.log10(np.abs(direct["gradient"][int(row.step) - 1]))
        expected, edges = np.histogram(logs, np.linspace(-12, 2, 57))
        assert [float(c) for c in row.index[1:]] == pytest.approx(edges[:-1])
        np.testing.assert_array_equal(row.to_numpy()[1:], expected)


def test_gradients_outside_the_histogram_are_in_its_first_or_last_bin(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runners.probes import Recorder

    run = tiny_run(probes={"gradient_histogram": (1,)})
    run.task.prepare(torch.device("cpu"), None)
    model = run.task.model()
    recorder = Recorder(run, model, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    first = next(model.parameters())
    assert first.grad is not None
    first.grad.view(-1)[:4] = torch.tensor([1e30, -1e30, 1e-30, 3.0])
    recorder.before_step(1, torch.tensor(1.0))
    row = recorder.buffers["histogram"][0]
    count = sum(p.numel() for p in model.parameters())
    assert (row[0], row[-1], row.sum()) == (count - 3, 2, count)
    assert row[int((math.log10(3) + 12) / 0.25)] == 1


def test_default_probes(store: Store) -> None:
    result = trained(tiny_run(steps=130), store)
    measured = set(result.tables["history"].step[result.tables["history"].gradient_norm.notna()])
    assert measured == {*range(1, 101), 120, 130} and result.tables.keys() == {"history"}
    assert result.tables["history"].loss.notna().all()


def test_what_a_result_says_of_itself(store: Store) -> None:
    run = tiny_run(seed=5)
    result = trained(run, store)
    assert result.summary["metrics"].keys() == {"validation", "test"}
    assert result.summary["metrics"]["test"].keys() == {"loss", "root"}
    assert result.config == {**run.science, "probes": training.vars_of(run.probes)}
    p = result.provenance
    assert p["data"] == run.task.fingerprint() and p["torch"] == torch.__version__ and p["parameters"] == 33
    assert len(p["git"]) == 40 or p["git"] == "unknown"
    store.publish(result)
    same(store.result(result.summary["id"]), result)
