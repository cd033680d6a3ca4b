"""Encoded contexts on disk: one format for data sets and for libraries that grow, and all that reads and checks it."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_rows":  # when it is asked for, as it loads torch and datasets
        from dssk.store.dataset import load_rows

        return load_rows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
