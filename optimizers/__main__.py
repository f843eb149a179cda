"""``python -m optimizers``: the rules of this package, with their defaults, as a table."""

import torch
from tabulate import tabulate

from optimizers.rule import Rule, available

COLUMNS = ("name", "family", "bytes/parameter", "own warmup", "lr", "weight decay", "paper", "what it is")


def row(name: str, rule: Rule) -> tuple[str, ...]:
    """A line of the table. The state is measured on a float32 tensor."""
    p = torch.zeros(64, 64)
    state = sum(value.numel() * value.element_size() for value in rule.init(p).values())
    own = "yes" if rule.own_warmup else "no"
    line = (type(rule).__doc__ or "").strip().splitlines()[0]
    return (
        name,
        rule.family,
        f"{state / p.numel():g}",
        own,
        f"{rule.published_lr:g}",
        rule.weight_decay_mode,
        rule.paper,
        line,
    )


def table() -> str:
    """Every rule with its default hyper-parameters, one line each."""
    return tabulate([row(name, rule()) for name, rule in available().items()], COLUMNS, disable_numparse=True)


if __name__ == "__main__":
    print(table())
