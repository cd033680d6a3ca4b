"""Commands of dssk in processes of their own that import nothing: each is forked from one that has it all.

A command runs with its own working directory, standard streams and exit code, as it does from a shell; one that
crashes or hangs harms no other. The process that they are forked from has no threads.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

LIMIT_SECONDS = 60
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])
# Starting a process asks all others for their exit codes, and each can be read once.
_starting_or_reading = threading.Lock()


def preload(module: str) -> None:
    """Fork from a process that has imported `module` in place of `preload.py`; to be said before the first one."""
    _context.set_forkserver_preload([module])


class Done(NamedTuple):
    """How a command ended; `code` is negative for a signal, None if it was still running at the limit."""

    argv: Sequence[str]
    code: int | None
    out: str
    err: str
    seconds: float


class Running:
    """A command, or any function of a module, on its way; files beside `folder` take what it says."""

    def __init__(self, call: Sequence[str] | Callable, folder: Path, stdin: str = "", *args: Any, **env: str):
        self.argv = [call.__name__] if callable(call) else list(call)
        self._said = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
        self._start = time.monotonic()
        self.process: ForkServerProcess = _context.Process(
            target=_run, args=(call, args, folder, stdin, self._said, env)
        )
        with _starting_or_reading:
            self.process.start()

    def kill(self) -> None:
        """Signal 9, to whatever it has started, too."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()  # before it had a group of its own
        self._exit_code()

    def done(self, limit_seconds: float = LIMIT_SECONDS) -> Done:
        """Wait for its end; where more runs than there are cores, as many times as long."""
        code = self._exit_code(limit_seconds * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)))
        if code is None:
            self.kill()
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._said)
        return Done(self.argv, code, out, err, time.monotonic() - self._start)

    def _exit_code(self, limit_seconds: float | None = None) -> int | None:
        """Wait for the end; None if it has not come by then."""
        wait([self.process.sentinel], limit_seconds)
        with _starting_or_reading:
            return self.process.exitcode


def run(call: Sequence[str] | Callable, folder: Path, *args: Any, stdin: str = "", **env: str) -> Done:
    """A command, to its end."""
    return Running(call, folder, stdin, *args, **env).done()


def _run(call, args: tuple, folder: Path, stdin: str, said: list[Path], env: dict[str, str]) -> None:
    with suppress(OSError):
        os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.update(env)
    for number, file in enumerate(said, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdin = io.StringIO(stdin)
    if callable(call):
        call(*args)
        return
    from dssk.__main__ import main

    sys.argv = ["dssk", *call]
    sys.exit(main(list(call)))
