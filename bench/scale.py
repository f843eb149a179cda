"""Cost against the number of runs."""

import pandas as pd

from runners.config import Place

TITLE = "Cost against the number of runs"


def measure(place: Place, quick: bool) -> pd.DataFrame:
    """Not there yet."""
    raise NotImplementedError


def summary(table: pd.DataFrame) -> str:
    """Not there yet."""
    raise NotImplementedError
