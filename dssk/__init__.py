"""Cached context for frozen decoders through a few trained cross-attention blocks.

After `import dssk`, before or after transformers, its Auto classes load the models that this package saves. Nothing
heavy is imported before it is used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dssk import prompts
from dssk.inference.registration import register_when_needed
from dssk.utils.old_names import OldNames

if TYPE_CHECKING:
    from dssk.inference.auto import from_base
    from dssk.inference.loading import load_model
    from dssk.models.cross_attention import ProjectedContext

__all__ = ["ProjectedContext", "from_base", "load_model", "prompts"]
__version__ = "0.2.0"

_HOMES = {
    "ProjectedContext": "dssk.models.cross_attention",
    "from_base": "dssk.inference.auto",
    "load_model": "dssk.inference.loading",
    "CrossAttnGPTBigCodeConfig": "dssk.inference.auto",  # the names of version 0.1
    "CrossAttnGPTBigCodeForCausalLM": "dssk.inference.auto",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dssk' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_needed()
if sys.argv[:1] == ["-m"]:  # Python looks for the module that it shall run
    sys.meta_path.insert(0, OldNames())
