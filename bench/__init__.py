"""What speed costs and gains, measured side by side: ``make bench``. Nothing else depends on this package.

A part is a module with TITLE, ``measure(place, quick) -> DataFrame`` and ``summary(table) -> Markdown``.
"""
