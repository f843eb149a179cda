"""How every figure looks: one matplotlib style, and one colour for each arm wherever it appears."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from matplotlib import colormaps, colors, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe & Ito's palette, which colour-blind readers can tell apart, less its yellow: unreadable on white.
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000", "#808080",
)  # fmt: skip

ARMS: dict[str, tuple[str, str]] = {
    "none": (BLACK, "-"),
    "radam": (BLUE, "-"),
    "rectifier": (SKY, "-"),
    "untuned_linear": (VERMILION, "--"),
    "untuned_exponential": (GREEN, "-."),
    "linear": (ORANGE, "--"),
    "exponential": (PURPLE, "-."),
    "sgd": (GREY, ":"),
}
"""Colour and line style, by name, of the arms that every experiment shares."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "ytick.minor.width": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "savefig.dpi": 180,
    "pdf.fonttype": 42,  # text stays text
}


def context() -> AbstractContextManager[None]:
    """The style, whatever the user's own matplotlibrc says, for as long as a figure is saved."""
    return style.context(["default", STYLE])


def panels(
    columns: int = 1,
    rows: int = 1,
    size: tuple[float, float] = (3.4, 2.6),
    share_x: bool = False,
    share_y: bool = False,
    heights: Iterable[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; ``size`` is that of one panel in inches, ``heights`` the relative
    heights of the rows. Belongs to no window: nothing needs closing.

    Sets the style for the whole process, since titles and legends take theirs when they are added.
    """
    style.use(["default", STYLE])
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    axes = figure.subplots(
        rows,
        columns,
        sharex=share_x,
        sharey=share_y,
        squeeze=False,
        height_ratios=None if heights is None else list(heights),
    )
    return figure, list(axes.flat)


def looks(arms: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of ``plot`` for each arm. An arm of ``ARMS`` looks the same in every figure; the
    others take, in the order given, the colours that no arm of this figure has. Raises ValueError beyond them."""
    names = list(dict.fromkeys(arms))
    known = {name: ARMS[name] for name in names if name in ARMS}
    taken = {colour for colour, _ in known.values()}
    free = [(c, "-") for c in (PURPLE, ORANGE, SKY, GREEN, VERMILION, BLUE, GREY, BLACK) if c not in taken]
    others = [name for name in names if name not in ARMS]
    if len(others) > len(free):
        raise ValueError(f"{len(names)} arms in one figure are too many to tell apart; use panels")
    chosen = known | dict(zip(others, free, strict=False))
    return {name: {"color": chosen[name][0], "linestyle": chosen[name][1]} for name in names}


def shades(n: int) -> list[str]:
    """n colours from dark to light for an ordered parameter (beta2, mu, lr), readable on white."""
    return [colors.to_hex(colormaps["viridis"](x)) for x in np.linspace(0, 0.85, n)]
