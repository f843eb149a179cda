"""Where a sweep's runs are trained, by worker processes on this machine or by jobs of a cluster: conf/backend/."""

from collections.abc import Sequence
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from runners.config import CONF, UserError, build, first_line, nearest

_SCHEMA = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_SCHEMA)
class Local:
    """Worker processes on this machine.

    Attributes:
        workers: how many; None is one a core, or one on a GPU.
        checkpoint_every: as in ``Place``.
    """

    workers: Positive | None = None
    checkpoint_every: Count = 0


@dataclass(frozen=True, config=_SCHEMA)
class Slurm(Local):
    """Array jobs of a SLURM cluster, each with ``workers`` of its own; conf/backend/slurm.yaml says what is what."""

    checkpoint_every: Count = 1000
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: Count = 0
    cpus: Positive = 4
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    minutes: Positive = 240
    requeues: Count = 10
    warning_seconds: Positive = 120
    runs_per_job: Positive = 20
    jobs: Positive = 100
    setup: tuple[str, ...] = ()
    options: dict[str, str | int | bool] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.warning_seconds >= 60 * self.minutes:
            raise ValueError(f"warning_seconds must be less than {self.minutes} minutes")


BACKENDS: dict[str, type[Local]] = {"local": Local, "slurm": Slurm}


def load(words: Sequence[str], **changes: Any) -> Local:
    """The backend of conf/backend/<first word>.yaml, changed by ``key=value`` words and by what is not None.

    Raises:
        UserError: for any mistake, in one line.
    """
    name, *overrides = words
    path = CONF / "backend" / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no backend is called {name!r}{nearest(name, [p.stem for p in path.parent.glob('*.yaml')])}")
    for word in overrides:
        if not word.partition("=")[0] or "=" not in word:
            raise UserError(f"backend {name}: {word!r} is not of the form key=value")
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides)))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"backend {name}: {first_line(error)}") from None
    except Exception as error:  # the YAML parser's own, which omegaconf passes on
        raise UserError(f"backend {name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"backend {name}: not a mapping of keys")
    settings = {str(k): v for k, v in values.items()} | {k: v for k, v in changes.items() if v is not None}
    kind = settings.pop("name", None)
    if kind not in BACKENDS:
        raise UserError(f"backend {name}: name: {kind!r} is not known{nearest(str(kind), BACKENDS)}")
    return build(BACKENDS[kind], settings, f"backend {name}")
