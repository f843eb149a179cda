"""What 8 bits cost: ``python -m runners.state_error``.

Trains the embedded LSTM with 32-bit Adam, then rounds its moments as each 8-bit code would, and writes how far they,
and the update made of them, are off: results/eight_bit_quick/state_error.csv. The ablation of Dettmers et al. 2022
(linear, dynamic, block-wise) on states of a real run, without the training that it would take to see it in a loss.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from optimizers.eight_bit import EightBit, codebook, decode, encode
from runners.config import ROOT, Run, compose_run
from runners.store import write_whole
from runners.train import make_optimizer, prepare

TASK, LR = "pydocs_lstm", 0.03
MINIMUM = EightBit().minimum
LINEAR = (torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256))
CODES = {
    "linear, whole tensor": (LINEAR, None),
    "dynamic, whole tensor": ((codebook(True), codebook(False)), None),
    "dynamic, blocks of 2048": ((codebook(True), codebook(False)), 2048),
    "dynamic, blocks of 256": ((codebook(True), codebook(False)), 256),
}
"""Codebooks for m and v, and the size of a block."""


def moments(run: Run, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Adam's m and v (without bias correction) of every tensor that is large enough, after ``steps`` steps of a run
    whose task is prepared."""
    torch.manual_seed(run.seed)
    model = run.task.model()
    optimizer = make_optimizer(run, model)
    for _, batch in zip(range(steps), run.task.batches(run.seed), strict=False):
        optimizer.zero_grad()
        run.task.loss(model, batch).backward()
        optimizer.step()
    for p in model.parameters():
        if p.numel() >= MINIMUM:
            yield optimizer.state[p]["m"].clone(), optimizer.state[p]["v"].clone()


def errors(states: list[tuple[Tensor, Tensor]], t: int, beta1: float, beta2: float, eps: float) -> pd.DataFrame:
    """Mean and 99.9th percentile of the error of each code: of m and v relative to their mean size, tensor by tensor;
    and of the update mhat / (sqrt(vhat) + eps), in units of the learning rate."""

    def update(m: Tensor, v: Tensor) -> Tensor:
        return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)

    rows = []
    for name, (books, block) in CODES.items():
        off: dict[str, list[Tensor]] = {"m": [], "v": [], "update": []}
        for m, v in states:
            size = block or m.numel()
            m8, v8 = (decode(*encode(x, b, size), b, size) for x, b in zip((m, v), books, strict=True))
            off["m"].append((m8 - m).abs().flatten() / m.abs().mean())
            off["v"].append((v8 - v).abs().flatten() / v.mean())
            off["update"].append((update(m8, v8) - update(m, v)).abs().flatten())
        row: dict[str, object] = {"code": name}
        for what, parts in off.items():
            sizes = torch.cat(parts).sort().values
            row |= {f"{what}_mean": sizes.mean().item(), f"{what}_q999": sizes[int(0.999 * len(sizes))].item()}
        rows.append(row)
    return pd.DataFrame(rows)


def state_bytes(run: Run) -> int:
    """Bytes of optimizer state of a run's model."""
    model = run.task.model()
    rule = run.optimizer
    return sum(s.numel() * s.element_size() for p in model.parameters() for s in rule.init(p).values())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m runners.state_error", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", default=str(ROOT / "results"), help="folder of the tables")
    words = parser.parse_args(argv)
    common = [f"task={TASK}", f"lr={LR}", f"steps={words.steps}", "device=cpu", "warmup=untuned_linear"]
    run, place = compose_run([*common, "optimizer=adam", "optimizer.beta2=0.98"])
    prepare(run.task, place)
    adam = run.optimizer
    tables = [
        errors(list(moments(run.replace(seed=seed), words.steps)), words.steps, adam.beta1, adam.beta2, adam.eps)  # type: ignore[attr-defined]
        for seed in range(words.seeds)
    ]
    table = pd.concat(tables).groupby("code", sort=False).mean().reset_index()
    eight, _ = compose_run([*common, "optimizer=adam8bit"])
    eight = eight.replace(task=run.task)
    table = table.assign(
        task=TASK, steps=words.steps, lr=LR, seeds=words.seeds, bytes_32bit=state_bytes(run),
        bytes_8bit=state_bytes(eight), parameters=sum(p.numel() for p in run.task.model().parameters()),
    )  # fmt: skip
    path = Path(words.results) / "eight_bit_quick" / "state_error.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, table.to_csv(index=False, float_format="%.4g").encode())
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
