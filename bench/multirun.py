"""Hydra's ordinary multirun over plain loops, a process a run: ``python -m bench.multirun -m task=... lr=.01,.03``.

Each job says when it was done, in seconds of the wall clock: the first also pays for Hydra's start.
"""

import subprocess
import sys
import time

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

ConfigStore.instance().store(
    "multirun", {"task": "???", "lr": 0.01, "seed": 0, "steps": 300, "device": "cpu", "data_root": ""}
)


@hydra.main(version_base=None, config_name="multirun")
def main(config: DictConfig) -> None:
    """One job."""
    words = [str(config[key]) for key in ("task", "lr", "seed", "steps", "device", "data_root")]
    subprocess.run([sys.executable, "-m", "bench.plain", *words], check=True, stdout=subprocess.DEVNULL)
    print(f"done at {time.time()}", flush=True)


if __name__ == "__main__":
    main()
