"""Lets transformers' Auto classes load fused models, whichever of the two packages is imported first.

Importing this imports nothing heavy: the classes are registered by the first configuration that is loaded.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
LOADERS = ("from_pretrained", "for_model")  # every Auto class asks one of them


def register_when_needed() -> None:
    """Have `dssk.inference.auto.register` called before the first configuration is loaded."""
    if AUTO_CONFIG in sys.modules:
        _register_at_first_load(sys.modules[AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AfterImport(AUTO_CONFIG, _register_at_first_load))


class _AfterImport(MetaPathFinder):
    """Calls `then` with a module as soon as it is imported, and is gone."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_at_first_load(module: ModuleType) -> None:
    # Not at once: whoever imports this module may be half imported, and registering imports a lot.
    auto_config = module.AutoConfig
    originals = {name: vars(auto_config)[name] for name in LOADERS}

    def registering(name: str, original: Any) -> classmethod:
        @functools.wraps(original.__func__)
        def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
            for restored, method in originals.items():
                setattr(auto_config, restored, method)
            from dssk.inference.auto import register

            register()
            return getattr(cls, name)(*args, **kwargs)

        return classmethod(load)

    for name, original in originals.items():
        setattr(auto_config, name, registering(name, original))
