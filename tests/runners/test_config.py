"""Runs as values: every mistake is one line before any training, and equal science has equal ids."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from optimizers import decays, scaling, warmups
from optimizers.adam import Adam
from optimizers.radam import RAdam
from optimizers.sgd import SGD
from runners import run as run_app
from runners.config import CONF, Place, Probes, Run, UserError, compose_run, from_config
from runners.initialisations import GradInit
from runners.train import prepare
from tests.runners.conftest import tiny_run
from tests.runners.tiny import Tiny

BAD: list[tuple[list[str], str]] = [
    # what is written, and what the line must say
    (["scaling=linear"], "scaling.base: a value is needed, as in scaling.base=..."),
    (["scaling=surge", "scaling.base=8", "scaling.noise=0"], "scaling (surge): noise: input should be greater than 0"),
    (["scaling=squrt"], "scaling: 'squrt' is not known; did you mean 'sqrt'?"),
    (["decay=refined"], "decay.run: a value is needed"),
    (["decay=refined", "decay.run=12"], "decay (refined): run: input should be a valid string (got 12)"),
    (["decay=refined", "decay.run=my_run"], "decay (refined): run: string should match pattern"),
    (
        ["initialisation=gradinit", "initialisation.gamma=0"],
        "initialisation (gradinit): gamma: input should be",
    ),
    (["optimizer.betta2=.9"], "unknown key 'optimizer.betta2'; did you mean 'beta2'?"),
    (["optmizer=adam"], "unknown key 'optmizer'; did you mean 'optimizer'?"),
    (["+foo=1"], "unknown key 'foo'; there are: clip_norm"),
    (["optimizer=adamm"], "optimizer: 'adamm' is not known; did you mean 'adam'?"),
    (["warmup=lnear"], "warmup: 'lnear' is not known; did you mean 'linear'?"),
    (["task=digits"], "task: 'digits' is not known; did you mean 'digits_resnet'?"),
    (["task.widht=3"], "unknown key 'task.widht'; did you mean 'width'?"),
    (["optimizer=lookahead", "optimizer.inner.beta3=.9"], "unknown key 'optimizer.inner.beta3'; did you mean 'beta2'?"),
    (["optimizer=lookahead", "optimizer@optimizer.inner=sgdd"], "did you mean 'sgd'?"),
    (["probes.normz=[1]"], "unknown key 'probes.normz'; did you mean 'norms'?"),
    (["lr=0"], "lr: input should be greater than 0 (got 0)"),
    (["lr=-1"], "lr: input should be greater than 0 (got -1)"),
    (["lr=nan"], "lr: input should be a finite number"),
    (["lr='1e-3'"], "lr: input should be a valid number (got '1e-3')"),
    (["lr=null"], "lr: input should be a valid number (got None)"),
    (["lr=.1,.2"], "lr=.1,.2"),
    (["lr"], "'lr' is not of the form key=value"),
    (["=3"], "'=3' is not of the form key=value"),
    (["optimizer=null"], "optimizer"),
    (["~optimizer"], "optimizer: one is needed"),
    (["optimizer.beta2=1"], "optimizer (adam): beta2: input should be less than 1 (got 1)"),
    (["optimizer.beta2=abc"], "optimizer (adam): beta2: input should be a valid number (got 'abc')"),
    (["optimizer.beta2=.9", "optimizer=sgd"], "unknown key 'optimizer.beta2'; there are: momentum"),
    (["optimizer=radam", "warmup=linear"], "radam has its own warmup, so warmup must be none, not linear"),
    (["optimizer=sgd", "warmup=untuned_linear"], "takes its length from beta2, and this optimizer has none"),
    (["seed=-1"], "seed: input should be greater than or equal to 0"),
    (["seed=1.5"], "seed: input should be a valid integer"),
    (["steps=0"], "steps: input should be greater than or equal to 1"),
    (["task.width=0"], "task (digits_resnet): width: input should be greater than or equal to 1"),
    (["task=phrases_transformer", "task.heads=5"], "heads=5"),
    (["weight_decay_mode=coupledd"], "'none', 'coupled', 'decoupled', 'proximal' or 'internal' (got 'coupledd')"),
    (["execution=falt"], "'eager', 'flat' or 'compiled' (got 'falt')"),
    (["model_execution=graphs"], "model_execution: input should be 'eager', 'compiled' or 'cuda_graph' (got 'graphs')"),
    (["precision=fp16"], "'float32' or 'bfloat16' (got 'fp16')"),
    (["probes.norms=[0]"], "probes: norms.0: input should be greater than or equal to 1 (got 0)"),
    (["probes.norms=defualt"], "probes: norms"),
    (["checkpoint_every=-1"], "checkpoint_every: input should be greater than or equal to 0"),
    (["logger=tensorboard"], "'none' or 'wandb' (got 'tensorboard')"),
    (["store=null"], "store: input should be a valid string"),
]


@pytest.mark.parametrize(("words", "says"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_mistake_is_one_line_that_names_it(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_run(words)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["lr=0"], ["-m", "lr=.1,0"], ["-m", "optimizer.beta3=.9,.8"]])
def test_the_command_line_says_it_before_hydra_starts(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["run", *words])
    monkeypatch.setattr(run_app, "app", lambda: pytest.fail("it started"))
    with pytest.raises(SystemExit) as caught:
        run_app.main()
    assert str(caught.value.code).startswith("error: ") and "\n" not in str(caught.value.code)


@pytest.mark.parametrize("device", ["cuda:77", "foo", "meta", "mps"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(UserError, match=f"^device '{device}' is not there: [^\n]*$"):
        Place(device=device).torch_device()


def test_data_that_is_not_enough_is_one_line() -> None:
    run, _ = compose_run(["task=digits_resnet", "task.batch_size=99999"])
    with pytest.raises(UserError, match=r"^task \(digits_resnet\): batch_size=99999 is larger[^\n]*$"):
        prepare(run.task, Place(device="cpu"))


def test_where_goes_first() -> None:
    with pytest.raises(UserError, match=r"^experiment e, arm a: lr: "):
        compose_run(["lr=0"], where="experiment e, arm a")


# -- ids -----------------------------------------------------------------------------------------------------


def composed(*words: str) -> Run:
    return compose_run(list(words))[0]


SAME = [
    (["lr=1"], ["lr=1.0"]),
    (["lr=1e-3"], []),
    (["optimizer.beta2=0"], ["optimizer.beta2=0.0"]),
    (["lr=.01", "seed=3"], ["seed=3", "lr=.01"]),
    (["optimizer.beta1=.9", "optimizer.eps=1e-8", "weight_decay=0", "task.width=8", "steps=600"], []),
    (["clip_norm=1"], ["clip_norm=1.0"]),
    (["weight_decay_mode=coupled"], ["weight_decay_mode=proximal"]),
    (["weight_decay_on=matrices"], []),
    (["weight_decay=.1", "weight_decay_mode=coupled"], ["weight_decay=0.1"]),
    (["device=cpu", "store=/x", "logger=wandb", "checkpoint_every=5", "data_root=/d"], []),
    (["probes.norms=[1,2]", "probes.update_quantiles=default"], []),
    (["optimizer=lookahead"], ["optimizer=lookahead", "optimizer.inner.beta2=.999", "optimizer.k=5"]),
    (["optimizer=adam_eps"], ["optimizer=adam", "optimizer.eps=1e-4"]),
    # A scaling rule is nothing but another rate.
    (["scaling=linear", "scaling.base=16", "lr=.01"], ["lr=.04"]),
    (["scaling=surge", "scaling.base=64", "scaling.noise=9"], []),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=[" ".join(one) for one, _ in SAME])
def test_the_same_science_has_the_same_id(one: list[str], other: list[str]) -> None:
    assert composed(*one).id("data") == composed(*other).id("data")


BASE = tiny_run(weight_decay=0.1)
OTHER: dict[str, Any] = {
    "optimizer": RAdam(), "warmup": warmups.UntunedLinear(), "decay": decays.Cosine(),
    "task": tiny_run(task={"at": 1}).task, "lr": 0.02, "seed": 2, "steps": 31, "weight_decay": 0.2,
    "weight_decay_mode": "proximal", "weight_decay_on": "matrices", "clip_norm": 1.0,
    "precision": "bfloat16", "execution": "eager", "scaling": scaling.Sqrt(base=8),
    "initialisation": GradInit(), "model_execution": "compiled",
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Run) if f.name != "probes"])
def test_every_field_of_the_science_changes_the_id(field: str) -> None:
    assert BASE.replace(**{field: OTHER[field]}).id("data") != BASE.id("data")


def test_ids_of_committed_runs_stay() -> None:
    # As they were before runs had scaling and initialisation.
    assert composed().id("data") == "3993eefb8e3034f5"
    words = ["task=phrases_transformer", "optimizer=lookahead", "warmup=untuned_linear", "decay=cosine"]
    assert composed(*words, "weight_decay=.1", "clip_norm=1").id("data") == "625daf8c926aadfa"
    assert Probes(**{"norms": "default", "update_quantiles": [], "gradient_histogram": []}).covers(Probes(), 300)


def test_an_id_of_digits_alone_can_be_named() -> None:
    decay = composed("decay=refined", "decay.run='0123456789012345'").decay
    assert decay == decays.Refined(run="0123456789012345")


def test_scaling_needs_a_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(BASE.task), "batch_size")
    assert BASE.replace(seed=3).peak_lr == BASE.lr
    with pytest.raises(ValueError, match="scaling linear: task tiny has no batch_size"):
        BASE.replace(scaling=scaling.Linear(base=8))


def test_data_and_revisions_change_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {BASE.id("data"), BASE.id("other")}
    for thing in (type(BASE.optimizer), type(BASE.task)):
        with monkeypatch.context() as patch:
            patch.setattr(thing, "revision", 99)
            ids.add(tiny_run(weight_decay=0.1).id("data"))
    ids.add(BASE.replace(optimizer=Adam(beta1=0.8)).id("data"))
    ids.add(BASE.replace(optimizer=Adam(eps=1e-7)).id("data"))
    ids.add(BASE.replace(optimizer=SGD()).id("data"))
    assert len(ids) == 7


def test_probes_do_not_change_the_id() -> None:
    assert BASE.replace(probes=Probes(update_quantiles=(1, 2))).id("data") == BASE.id("data")


def test_a_changed_copy_is_checked_and_shares_its_task() -> None:
    assert BASE.replace(lr=0.5).task is BASE.task
    with pytest.raises(ValueError, match="greater than 0"):
        BASE.replace(lr=-0.5)


VALUES = {
    "optimizer": {"name": "adam", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}, "warmup": {"name": "linear", "tau": 10.0},
    "decay": {"name": "linear"}, "task": {"name": "digits_resnet", "width": 4, "blocks": 1}, "lr": 0.01, "seed": 1,
    "steps": 5, "clip_norm": None, "device": "cpu",
}  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.data())
def test_the_order_of_keys_does_not_matter(data: st.DataObject) -> None:
    def shuffled(values: dict[str, Any]) -> dict[str, Any]:
        keys = data.draw(st.permutations(list(values)))
        return {k: shuffled(values[k]) if isinstance(values[k], dict) else values[k] for k in keys}

    run, _ = from_config(OmegaConf.create(shuffled(VALUES)))
    assert run.id("data") == from_config(OmegaConf.create(VALUES))[0].id("data")


# -- probes --------------------------------------------------------------------------------------------------


def test_the_default_listing() -> None:
    assert Probes().steps("norms", 250) == {*range(1, 101), *range(120, 241, 20), 250}
    assert Probes().steps("norms", 30) == set(range(1, 31))
    assert Probes().steps("update_quantiles", 30) == set()
    assert Probes(norms=(3, 40)).steps("norms", 30) == {3}
    assert Probes(norms="all").steps("norms", 250) == set(range(1, 251))


LISTED = st.one_of(st.sampled_from(["default", "all"]), st.lists(st.integers(1, 150), max_size=6).map(tuple))
PROBES = st.builds(Probes, norms=LISTED, l1_norms=LISTED, update_quantiles=LISTED, gradient_histogram=LISTED)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(PROBES, PROBES, st.integers(1, 150))
def test_the_union_of_probes_covers_both_and_nothing_more(a: Probes, b: Probes, total: int) -> None:
    both = a.with_those_of(b, total)
    assert both.covers(a, total) and both.covers(b, total) and a.covers(a, total)
    for name in ("norms", "l1_norms", "update_quantiles", "gradient_histogram"):
        assert both.steps(name, total) == a.steps(name, total) | b.steps(name, total)
    assert a.covers(b, total) == (a.with_those_of(b, total) == a)


def test_a_store_below_a_file_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("sys.argv", ["run", "-m", "lr=.1,.2", f"store={tmp_path / 'file' / 'store'}"])
    with pytest.raises(SystemExit) as caught:
        run_app.main()
    assert "cannot write to the store" in str(caught.value.code) and "\n" not in str(caught.value.code)


# -- what is remembered --------------------------------------------------------------------------------------

PARTS: dict[str, st.SearchStrategy[Any]] = {
    "optimizer": st.sampled_from([Adam(), Adam(beta2=0.98), SGD()]),
    "warmup": st.sampled_from([warmups.Warmup(), warmups.Linear(tau=5.0)]),
    "lr": st.floats(1e-6, 10),
    "seed": st.integers(0, 2**31),
    "steps": st.integers(1, 100),
    "weight_decay": st.sampled_from([0.0, 0.01]),
    "task": st.sampled_from([Tiny(), Tiny(salt=1)]),
}
SOME = st.sets(st.sampled_from(sorted(PARTS))).flatmap(
    lambda names: st.fixed_dictionaries({name: PARTS[name] for name in names})
)


@given(st.fixed_dictionaries(PARTS), st.lists(SOME, max_size=3))
def test_a_run_that_was_changed_has_the_id_of_one_made_anew(
    values: dict[str, Any], changes: list[dict[str, Any]]
) -> None:
    run = tiny_run(**values)
    for changed in changes:
        values = {**values, **changed}
        run, new = run.replace(**changed), tiny_run(**values)
        assert run == new and run.science == new.science and run.id("data") == new.id("data")


WORDS = [
    ["task=pydocs_lstm", "optimizer=radam", "steps=7", "task.batch_size=8"],
    ["task.width=16", "warmup=linear", "warmup.tau=3"],
    ["optimizer=lookahead", "optimizer@optimizer.inner=sgd", "task=phrases_transformer", "seed=3"],
    ["task=digits_resnet", "seed=${task.batch_size}", "task.batch_size=5"],
    ["scaling=linear", "scaling.base=16", "task.batch_size=32"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_composing_the_task_apart_changes_nothing(words: list[str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = from_config(compose("run", overrides=words))
    assert compose_run(words) == compose_run(words) == whole


def test_nothing_in_conf_refers_to_another_file() -> None:
    """Else the task could not be composed apart."""
    files = [path for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment"]
    assert files and not [p.name for p in files if "${" in p.read_text() or "@package" in p.read_text()]
    values = OmegaConf.to_container(OmegaConf.load(CONF / "run.yaml"))
    assert isinstance(values, dict)
    assert "${" not in str({name: value for name, value in values.items() if name != "hydra"})
