"""`status.json`: how a run stands, for whoever cannot see its exit code (torchrun turns every code into 1)."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dssk.errors import DsskError, Preempted
from dssk.utils.files import publish_json

STATUS_FILE = "status.json"


@contextlib.contextmanager
def reported(savedir: Path, rank: int) -> Iterator[None]:
    """Keep the status of the block: `running`, then `done`, `preempted` or `failed`. Its exception goes on."""
    if rank == 0:
        _write(savedir, rank, "running")
    try:
        yield
    except Preempted as stop:
        if rank == 0:
            _write(savedir, rank, "preempted", stop.exit_code, str(stop))
        raise
    except BaseException as error:
        if _failed(savedir):
            raise  # the first rank to fail knows the reason, the others only miss it
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        _write(savedir, rank, "failed", code, str(error) if isinstance(error, DsskError) else repr(error))
        raise
    if rank == 0:
        _write(savedir, rank, "done", 0)


def _failed(savedir: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((savedir / STATUS_FILE).read_text())["state"] == "failed"
    return False


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
        publish_json(savedir / STATUS_FILE, status)
