"""A decay refined from a run in the store or in a committed table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from optimizers.decays import Refined
from optimizers.sgd import SGD
from runners import collect
from runners.config import Run, UserError
from runners.refine import refined
from runners.store import Store
from tests.runners.conftest import MakeExperiment, sweep_of, tiny_run, trained

BOTH = {"norms": "all", "l1_norms": "all"}


@pytest.fixture(autouse=True)
def no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNTUNED_RESULTS", str(tmp_path / "results"))


def finished(run: Run, store: Store) -> str:
    result = trained(run, store)
    store.publish(result)
    return str(result.summary["id"])


def following(run_id: str, norm: str = "l1", **changes: object) -> Run:
    return tiny_run(decay=Refined(run=run_id, norm=norm), **changes)  # type: ignore[arg-type]


def test_it_trains_with_what_it_is_refined_to(store: Store) -> None:
    source = tiny_run(probes=BOTH, seed=41, steps=40)
    run_id = finished(source, store)
    norms = store.result(run_id).tables["history"]
    for norm, column in (("l1", "gradient_l1"), ("l2", "gradient_norm")):
        for steps in (40, 60):
            history = trained(following(run_id, norm, steps=steps), store).tables["history"]
            decay = Refined(run="f" * 16, norm=norm).from_norms(norms[column].astype(float))  # type: ignore[arg-type]
            factor = decay.factor(torch.arange(1, steps + 1, dtype=torch.float64), steps)
            np.testing.assert_allclose(history.lr, 0.01 * factor.numpy(), rtol=1e-12)
            assert history.lr.max() == pytest.approx(0.01, rel=0.05) and history.lr.iloc[-1] == 0


def test_the_l1_norm_is_recorded_where_it_is_asked_for(store: Store) -> None:
    tables = trained(tiny_run(probes={"l1_norms": (2, 5), "norms": "all"}, seed=42), store).tables
    history = tables["history"]
    assert list(history.step[history.gradient_l1.notna()]) == [2, 5] and history.gradient_norm.notna().all()
    # Between the l2 norm and sqrt(33 parameters) times it; by hand in test_train.
    ratio = (history.gradient_l1 / history.gradient_norm).dropna()
    assert ratio.between(1, 33**0.5).all() and (ratio > 1.5).all()


def test_the_id_names_what_it_follows(store: Store) -> None:
    one, other = following("0" * 16), following("1" * 16)
    assert one.id("x") != other.id("x") and one.science["decay"] == {"name": "refined", "run": "0" * 16, "norm": "l1"}
    run_id = finished(tiny_run(probes=BOTH, seed=43), store)
    known = refined(following(run_id), store)
    assert known.decay.known and known.id("x") == following(run_id).id("x")  # type: ignore[attr-defined]
    assert refined(known, store) is known
    plain = tiny_run()
    assert refined(plain, store) is plain


def line(run: Run, store: Store) -> str:
    with pytest.raises(UserError) as caught:
        trained(run, store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_followed_is_one_line_before_training(store: Store) -> None:
    prefix = "decay (refined): run "
    assert line(following("a" * 16), store) == (
        f"{prefix}{'a' * 16}: it is neither finished in the store nor in results/*/runs.csv"
    )
    run_id = finished(tiny_run(seed=44, steps=130), store)
    assert line(following(run_id), store) == (
        f"{prefix}{run_id}: it has l1 norms of its gradient at 0 of its 130 steps: "
        "run it again with probes.l1_norms=all"
    )
    assert "at 102 of its 130 steps: run it again with probes.norms=all" in line(following(run_id, "l2"), store)
    diverged = finished(tiny_run(probes=BOTH, seed=45, task={"how": "nan", "at": 9}), store)
    assert "it diverged, and only" in line(following(diverged), store)
    (store.root / diverged / "summary.json").write_text("{")
    assert "cannot be read" in line(following(diverged), store)


def test_from_committed_tables(
    store: Store, tiny_experiment: MakeExperiment, in_process: object, tmp_path: Path
) -> None:
    """A committed run of long ago lacks the l1 norms; the l2 norms of a run of 10 steps are all there."""
    experiment = tiny_experiment()
    sweep = sweep_of(experiment, store)
    sweep.train(1)
    folder = tmp_path / "results" / "tiny"
    collect.collect(sweep.design, sweep.cells(), store, folder)
    empty = Store(tmp_path / "elsewhere")
    run_id = pd.read_csv(folder / "runs.csv").run[0]
    there, here = (refined(following(run_id, "l2"), s).decay for s in (store, empty))
    t = torch.arange(1, 31, dtype=torch.float64)
    assert torch.equal(there.factor(t, 30), here.factor(t, 30))
    assert "at 0 of its 10 steps: run it again with probes.l1_norms=all" in line(following(run_id), empty)


def test_a_sweep_says_it_when_it_plans(store: Store, tiny_experiment: MakeExperiment) -> None:
    run_id = finished(tiny_run(probes=BOTH, seed=46, optimizer=SGD()), store)
    arms = {"warm": ("warmup=linear", "warmup.tau=5"), "none": ("decay=refined", f"decay.run='{run_id}'")}
    sweep = sweep_of(tiny_experiment(arms=arms), store)
    assert all(seconds > 0 for seconds in sweep.seconds_a_run.values())
    assert sweep.design.base["none", "tiny"].decay.known  # type: ignore[attr-defined]
    arms["none"] = ("decay=refined", "decay.run=aaaaaaaaaaaaaaaa")
    with pytest.raises(UserError, match="aaaaaaaaaaaaaaaa: it is neither"):
        sweep_of(tiny_experiment(arms=arms), store)
