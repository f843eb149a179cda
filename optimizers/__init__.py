"""Update rules, warmups and decays, and the engine that runs them as torch optimizers.

Every rule found in this package is importable from here as an ordinary optimizer class:
``from optimizers import RAdam; RAdam(model.parameters(), lr=1e-3)``. ``python -m optimizers`` lists them.
"""

from typing import TYPE_CHECKING

from optimizers.engine import Engine as Engine
from optimizers.engine import engine_of
from optimizers.rule import available

globals().update({rule.__name__: engine_of(rule) for rule in available().values()})

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Engine]:
        """The rules are found at run time, which a type checker cannot see."""
