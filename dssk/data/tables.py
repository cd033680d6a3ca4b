"""Rows of Parquet and Arrow files, read by a process of its own: a damaged one can crash the library that reads it.

    python -m dssk.data.tables URL

writes the rows as JSON lines. What ends it, be it a signal, becomes one line of the process that asked for them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dssk.errors import DamagedData, EnvironmentFault, exit_code_of

_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[2])
_BATCH_ROWS = 64
_ARROW_FILE_MAGIC = b"ARROW1"
# The HTML of Natural Questions is most of its bytes and is not needed: it is never fetched.
_NQ_COLUMNS = [
    "id",
    "document.title",
    "document.tokens.token",
    "document.tokens.is_html",
    "question.text",
    "annotations",
]


def rows(url: str) -> Iterator[Any]:
    """The rows of a table, a path or an `hf://` address."""
    path = os.pathsep.join([_PACKAGE_FOLDER, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", __name__, url if url.startswith("hf://") else os.path.abspath(url)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        try:
            yield from map(json.loads, reader.stdout)
            said = reader.stderr.read().decode(errors="replace").strip()
        except GeneratorExit:  # nobody wants the rest
            reader.kill()
            raise
        except ValueError as error:
            reader.kill()
            raise DamagedData(f"{url} is damaged: it gives rows that are no JSON: fetch it again") from error
    if reader.returncode:
        raise _fault(url, reader.returncode, said)


def _fault(url: str, code: int, said: str) -> Exception:
    if code == EnvironmentFault.exit_code:
        return EnvironmentFault(f"cannot read {url}: {said}")
    if code == -signal.SIGKILL:
        return EnvironmentFault(f"cannot read {url}: its reader was killed (out of memory?)")
    if code < 0:
        said = f"reading it ends in {signal.Signals(-code).name}"
    return DamagedData(
        f"{url} is damaged: {said.splitlines()[-1] if said else 'no more is known'}: fetch it again"
    )


# --- in the process of its own ----------------------------------------------------------------------------------


def main() -> int:
    """Write the rows of the table named on the command line to standard output."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever asked has gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the one who asked ends us
    url = sys.argv[1]
    import pyarrow as pa

    try:
        for batch in _batches(url):
            batch.validate(full=True)
            for row in batch.to_pylist():
                sys.stdout.write(json.dumps(row, default=str) + "\n")
        sys.stdout.flush()
    except pa.ArrowException as error:
        return _say(error, DamagedData.exit_code)
    except OSError as error:
        damaged = type(error) is OSError and error.errno is None  # of Arrow itself
        return _say(error, (DamagedData if damaged else EnvironmentFault).exit_code)
    except Exception as error:  # whatever damage makes a library raise
        return _say(error, DamagedData.exit_code)
    return 0


def _say(error: Exception, code: int) -> int:
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    print(text.splitlines()[0], file=sys.stderr)
    return code


def _batches(url: str) -> Iterator[Any]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb").open() if url.startswith("hf://") else open(url, "rb") as file:
        if url.endswith(".parquet"):
            table = pq.ParquetFile(file)
            columns = _NQ_COLUMNS if "document" in table.schema_arrow.names else None
            yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            return
        is_file = file.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        file.seek(0)
        if is_file:
            source = pa.ipc.open_file(file)
            yield from (source.get_batch(number) for number in range(source.num_record_batches))
        else:
            yield from pa.ipc.open_stream(file)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
