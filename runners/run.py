"""One run as a Hydra app: ``python -m runners.run task=digits_resnet optimizer=radam lr=.01 seed=1``.

With ``-m`` it is a multirun, with any Hydra launcher; every run goes to the same store.
"""

import sys

import hydra
from omegaconf import DictConfig

from runners.config import CONF, UserError, compose_run, from_config
from runners.loggers import logger_for
from runners.store import FINISHED, Damaged, Store
from runners.train import prepare, train


def main() -> None:
    """Check the command line in one line of words, then hand it to Hydra."""
    words = sys.argv[1:]
    multirun = {"-m", "--multirun"} & set(words)
    try:
        if not multirun and not any(word.startswith("-") for word in words):
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
        if summary is not None and summary["status"] in FINISHED:
            print(f"{run_id} is in the store already")
        else:
            with store.claim(run_id) as mine:
                if not mine:
                    raise UserError(f"{run_id} is being trained by another process")
                with logger_for(place, run, run_id) as log:
                    result = train(run, run.task, device, store, checkpoint_every=place.checkpoint_every)
                    log(result)
                store.publish(result)
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


if __name__ == "__main__":
    main()
