"""The decoder layers of any family: where they are, how they are extended, and how a forward pass stops at one."""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

LAST = "last"  # the state after the final norm, before the LM head


class CallVariable:
    """A context variable that is set for the duration of a call; a plain attribute while torch traces a graph.

    Most families pass unknown keyword arguments down to their layers, but not all; this reaches every layer.
    """

    def __init__(self, name: str):
        self._variable: ContextVar[Any] = ContextVar(name, default=None)
        self._traced: Any = None

    def get(self) -> Any:
        return self._traced if torch.compiler.is_compiling() else self._variable.get()

    def during(self, value: Any, call: Callable, *args: Any, **kwargs: Any) -> Any:
        """What `call` returns; while it runs, `get` returns `value`."""
        before = self.get()
        self._set(value)
        try:  # not a `with`: torch cannot trace context managers of our own into one graph
            return call(*args, **kwargs)
        finally:
            self._set(before)

    def _set(self, value: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced = value
        else:
            self._variable.set(value)


# For type checkers, a mixin derives from the class that it is mixed into.
_Base: Any = nn.Module if TYPE_CHECKING else object


class Mixed(_Base):
    """Mixed into a module's class when a model is made; see `mixed`."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        cls: Any = type(self)
        mixins = []
        while cls.__bases__[0] in Mixed.__subclasses__():
            mixin, cls = cls.__bases__
            mixins.append(mixin)
        return _restore, (cls, *reversed(mixins)), self.__getstate__()


@functools.cache
def mixed(mixin: Any, cls: Any) -> Any:
    """The class with a mixin before it, under its own name: sharding and offloading name classes."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def _restore(cls: type, *mixins: type) -> Any:
    made: Any = functools.reduce(lambda made, mixin: mixed(mixin, made), mixins, cls)
    return made.__new__(made)


def extend(module: Any, mixin: type[Mixed], **attributes: Any) -> None:
    """Mix a class in before a module's own, unless it is, and set attributes of the module."""
    if not isinstance(module, mixin):
        module.__class__ = mixed(mixin, module.__class__)  # type: ignore[arg-type]
    for name, value in attributes.items():
        setattr(module, name, value)


def find_layers(backbone: nn.Module, count: int) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the decoder layers, and their list. Raises `ValueError` if there is no list of `count`."""
    for module in backbone.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise ValueError(f"{type(backbone).__name__} has no list of {count} layers: it cannot read a context")


def layer_index(encode_layer: str | int | float, num_layers: int) -> int:
    """The layer whose *input* is stored: `"last"` is `num_layers`, a share of the depth is rounded.

    Raises `ValueError` for a layer that the model does not have.
    """
    if encode_layer == LAST:
        return num_layers
    if isinstance(encode_layer, float) and 0 < encode_layer < 1:
        return max(1, round(encode_layer * num_layers))
    if (
        isinstance(encode_layer, int)
        and not isinstance(encode_layer, bool)
        and 1 <= encode_layer <= num_layers
    ):
        return encode_layer
    raise ValueError(
        f"encode_layer is {encode_layer!r}, want {LAST!r}, a layer from 1 to {num_layers}, or a share of the depth "
        "between 0 and 1; a + joins two of them"
    )


def layers_name(layers: Sequence[int], num_layers: int) -> str:
    """Layers as a store writes them down: `"last"`, `"18"`, `"10+18"`."""
    return "+".join(LAST if layer == num_layers else str(layer) for layer in layers)


def named_layers(name: str, num_layers: int) -> tuple[int, ...]:
    """Parse what `layers_name` writes; shares of the depth are accepted as well.

    Raises `ValueError` for layers that the model does not have.
    """
    return tuple(layer_index(_number(part), num_layers) for part in name.split("+"))


def _number(text: str) -> str | int | float:
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


class _Reached(Exception):
    """Ends a forward pass at the last layer that is wanted."""


@contextmanager
def layer_inputs(
    layers: nn.ModuleList, wanted: Sequence[int], found: dict[int, torch.Tensor], stop: bool = False
) -> Iterator[None]:
    """Record the input of each wanted layer, for calls of this thread; `stop` ends the block at the highest one."""
    thread, highest = threading.get_ident(), max(wanted)

    def see(index: int, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            found[index] = args[0] if args else kwargs["hidden_states"]
            if stop and index == highest:
                raise _Reached

    with ExitStack() as hooks:
        for index in wanted:
            see_layer = functools.partial(see, index)
            hook = layers[index].register_forward_pre_hook(
                lambda _, args, kwargs, see=see_layer: see(args, kwargs), with_kwargs=True
            )
            hooks.callback(hook.remove)
        with suppress(_Reached):
            yield


@torch.no_grad()
def encode_states(
    backbone: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    layers: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (C, S, d x number of layers) of contexts (C, S), and their boolean mask (C, S).

    `layers` are the layers whose inputs are returned; `num_hidden_layers` means the state after the final norm, which
    is the default. Nothing above the highest layer is computed. Padding may be on either side: tokens are moved to the
    left before the forward pass, so that a context starts at position 0 in every family. States at padding are
    meaningless.
    """
    num_layers: int = backbone.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    wanted = list(layers) or [num_layers]
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if attention_mask is None:
        order, given = None, {}
    else:
        order = (~mask).long().argsort(dim=-1, stable=True)  # tokens first, in their order
        input_ids, given = input_ids.gather(1, order), {"attention_mask": mask.gather(1, order).long()}
    found: dict[int, torch.Tensor] = {}
    below = [layer for layer in wanted if layer < num_layers]
    if below:
        decoder_layers = find_layers(backbone, num_layers)[1]
        with layer_inputs(decoder_layers, below, found, stop=num_layers not in wanted):
            found[num_layers] = backbone(input_ids, use_cache=False, **given).last_hidden_state
    else:
        found[num_layers] = backbone(input_ids, use_cache=False, **given).last_hidden_state
    # Layers may be on other devices.
    states = torch.cat([found[layer].to(input_ids.device) for layer in wanted], dim=-1)
    if order is not None:
        states = states.gather(1, order.argsort(dim=-1)[..., None].expand_as(states))
    return states, mask
