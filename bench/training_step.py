"""A training step."""

import pandas as pd

from runners.config import Place

TITLE = "A training step"


def measure(place: Place, quick: bool) -> pd.DataFrame:
    """Not there yet."""
    raise NotImplementedError


def summary(table: pd.DataFrame) -> str:
    """Not there yet."""
    raise NotImplementedError
