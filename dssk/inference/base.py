"""Names of before: they are in `loading` and `encoding` now."""

from dssk.inference.encoding import encode
from dssk.inference.loading import load_base, load_base_config

__all__ = ["encode", "load_base", "load_base_config"]
