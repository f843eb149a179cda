"""Backends: conf/backend/ says what there is, and a mistake in it or on the command line is one line."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runners import sweep as sweeps
from runners.backend import BACKENDS, Local, Slurm, load
from runners.config import CONF, UserError

FILES = sorted((CONF / "backend").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_lists_every_field_at_its_default(path: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    kind = BACKENDS[str(values.pop("name"))]
    assert values.keys() == {field.name for field in dataclasses.fields(kind)}
    assert load([path.stem]) == kind()


def test_words_change_it_and_none_changes_nothing() -> None:
    words = ["slurm", "partition=gpu", "gpus=2", "setup=[module load cuda, ulimit -c 0]", "options.exclude=node7"]
    backend = load(words, workers=3, checkpoint_every=None)
    assert backend == Slurm(
        partition="gpu", gpus=2, setup=("module load cuda", "ulimit -c 0"), options={"exclude": "node7"}, workers=3
    )
    assert load(["local"], workers=None, checkpoint_every=50) == Local(checkpoint_every=50)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slrum"], "no backend is called 'slrum'; did you mean 'slurm'?"),
        (["slurm", "partitoin=gpu"], "backend slurm: unknown key 'partitoin'; did you mean 'partition'?"),
        (["slurm", "gpus=many"], "backend slurm: gpus: "),
        (["slurm", "minutes=0"], "backend slurm: minutes: "),
        (["slurm", "minutes=2", "warning_seconds=120"], "warning_seconds must be less than 2 minutes"),
        (["slurm", "gpu"], "backend slurm: 'gpu' is not of the form key=value"),
        (["slurm", "=3"], "backend slurm: '=3' is not of the form key=value"),
        (["slurm", "name=slrum"], "backend slurm: name: 'slrum' is not known; did you mean 'slurm'?"),
        (["slurm", "setup=[a"], "backend slurm: not YAML: "),
        (["local", "partition=gpu"], "backend local: unknown key 'partition'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(words)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SystemExit):
        sweeps.main(["plan", "smoke", "--store", str(tmp_path), "--device", "cpu", "--backend", *words])
    assert capsys.readouterr().err == f"error: {caught.value}\n"
