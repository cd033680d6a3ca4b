"""`status.json`: how a run stands, for whoever cannot see its exit code (torchrun turns every code into 1)."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dssk.errors import DsskError, Preempted
from dssk.run_folder import STATUS, read_status
from dssk.utils.files import write_json

INTERRUPTED_CODE = 130  # what a shell reports of a command that Ctrl-C ended


@contextlib.contextmanager
def reported(savedir: Path, rank: int) -> Iterator[None]:
    """Keep the status of the block: `running`, then `done`, `preempted` or `failed`. Its exception goes on."""
    if rank == 0:
        _write(savedir, rank, "running")
    try:
        yield
    except (Preempted, KeyboardInterrupt) as stop:
        if rank == 0:
            code = stop.exit_code if isinstance(stop, Preempted) else INTERRUPTED_CODE
            _write(savedir, rank, "preempted", code, str(stop) or "interrupted")
        raise
    except BaseException as error:
        if read_status(savedir).get("state") == "failed":
            raise  # the first rank to fail knows the reason, the others only miss it
        code = getattr(error, "exit_code", 1)
        _write(savedir, rank, "failed", code, str(error) if isinstance(error, DsskError) else repr(error))
        raise
    if rank == 0:
        _write(savedir, rank, "done", 0)


def _write(savedir: Path, rank: int, state: str, code: int | None = None, reason: str | None = None) -> None:
    status = {
        "state": state,
        "code": code,
        "reason": reason,
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with contextlib.suppress(OSError, DsskError):  # a full disk must not hide why the run ended
        write_json(savedir / STATUS, status)
