"""A device that is not there: its tensors are computed on the CPU, but refuse to meet those of any other device.

So what runs on a GPU is tested without one: a mask or an index that was left behind on the CPU raises here as it would
there. PyTorch keeps a device type free for backends written in Python, for the whole of a process: import this in one
that does nothing else.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
MOVING = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class _Backend(_DummyBackendModule):
    """What checkpoints ask a backend for; its random numbers are the CPU's."""

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend("elsewhere", backend_module=_Backend())
ELSEWHERE = torch.device("elsewhere", 0)


class Tensor(torch.Tensor):
    """A tensor of a device that is not there; `held` is where its numbers are."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "Tensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=device, **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a tensor on {self.device} has no numpy array: want .cpu() first")

    __array__ = numpy


def _run(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator makes of tensors, on the device of them all. Raises `RuntimeError` if they have several."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # As on a GPU: a single number may come from the CPU, and so may indices.
    meeting = [t for t in tensors if isinstance(t, Tensor) or (t.dim() and operator not in INDEXING)]
    meeting += args[:1] if operator in INDEXING else []
    devices = {t.device for t in (meeting[:1] if operator in MOVING else meeting)}
    if len(devices) > 1:
        raise RuntimeError(f"{operator}: tensors on {' and '.join(sorted(map(str, devices)))}")
    device = next(iter(devices), torch.device("cpu"))
    if kwargs.get("device") is not None:
        device, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": torch.device("cpu")}
    here_args, here_kwargs = tree_map_only(Tensor, lambda t: t.held, (args, kwargs))
    known = {id(t.held if isinstance(t, Tensor) else t): t for t in tensors}  # of operators in place

    def there(result: torch.Tensor) -> torch.Tensor:
        if id(result) in known:
            return known[id(result)]
        return result if device.type == "cpu" else Tensor(result, device)

    return tree_map_only(torch.Tensor, there, operator(*here_args, **here_kwargs))


class _Operators(TorchDispatchMode):
    """Operators without a tensor among their arguments: those that make one."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """Lists become tensors on the CPU, and move: PyTorch would do both at once, where no mode sees it."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Inside the block, in this thread, `ELSEWHERE` is a device like any other."""
    with _Operators(), _Lists():
        yield
