"""``python -m optimizers``: the rules of this package, with their defaults, as a table."""

import textwrap

import torch
from tabulate import tabulate

from optimizers.rule import Rule, available

COLUMNS = ("name", "family", "bytes", "lr", "decay", "needs", "paper", "what it is")
LEGEND = """bytes: of state, for each parameter of a float32 matrix of 512 x 512; lr: as published; decay: of weights.
needs: warmup, has its own; loss, step(loss=...); shape, of tensors, which are never joined; all, a norm over all
tensors; ahead, evaluation_weights(), as between steps the parameters are not the weights."""
WIDTH = 44
"""Of the last column: the table then fits into 150."""


def needs(rule: Rule) -> str:
    """What is particular about running a rule."""
    facts = {
        "warmup": rule.own_warmup,
        "loss": rule.needs_loss,
        "shape": not (rule.elementwise or rule.joint),
        "all": rule.joint,
        "ahead": rule.predicts,
    }
    return " ".join(name for name, true in facts.items() if true) or "-"


def row(name: str, rule: Rule) -> tuple[str, ...]:
    """A line of the table. The state is measured on a float32 tensor that is large enough for any codec."""
    p = torch.zeros(512, 512)
    state = sum(value.numel() * value.element_size() for value in rule.init(p).values())
    line = (type(rule).__doc__ or "").strip().splitlines()[0]
    line = textwrap.shorten(line.removeprefix(f"{type(rule).__name__}: "), WIDTH, placeholder="...")
    paper = rule.paper.partition(",")[0]
    lr = f"{rule.published_lr:g}"
    return name, rule.family, f"{round(state / p.numel(), 3):g}", lr, rule.weight_decay_mode, needs(rule), paper, line


def table() -> str:
    """Every rule with its default hyper-parameters, one line each."""
    return tabulate([row(name, rule()) for name, rule in available().items()], COLUMNS, disable_numparse=True)


if __name__ == "__main__":
    print(table(), LEGEND, sep="\n\n")
