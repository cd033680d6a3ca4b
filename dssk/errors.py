"""Errors that a user can cause or mend, and their exit codes for schedulers.

Every error a user can cause or mend is a `DsskError`: `exit_code_of` prints it as one line and exits with its code.
Anything else is our own bug and keeps its traceback (exit code 1).
"""

import errno
import os
import select
import signal
import sys
from collections.abc import Callable

MAX_MESSAGE_CHARACTERS = 600
_OMISSION = " ... "
# What the machine refuses wherever it is asked: only there is it known what it means.
_REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EMFILE,
    errno.EIO,
)


class DsskError(Exception):
    """A mistake in usage, configuration, data or model: running the same command again will not help."""

    exit_code = 2


class EnvironmentFault(DsskError):
    """The machine is at fault: disk full, target read-only, hub unreachable, no device."""

    exit_code = 3


class DamagedData(DsskError):
    """Stored data is not what was written: truncated, altered or incomplete."""

    exit_code = 4


class Diverged(DsskError):
    """A loss, a weight or an encoding is NaN or infinite."""

    exit_code = 5


class Locked(DsskError):
    """Another process is writing to the same folder."""

    exit_code = 6


class Preempted(DsskError):
    """Stopped from outside with everything saved: the same command goes on from here."""

    exit_code = 75


def short(value: object, max_characters: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Anything as one printable line: control characters are escaped, and the middle of a long text is left out."""
    text = str(value)
    if len(text) > max_characters:  # what to do stands at the end
        tail = (max_characters - len(_OMISSION)) // 2
        text = text[: max_characters - len(_OMISSION) - tail] + _OMISSION + text[-tail:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Call `main` and return the process's exit code; a `DsskError` becomes one line on standard error."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
    except DsskError as error:
        return _said(error)
    except MemoryError:
        return _said(
            EnvironmentFault("out of memory: lower what is done at a time, or take a machine with more of it")
        )
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _said(DsskError(f"a name is too long: {short(error.filename, 100)}"))
        if error.errno not in _REFUSED:
            raise
        return _said(EnvironmentFault(f"{error.strerror}: {error.filename}"))
    except KeyboardInterrupt:
        print("dssk: interrupted", file=sys.stderr)
        return 130


def _said(error: DsskError) -> int:
    print(f"dssk: error: {short(error)}", file=sys.stderr)
    return error.exit_code


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader, such as `head`, has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
