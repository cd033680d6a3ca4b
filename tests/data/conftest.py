"""Fixtures of the data tests: small sources, stores made by the real command, and the shared real data."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from dssk.commands import preproc
from tests.conftest import NO_SHARED_DATA, SHARED_DATA


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED_DATA / "nq").is_dir():
        pytest.skip(NO_SHARED_DATA)
    return SHARED_DATA


@pytest.fixture(scope="session")
def shared_rows(shared_data) -> Callable[[str], list[dict]]:
    """All rows of a shared file, such as `nq/qed_dev_1355`."""

    def read(name: str) -> list[dict]:
        with gzip.open(shared_data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    return read


def rows(num_contexts: int, questions: int = 2, start: int = 0) -> list[dict[str, Any]]:
    """Plain rows about contexts of unequal length, `questions` of them about each."""
    return [
        {
            "id": f"{c}-{q}",
            "context": f"Town {c} lies by the river. " + f"It has {c} mills. " * (c % 7),
            "question": f"how many {'mills' if q else 'bridges'} has town {c}",
            "answer": str(c),
        }
        for c in range(start, start + num_contexts)
        for q in range(questions)
    ]


def write_jsonl(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    """A JSONL file of 80 rows about 40 contexts."""
    return write_jsonl(tmp_path / "rows.jsonl", rows(40))


@pytest.fixture(scope="session")
def preprocess(base_path) -> Callable[..., Path]:
    """Run the preprocessing command in this process; returns the folder that it made. Flags by name."""

    def run(cache: Path, dataset: Path | str, model: Path = base_path, **flags: Any) -> Path:
        settings = {
            "maximum_input_length": 256,
            "batch_size": 4,
            "shard_rows": 8,
            "val_fraction": 0.2,
        } | flags
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        preproc.main(
            [
                "--embedding_model",
                str(model),
                "--data_cache_path",
                str(cache),
                "--dataset",
                str(dataset),
                *words,
            ]
        )
        return cache / "processed_data" / model.name

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, preprocess) -> Path:
    """A finished store of 80 rows about 40 contexts in 5 shards. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    return preprocess(folder, write_jsonl(folder / "rows.jsonl", rows(40)))


def stamps(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
