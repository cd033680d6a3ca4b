"""Reading JSON that a crash, a disk or a person may have changed: right, or one line that names the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from dssk.errors import DamagedData, EnvironmentFault

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """The content of a JSON file, which must be a `kind` (dict or list).

    Raises `DamagedData` for anything else in it, `FileNotFoundError` if there is none, `EnvironmentFault` if it
    cannot be read.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedData(f"{path} is damaged: {error}") from error
    if not isinstance(value, kind):
        raise DamagedData(f"{path} is damaged: it holds {type(value).__name__}, want {kind.__name__}")
    return value


def read_objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file, one a line; None for a line that holds none, such as one torn by a crash."""
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        yield value if isinstance(value, dict) else None


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with `ValueError` in one short line for whatever is wrong, nesting without end included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except ValueError:  # Python's limit on the digits of a whole number
        raise ValueError("it holds a number of too many digits") from None
