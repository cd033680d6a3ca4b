"""`dssk.data.store.load_rows`, where version 0.1 had it; it is `dssk.store.load_rows` now."""

from dssk.store.dataset import load_rows

__all__ = ["load_rows"]
