"""Cached context for frozen StarCoder-family models through a few trained cross-attention blocks.

Importing this package lets transformers' Auto classes load the models it saves; it does nothing else.
"""

from pathlib import Path

from dssk import prompts
from dssk.inference.auto import from_base, register
from dssk.models.cross_attention import ProjectedContext

__all__ = ["ProjectedContext", "from_base", "prompts"]

register()

# `python -m dssk.library` is `dssk library`: the commands are found as if they lay here.
__path__.append(str(Path(__file__).parent / "commands"))
