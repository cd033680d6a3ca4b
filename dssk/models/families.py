"""The fused classes of a family: mixins before the family's own classes, with their signatures."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from dssk.models.configuration import FIELDS, CrossAttnConfig
from dssk.models.modeling import CONTEXT_ARGUMENTS, NO_SPLIT, CrossAttnForCausalLM, CrossAttnModel


def family_classes(
    config_class: Any, backbone_class: Any, causal_class: Any, *more: Any
) -> tuple[type, type, type]:
    """The fused configuration, backbone and causal language model of a family; `more` is mixed into the last."""
    fields = {name: getattr(CrossAttnConfig, name) for name in FIELDS}
    config = type(
        f"CrossAttn{config_class.__name__}",
        (CrossAttnConfig, config_class),
        {
            "__annotations__": CrossAttnConfig.__annotations__,
            "__doc__": CrossAttnConfig.__doc__,
            "attribute_map": {
                **config_class.attribute_map,
                "n_cross_attn_layers": "num_cross_attn_layers",  # the published original's name
            },
            **fields,
        },
    )
    shared = {"config_class": config}
    backbone = type(
        f"CrossAttn{backbone_class.__name__}",
        (CrossAttnModel, backbone_class),
        {
            **shared,
            "forward": declare(CrossAttnModel.forward, backbone_class.forward, CONTEXT_ARGUMENTS),
            "_no_split_modules": [*(backbone_class._no_split_modules or []), *NO_SPLIT],
        },
    )
    parameters = inspect.signature(causal_class.forward).parameters
    causal = type(
        f"CrossAttn{causal_class.__name__}",
        (*more, CrossAttnForCausalLM, causal_class),
        {
            **shared,
            "backbone_class": backbone,
            "forward_parameters": tuple(parameters)[1:],
            "forward": declare(CrossAttnForCausalLM.forward, causal_class.forward, CONTEXT_ARGUMENTS),
            "_no_split_modules": [*(causal_class._no_split_modules or []), *NO_SPLIT],
        },
    )
    return config, backbone, causal


def declare(forward: Callable, base: Callable, extra: tuple[str, ...]) -> Callable:
    """`forward` with the documentation and the parameters of `base`, and `extra` ones on top.

    Libraries look at a model's signature: transformers' generation and `Trainer`, peft, export.
    """

    @functools.wraps(base)
    def declared(self, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    parameters = list(inspect.signature(base).parameters.values())
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    known = {p.name for p in named}
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in extra if n not in known
    ]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    declared.__signature__ = inspect.Signature([*named, *added, rest])  # type: ignore[attr-defined]
    return declared
