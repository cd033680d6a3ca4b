"""The processes that torchrun started together, on one node or on several that share the output folder.

torch is imported where there are several: flags ask for their number, and `--help` has to be quick.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from dssk.errors import DsskError

T = TypeVar("T")
# Others wait while the first reads the source; torchrun sees deaths sooner.
_TIMEOUT = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows: number `rank` of `size`, number `local_rank` on its node."""

    rank: int
    size: int
    local_rank: int

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process and return its result, or raise its `DsskError`, in every process."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        shared: list = [None]
        if self.rank == 0:
            try:
                shared = [make()]
            except DsskError as error:
                shared = [error]
        dist.broadcast_object_list(shared)
        if isinstance(shared[0], DsskError):
            raise shared[0]
        return shared[0]

    @contextlib.contextmanager
    def first_holds(self, resource: AbstractContextManager[None]) -> Iterator[None]:
        """Run the block in every process while the first one holds `resource`, such as a lock."""
        with contextlib.ExitStack() as stack:
            self.from_first(lambda: stack.enter_context(resource))
            yield

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


def launched() -> int:
    """How many processes a launcher started, from WORLD_SIZE; 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise DsskError(
            f"WORLD_SIZE is {text!r}, want the number of processes: torchrun sets it, or unset it"
        )
    if int(text) > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise DsskError(f"WORLD_SIZE is {text} and {name} is not set: start by torchrun, or unset it")
    return int(text)


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """Meet the other processes of a torchrun launch; without torchrun this process is alone."""
    size = launched()
    if size == 1:
        yield Ranks(0, 1, 0)
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size, int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()
