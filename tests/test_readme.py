"""What the README tells a user to write is what works."""

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from optimizers.engine import engine_of
from optimizers.rule import Rule, describe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str, contains: str) -> str:
    """The code block that has a text in it, without its indentation."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, flags=re.M | re.S)
    (found,) = [(indent, text) for indent, text in blocks if contains in text]
    return "".join(line.removeprefix(found[0]) for line in found[1].splitlines(keepends=True))


def test_the_optimizer_of_the_readme_is_complete() -> None:
    names: dict[str, Any] = {"__name__": "adadelta"}
    exec(block("python", "class Adadelta"), names)
    kind: type[Rule] = names["Adadelta"]
    assert yaml.safe_load(block("yaml", "name: adadelta")) == describe(kind())
    p, q = (torch.nn.Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64)) for _ in range(2))
    ours, theirs = engine_of(kind)([p], lr=1.0), torch.optim.Adadelta([q], lr=1.0)
    for _ in range(50):
        p.grad, q.grad = p.detach() ** 3, q.detach() ** 3
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-10, atol=0)
    # What the tests of every rule ask of one: its state's signs, its published rate, a source.
    assert {k for k, v in ours.state[p].items() if isinstance(v, torch.Tensor)} == set(kind.nonnegative_state)
    assert kind().published_lr > 0 and kind.paper and kind.family
