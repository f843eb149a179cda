"""One run as a Hydra app: ``python -m runners.run task=digits_resnet optimizer=radam lr=.01 seed=1``.

With ``-m`` it is a multirun, with any Hydra launcher; every run goes to the same store.
"""

import sys

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from runners.config import CONF, Probes, UserError, compose_run, from_config
from runners.loggers import logger_for
from runners.store import FINISHED, Damaged, Store
from runners.train import prepare, train


def main() -> None:
    """Check the command line in one line of words, then hand it to Hydra."""
    words = sys.argv[1:]
    multirun = {"-m", "--multirun"} & set(words)
    try:
        flags = [word for word in words if word.startswith("-")]
        if multirun and len(flags) == 1:
            for job in _sample([word for word in words if word not in flags]):
                Store(compose_run(job)[1].store)
        elif not flags:
            compose_run(words)
        app()
    except UserError as error:
        sys.exit(f"error: {error}")


@hydra.main(config_path=str(CONF), config_name="run", version_base="1.3")
def app(config: DictConfig) -> None:
    """Train the run that the config describes, unless the store has its result."""
    try:
        run, place = from_config(config)
        store = Store(place.store)
        device = prepare(run.task, place)
        run_id = run.id(run.task.fingerprint())
        summary = None
        try:
            summary = store.summary(run_id)
        except Damaged as damaged:
            print(f"{damaged} cannot be read: set aside as {store.set_aside(run_id)}, training again")
        recorded = Probes(**summary["probes"]) if summary is not None else run.probes
        if summary is not None and summary["status"] in FINISHED and recorded.covers(run.probes, run.steps):
            print(f"{run_id} is in the store already")
        else:
            with store.claim(run_id) as mine:
                if not mine:
                    raise UserError(f"{run_id} is being trained by another process")
                with logger_for(place, run, run_id) as log:
                    run = run.replace(probes=run.probes.with_those_of(recorded, run.steps))
                    result = train(run, run.task, device, store, checkpoint_every=place.checkpoint_every)
                    if summary is not None:
                        store.set_aside(run_id)  # it lacked a probe that is now asked for
                    store.publish(result)
                    log(result)
            summary = result.summary
    except UserError as error:
        # Hydra would print a traceback.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{summary['status']}: {store.root / run_id}")
    if summary["diverged_at"]:
        print(f"  diverged at step {summary['diverged_at']}; last finite {summary['last_finite']}")
    for split, values in summary["metrics"].items():
        print(f"  {split}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))


def _sample(words: list[str]) -> list[list[str]]:
    """Of a multirun's grid enough jobs that every value of every sweep is in one."""
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return [words]  # where the mistake is found
    values = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in overrides
    ]
    first = [options[0] for options in values]
    return [first] + [
        [*first[:i], option, *first[i + 1 :]] for i, options in enumerate(values) for option in options[1:]
    ]


if __name__ == "__main__":
    main()
