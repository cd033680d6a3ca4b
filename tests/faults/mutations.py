"""Small changes of bytes, of JSON values, and of what is sealed by a checksum: each decided by a generator alone."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from pydantic_core import to_json

MARKUP = "<script>alert(1)</script>"  # must reach no page as it is
_BYTES = [b"\0", b"\xff", b'"', b"{", b"]", b"\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b",", b"-", b"9" * 30]
_DEEP = "@deep@"  # json.dumps could not write it
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 1.5, 2**63, 10**40, 10**400, float("nan"), float("inf"), -0.0),
    *("", " ", "\ud800", "\0", "a" * 5000, "../neighbour", "/etc/passwd", "..", ".", "é" * 300, "~", "NaN"),
    *("a\nb", "\x1b[31m", MARKUP, "-1", "$(touch x)", "'; touch x #", "%s", "{0}", "\u202e", "base", "CON"),
    *([], {}, [[]], [None], [1, 2], ["x"], {"text": "x"}, {"": ""}, _DEEP, ["a"] * 1000),
]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Another content: one to three bits, pieces or the end of it changed."""
    changed = data
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(changed) + 1), rng.randrange(1, 40)
        head, piece, tail = changed[:at], changed[at : at + length], changed[at + length :]
        kind = rng.randrange(6)
        if kind == 0 and piece:
            changed = head + bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:] + tail
        elif kind == 1:
            changed = head  # cut
        elif kind == 2:
            changed = head + tail
        elif kind == 3:
            changed = head + piece + piece + tail
        elif kind == 4:
            changed = head + rng.choice(_BYTES) + piece + tail
        else:
            changed = head + rng.randbytes(len(piece)) + tail
    return changed


def flip(rng: random.Random, data: bytes) -> bytes:
    """One bit flipped, or for every fourth the end cut off."""
    at = rng.randrange(len(data))
    if rng.randrange(4) == 0:
        return data[:at]
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def mutate_value(rng: random.Random, value: Any) -> Any:
    """Another JSON value: one entry, anywhere in it, replaced, removed, doubled, wrapped or added."""
    value = copy.deepcopy(value)
    holders = [holder for holder in _containers(value) if holder]
    if not holders:
        return rng.choice(VALUES)
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "unknown", "a\nb", str(key) + "x", "x" * 300, "\ud800", MARKUP))] = rng.choice(
            VALUES
        )
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3:
        holder[key] = {"text": holder[key]}
    elif kind == 4 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 0, 2, 10**6, 0.5)) + rng.choice((-1, 0, 1))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value if rng.randrange(30) else rng.choice(VALUES)


def dumps(value: Any, indent: int | None = None) -> bytes:
    """JSON, with nesting as deep as a file can have it."""
    text = json.dumps(value, indent=indent)
    return text.replace(f'"{_DEEP}"', "[" * 5000 + "]" * 5000).encode()


def mutate_json_file(rng: random.Random, path: Path, keep_indent: int | None = None) -> None:
    path.write_bytes(dumps(mutate_value(rng, json.loads(path.read_bytes())), keep_indent))


def mutate_lines(rng: random.Random, path: Path) -> None:
    """One line of a file of JSON lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = dumps(mutate_value(rng, json.loads(lines[at]))) + b"\n"
    path.write_bytes(b"".join(lines))


def reseal_store(folder: Path, change: Callable[[dict], Any] = lambda body: body) -> None:
    """Write the manifest of a store or a library anew, so that everything in it fits what lies there now."""
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    for name, entry in [(s["name"], s) for s in body["segments"]] + list(body["files"].items()):
        if (folder / name).is_file():
            entry.update(_info(folder / name))
    body = change(body)
    if isinstance(body, dict):
        try:
            body["checksum"] = xxhash.xxh3_128_hexdigest(to_json({**body, "checksum": ""}))
            path.write_bytes(to_json(body, indent=1) + b"\n")
            return
        except ValueError:  # half a surrogate pair, which it could not write
            pass
    path.write_bytes(dumps(body, 1))


def reseal_checkpoint(folder: Path, change: Callable[[dict], Any] = lambda body: body) -> None:
    """The same for a checkpoint or a fused model."""
    path = folder / "dssk_manifest.json"
    body = json.loads(path.read_bytes())
    body.pop("checksum")
    for name, entry in body["files"].items():
        if (folder / name).is_file():
            entry.update(_info(folder / name))
    body = change(body)
    if isinstance(body, dict):
        body["checksum"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    path.write_bytes(dumps(body, 2))


def _info(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"num_bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _containers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [value, *(c for entry in value.values() for c in _containers(entry))]
    if isinstance(value, list):
        return [value, *(c for entry in value for c in _containers(entry))]
    return []
