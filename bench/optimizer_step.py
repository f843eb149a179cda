"""The optimizer's step: every rule in every execution, beside torch, pytorch-optimizer and the limit."""

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import optimizers
from bench.measure import fastest, interleaved, ratio
from optimizers.rule import Rule, available, make
from runners.config import Place
from tasks.models.awd_lstm import AWDLSTM
from tasks.models.resnet import ResNet

TITLE = "The optimizer's step"

SIZES: dict[str, Callable[[], nn.Module]] = {
    "0.27 M": lambda: ResNet(blocks=3),
    "4 M": lambda: ResNet(blocks=3, width=62),
    "24 M": lambda: AWDLSTM(10_000, 400, [1150, 1150, 400], streams=1, tied=True),
}
"""ResNet-20, the same 62 channels wide, and the AWD-LSTM on the Penn Treebank."""

ROUNDS = {"0.27 M": 7, "4 M": 7, "24 M": 3}
LR = 1e-6
BETAS = (0.9, 0.999)

HYPER: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "radam": {"variant": "torch"},
    "padam": {"amsgrad": False, "power": 0.25},
    "adabelief": {"eps": 1e-8},
    "generalizedsignsgd": {"beta2": 0.0, "eps": 0.0},
}
"""Settings that the others have, too; all else is the rules' default, without weight decay."""

T = torch.optim
TORCH: dict[str, Callable[..., T.Optimizer]] = {
    "sgd": lambda p, **how: T.SGD(p, LR, momentum=0.9, **how),
    "adam": lambda p, **how: T.Adam(p, LR, **how),
    "adamw": lambda p, **how: T.AdamW(p, LR, weight_decay=0.0, **how),
    "amsgrad": lambda p, **how: T.Adam(p, LR, amsgrad=True, **how),
    "adamax": lambda p, **how: T.Adamax(p, LR, **how),
    "nadam": lambda p, **how: T.NAdam(p, LR, **how),
    "radam": lambda p, **how: T.RAdam(p, LR, **how),
    "adagrad": lambda p, **how: T.Adagrad(p, LR, **how),
    "rmsprop": lambda p, **how: T.RMSprop(p, LR, **how),
    "adafactor": lambda p, **how: T.Adafactor(p, LR, **how),
}
WAYS: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}

PACKAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "adamax": ("AdaMax", {}),
    "radam": ("RAdam", {"degenerated_to_sgd": True}),
    "adan": ("Adan", {}),
    "lion": ("Lion", {}),
    "adabelief": ("AdaBelief", {"betas": BETAS, "eps": 1e-8, "rectify": False}),
    "diffgrad": ("DiffGrad", {"betas": BETAS}),
    "pnm": ("PNM", {}),
    "padam": ("PAdam", {"betas": BETAS, "partial": 0.25}),
    "generalizedsignsgd": ("SignSGD", {"momentum": 0.9}),
}
"""Where tests/optimizers/table.py finds the two equal."""


Limits = dict[tuple[int, int], Callable[..., Any]]


class Touched(TorchDispatchMode):
    """Which memory operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            for place, value in zip(func._schema.arguments, args, strict=False):
                for t in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(t, Tensor):
                        self.read.add(_memory(t))
                        if place.alias_info is not None and place.alias_info.is_write:
                            self.written.add(_memory(t))
        return func(*args, **(kwargs or {}))


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def traffic(rule: Rule, steps: int = 10, elements: int = 8192) -> tuple[float, int, int, float]:
    """What one step has to move: the parameters, their gradients and the state, each read once and, where it is
    changed, written once.

    Returns the bytes a parameter in float32, the mean over some steps; how many tensors a usual step only reads and
    how many it changes; and the bytes of that usual step. (Lookahead touches its slow weights in one step of k.)
    """
    p = nn.Parameter(torch.rand(64, elements // 64))
    optimizer = _ours(rule, [p], "eager")
    p.grad = torch.rand_like(p)
    optimizer.step(loss=1.0)
    own = [p.detach(), p.grad, *[t for t in optimizer.state[p].values() if isinstance(t, Tensor)]]
    sizes = {_memory(t): t.nbytes / elements for t in own}
    seen: list[tuple[float, int, int]] = []
    for _ in range(steps):
        with Touched() as touched:
            optimizer.step(loss=1.0)
        # To write is to read as well: a cache fetches the line.
        read = {at for at in touched.read if at in sizes}
        written = {at for at in touched.written if at in sizes}
        moved = sum(sizes[at] for at in read) + sum(sizes[at] for at in written)
        seen.append((moved, len(read - written), len(written)))
    usual, read_only, changed = Counter(seen).most_common(1)[0][0]
    return sum(moved for moved, _, _ in seen) / steps, read_only, changed, usual


def bare(read: int, written: int, device: torch.device) -> Callable[..., Any]:
    """The limit: a compiled kernel that reads some vectors, and reads and writes others, with one addition each."""
    from torch._dynamo import lookup_backend

    def kernel(*vectors: Tensor) -> tuple[()]:
        total = vectors[0]
        for vector in vectors[1:read]:
            total = total + vector
        for vector in vectors[read:]:
            vector.add_(total)
        return ()

    example = [torch.zeros(1000, device=device) for _ in range(read + written)]
    graph = make_fx(kernel, tracing_mode="symbolic")(*example)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return lookup_backend("inductor")(graph, inputs)


def _ours(rule: Rule, params: list[nn.Parameter], execution: Any) -> Any:
    return optimizers.engine.engine_of(type(rule))(
        params, lr=LR, execution=execution, **{k: v for k, v in vars(rule).items() if not k.startswith("_")}
    )


def _candidates(name: str, rule: Rule, model: nn.Module) -> tuple[dict[str, Callable[[], Any]], float]:
    """Everybody's step, each on a copy of the model with gradients; and the seconds of our first compiled one."""

    def copied() -> list[nn.Parameter]:
        params = list(copy.deepcopy(model).parameters())
        for p in params:
            p.grad = torch.rand_like(p)
        return params

    found: dict[str, Callable[[], Any]] = {}
    compiling, loss = float("nan"), next(model.parameters()).new_ones(())
    for execution in ("eager", "flat", "compiled"):
        if execution == "eager" or rule.elementwise or (rule.joint and execution == "flat"):
            ours = _ours(rule, copied(), execution)
            found[execution] = (lambda o: lambda: o.step(loss=loss))(ours)
            if execution == "compiled":
                started = time.perf_counter()
                ours.step(loss=loss)
                compiling = time.perf_counter() - started
    for way, how in WAYS.items():
        if name in TORCH:
            try:
                found[f"torch {way}"] = TORCH[name](copied(), **how).step
            except (TypeError, RuntimeError):  # there is none
                continue
    if name in PACKAGE:
        import pytorch_optimizer

        kind, options = PACKAGE[name]
        found["pytorch-optimizer"] = getattr(pytorch_optimizer, kind)(copied(), lr=LR, **options).step
    if name != "adam":
        found["fused Adam"] = T.Adam(copied(), LR, fused=True).step
    return found, compiling


def of_rule(name: str, size: str, rounds: int, limits: Limits, device: torch.device) -> list[dict[str, Any]]:
    """The rows of one rule at one size."""
    rule = make(name, **HYPER.get(name, {}))
    torch.manual_seed(0)
    model = SIZES[size]().to(device)
    count = sum(p.numel() for p in model.parameters())
    moved, read, written, usual = traffic(rule)
    calls, compiling = _candidates(name, rule, model)
    if rule.elementwise:
        if (read, written) not in limits:
            limits[read, written] = bare(read, written, device)
        vectors = [torch.rand(count, device=device) for _ in range(read + written)]
        calls["limit"] = lambda: limits[read, written](*vectors)
    with torch.no_grad():
        seconds = interleaved(calls, rounds, device)
    if "limit" in seconds:  # of a mean step
        seconds["limit"] = [s * moved / usual for s in seconds["limit"]]
    fused = seconds.pop("fused Adam", None) or seconds["torch fused"]
    adam = [s * moved / traffic(make("adam"))[0] for s in fused]
    theirs = min((k for k in seconds if k.startswith("torch ")), key=lambda k: fastest(seconds[k]), default=None)
    rows = []
    for candidate, own in seconds.items():
        rows.append(
            {
                "rule": name,
                "size": size,
                "parameters": count,
                "candidate": candidate,
                "ms": fastest(own) * 1e3,
                "megabytes": moved * count / 1e6,
                "to_limit": ratio(own, seconds["limit"]) if "limit" in seconds else None,
                "to_torch": ratio(own, seconds[theirs]) if theirs else None,
                "to_foreach": ratio(own, seconds["torch foreach"]) if "torch foreach" in seconds else None,
                "to_fused_adam": ratio(own, adam),
                "first_step_s": compiling if candidate == "compiled" else None,
            }
        )
    return rows


FIRST = """
import sys, time, torch, optimizers
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.ones(10_000, device=sys.argv[1]))
p.grad = torch.ones_like(p)
optimizer = optimizers.RAdam([p], execution="compiled")
started = time.perf_counter()
optimizer.step()
print(time.perf_counter() - started)
"""


def first_steps(device: torch.device) -> list[dict[str, Any]]:
    """Seconds of RAdam's first compiled step in a new process, with an empty cache on disk and with that cache."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for candidate in ("first step, cache empty", "first step, cached"):
            words = [sys.executable, "-c", FIRST, str(device)]
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
            done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
            rows.append({"rule": "radam", "candidate": candidate, "first_step_s": float(done.stdout)})
    return rows


def measure(place: Place, quick: bool) -> pd.DataFrame:
    """One row for every rule, size and candidate; on a CPU on one thread.

    ms is that of the fastest turn; the ratios are medians over the rounds: to the limit, to torch's fastest and to
    its foreach for the same rule, and to torch's fused Adam times the ratio of the bytes moved.
    """
    device = place.torch_device()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a runner's worker has
    try:
        rows: list[dict[str, Any]] = []
        limits: Limits = {}
        for size in list(SIZES)[:1] if quick else SIZES:
            for name in ("adam", "lamb") if quick else available():
                rows += of_rule(name, size, 2 if quick else ROUNDS[size], limits, device)
        return pd.DataFrame(rows if quick else rows + first_steps(device))
    finally:
        torch.set_num_threads(before)


def _cell(value: float, digits: int = 2) -> str:
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def summary(table: pd.DataFrame) -> str:
    """For each size one table of the rules, and how far the goals are met."""
    steps = table[table.ms.notna()]
    parts = [
        "Milliseconds a step, in the fastest turn; on a CPU on one thread. `limit` is a bare compiled kernel over "
        "vectors with the reads and writes of the rule; `compiled`, `flat` and `eager` are this project's ways of "
        "execution, and what follows is others' code, where they have the rule. Compiled execution is measured for "
        "elementwise rules only: the others have a program for each model, which takes minutes to make.",
        "To their right, ratios of milliseconds: medians over neighbouring turns, so that drift cancels, and therefore "
        "not the quotients of the columns. `/ fused Adam x bytes`: against torch's fused Adam times the bytes that the "
        "rule reads and writes, as a share of Adam's. Below a table: how many rules meet the project's goals. 8-bit "
        "states save memory, not time: on a CPU each step looks its codes up, element by element.",
    ]
    for size in steps["size"].unique():
        of_size = steps[steps["size"] == size]
        ms = of_size.pivot(index="rule", columns="candidate", values="ms")
        ratios = {c: of_size.pivot(index="rule", columns="candidate", values=c) for c in RATIOS}
        shown = [c for c in COLUMNS if c in ms]
        lines = ["| rule | " + " | ".join(shown) + " | " + " | ".join(label for label, *_ in SHOWN) + " |"]
        lines.append("|---" + "|---:" * (len(shown) + len(SHOWN)) + "|")
        for rule in ms.index:
            values = [*(ms[c] for c in shown), *(ratios[c][who] for _, c, who in SHOWN if who in ratios[c])]
            lines.append(f"| {rule} | " + " | ".join(_cell(float(column[rule])) for column in values) + " |")
        compiled = of_size[of_size.candidate == "compiled"]
        eager = of_size[(of_size.candidate == "eager") & of_size.to_foreach.notna()]
        goals = [
            f"compiled within 1.15 of the limit: {(compiled.to_limit <= 1.15).sum()} of {len(compiled)} "
            f"(median {_cell(compiled.to_limit.median())}, worst {_cell(compiled.to_limit.max())})",
            f"no slower than fused Adam times the bytes: {(compiled.to_fused_adam <= 1).sum()} of {len(compiled)}",
            f"no slower than torch's fastest for the rule: {(compiled.to_torch <= 1).sum()} "
            f"of {compiled.to_torch.notna().sum()}",
            f"eager within 1.5 of torch's foreach: {(eager.to_foreach <= 1.5).sum()} of {len(eager)}",
        ]
        parts += [f"### {size}", "\n".join(lines), "\n".join(f"- {goal}" for goal in goals)]
    first = table[table.ms.isna()]
    if len(first):
        pairs = zip(first.candidate, first.first_step_s, strict=True)
        told = ", ".join(f"{str(name).partition(', ')[2]} {float(seconds):.1f} s" for name, seconds in pairs)
        parts.append(
            f"RAdam's first compiled step in a new process: {told}, most of it the import of the compiler. A program "
            "is a rule's, for models of all shapes."
        )
    return "\n\n".join(parts)


TRIED = """Flat execution takes large tensors where they are and what is small joined, 131,072 elements at a time. Tried
and left out: all of a model as one vector, which gives the same bits, but the vectors that a step computes on its way
then leave the cache and are new memory at every step: for Adam at 4 M and 24 M 28 and 211 ms on the AMD EPYC, against 9
and 45. Pieces of 32,768, 65,536 and 262,144 elements: 10.5, 9.3 and 9.6 ms at 4 M, 57, 47 and 41 ms at 24 M. (At
0.27 M the flat step of some rules, and in some processes of most, is slowed by memory that malloc hands back to the
system at every step: Adam's took 2.3 ms in one process and 0.8 in another, and with MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_ set to 1e9 less than half of the former. Training steps gain nothing from that, and those of the
CIFAR ResNet lose 8 %.)

What compiled execution has above the limit at 0.27 M is a fixed cost of some 0.3 ms for the 65 tensors of a ResNet-20:
a third of it to copy the 48 small ones and their gradients together and back, a third for the call, a third for the
bookkeeping of groups and states. It is less than 0.1 % of a training step of that model there."""


COLUMNS = ["limit", "compiled", "flat", "eager", *(f"torch {way}" for way in WAYS), "pytorch-optimizer"]
RATIOS = ("to_limit", "to_torch", "to_foreach", "to_fused_adam")
SHOWN = [
    ("compiled / limit", "to_limit", "compiled"),
    ("/ torch's fastest", "to_torch", "compiled"),
    ("/ fused Adam x bytes", "to_fused_adam", "compiled"),
    ("eager / foreach", "to_foreach", "eager"),
]
