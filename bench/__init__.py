"""What speed costs and gains, measured side by side: ``make bench``. Nothing else depends on this package.

A part is a module with TITLE, ``measure(place, quick) -> DataFrame`` and ``summary(table) -> Markdown``.
"""

from types import ModuleType

from bench import optimizer_step, scale, sweep, training_step

PARTS: dict[str, ModuleType] = {
    "optimizer_step": optimizer_step,
    "training_step": training_step,
    "sweep": sweep,
    "scale": scale,
}
