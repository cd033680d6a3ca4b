"""The store of a data set: its questions, finishing it, and its rows with their encodings.

    train/, val/        id, context, question, answer, answers, context_index
    contexts/           segments of fixed row ranges, each with a JSON file that says how it was made

All three are plain Hugging Face datasets. A store of texts only has no `contexts/`.
"""

import bisect
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
import xxhash
from datasets import DatasetDict, Features, List, Value

from dssk.errors import DamagedData, DsskError
from dssk.store.manifest import (
    CONTEXTS,
    MANIFEST,
    SPLITS,
    Counts,
    DataSet,
    FileInfo,
    Manifest,
    Segment,
    Settings,
    load_shard_info,
)
from dssk.store.opening import check_sizes, load_manifest, repair, verified
from dssk.store.segments import SegmentFile, context_features, open_segment
from dssk.utils import files
from dssk.utils.files import content_of, inside

_DATASET_FILES = ("dataset_info.json", "state.json")

QUESTION_FEATURES = Features(
    {
        "id": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "answers": List(Value("string")),
        "context_index": Value("int64"),
    }
)


# --- writing ---------------------------------------------------------------------------------------------------


def write_dataset_files(folder: Path, features: Features, hashes: dict[str, str]) -> dict[str, FileInfo]:
    """The two JSON files that make a folder of Arrow files (name -> xxh3_128) a dataset for `load_from_disk`.

    Returns them by their paths relative to the store.
    """
    info = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""}
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in hashes],
        # `datasets` names cached results of `map` by it.
        "_fingerprint": xxhash.xxh3_64_hexdigest(json.dumps(hashes).encode()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    values = zip(_DATASET_FILES, (info, state), strict=True)
    return {f"{folder.name}/{name}": _write_json(folder / name, value) for name, value in values}


def finish(
    folder: Path, settings: Settings, counts: Counts, shard_names: list[str], tables: dict[str, FileInfo]
) -> Manifest:
    """Write the manifest of a store whose parts are in place.

    `shard_names` are the segments' file names in `contexts/`; `tables` the files of `train/` and `val/`, as they were
    written: nothing is read, so that what was damaged since is not taken for what was written.
    """
    infos = dict(tables)
    segments = []
    for name in shard_names:
        path = folder / CONTEXTS / name
        shard = load_shard_info(path.with_suffix(".json"))
        if shard is None:
            raise DamagedData(f"{path.with_suffix('.json')} is gone or damaged: start the same command again")
        segments.append(
            Segment(
                name=f"{CONTEXTS}/{name}",
                rows=shard.rows,
                num_bytes=shard.num_bytes,
                xxh3_128=shard.xxh3_128,
            )
        )
        infos[f"{CONTEXTS}/{path.stem}.json"] = _info_of_text(shard.to_json())
    if settings.storage_dtype is not None:
        hashes = {Path(segment.name).name: segment.xxh3_128 for segment in segments}
        features = context_features(settings.storage_dtype)
        infos |= write_dataset_files(folder / CONTEXTS, features, hashes)
    infos["dataset_dict.json"] = _write_json(folder / "dataset_dict.json", {"splits": list(SPLITS)})
    entries = settings.model_dump()
    data_set = DataSet(**{name: entries.pop(name) for name in ("shard_rows", "source")}, counts=counts)
    manifest = Manifest(**entries, segments=segments, files=infos, data_set=data_set)
    files.write_text(folder / MANIFEST, manifest.to_json())
    return load_manifest(folder)


def _write_json(path: Path, value: Any) -> FileInfo:
    text = json.dumps(value, indent=2) + "\n"
    files.write_text(path, text)
    return _info_of_text(text)


def _info_of_text(text: str) -> FileInfo:
    content = text.encode()
    return FileInfo(num_bytes=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))


# --- reading ---------------------------------------------------------------------------------------------------


def load_rows(path: str | Path) -> DatasetDict:
    """The rows of a store: splits `train` and `val` with id, context, question, answer, answers, encoder_hidden_states.

    `encoder_hidden_states` of a row is a tensor (n_tokens, hidden_size) in the stored type: a view of the
    memory-mapped file, so it costs nothing until it is used (int8 is decoded to bfloat16). Writing to it does not
    reach the file. A store of texts only has no such column. In the table itself the column holds the row number of
    the context in `contexts/`.

    Sizes of all files are checked at once, and their bytes when they are first used: `DamagedData` says which
    changed. `datasets` keeps what `shuffle` and `filter` make beside the files it has read: pass
    `keep_in_memory=True` to leave the store as it is.
    """
    folder = Path(path)
    manifest = load_manifest(folder)
    manifest.require_questions()
    check_sizes(folder, manifest)
    rows = {split: _questions(folder, manifest, split) for split in SPLITS}
    if manifest.storage_dtype is None:
        return DatasetDict({split: table.remove_columns("context_index") for split, table in rows.items()})
    fetch = StoredContexts(folder, manifest)
    return DatasetDict(
        {
            split: table.rename_column("context_index", "encoder_hidden_states").with_transform(fetch)
            for split, table in rows.items()
        }
    )


def _questions(folder: Path, manifest: Manifest, split: str) -> datasets.Dataset:
    for name, info in manifest.files.items():
        if name.startswith(f"{split}/"):
            verified(folder, name, info)
    with content_of(folder / split, repair(folder)):
        state = json.loads((folder / split / "state.json").read_bytes())
        for entry in state["_data_files"]:
            inside(folder / split, entry["filename"])
        table = datasets.load_from_disk(str(folder / split))
        if table.features != QUESTION_FEATURES:
            raise ValueError("other columns")
        rows = table.data.column("context_index")
        contexts = sum(segment.rows for segment in manifest.segments)
        if (
            manifest.segments
            and len(table)
            and not 0 <= pc.min(rows).as_py() <= pc.max(rows).as_py() < contexts
        ):
            raise ValueError(f"rows of contexts that are not among the {contexts}")
        return table


def load_contexts(path: str | Path) -> "StoredContexts":
    """The contexts of a store by their row numbers, those without questions too."""
    manifest = load_manifest(path)
    if manifest.storage_dtype is None:
        raise DsskError(f"{path} holds texts only: preprocess without --text_only")
    return StoredContexts(path, manifest)


class StoredContexts:
    """The contexts of a store, by their row numbers. Pickles as a path.

    As a transform of rows it replaces the numbers in the column `encoder_hidden_states` by the states themselves.
    """

    def __init__(self, path: str | Path, manifest: Manifest):
        self.folder = Path(path).resolve()
        self.manifest = manifest
        self.first_rows = [0, *itertools.accumulate(segment.rows for segment in manifest.segments)]
        self._open: dict[int, SegmentFile] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self.first_rows[-1]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "encoder_hidden_states" in batch:
            batch["encoder_hidden_states"] = [self.states(row) for row in batch["encoder_hidden_states"]]
        return batch

    def states(self, row: int) -> torch.Tensor:
        """The states of context number `row`: (n_tokens, hidden_size)."""
        segment, place = self._find(row)
        return segment.states(place)

    def text(self, row: int) -> str:
        """The text of context number `row`."""
        segment, place = self._find(row)
        return segment.value("context", place, "")

    def column(self, name: str) -> list[Any]:
        """The values of a column for all contexts, in order."""
        return [
            value for i in range(len(self.manifest.segments)) for value in self._segment(i).column(name, "")
        ]

    def _find(self, row: int) -> tuple[SegmentFile, int]:
        index = bisect.bisect_right(self.first_rows, row) - 1
        return self._segment(index), row - self.first_rows[index]

    def _segment(self, index: int) -> SegmentFile:
        if index not in self._open:
            segment = self.manifest.segments[index]
            self._open[index] = open_segment(self.folder, self.manifest, segment)
        return self._open[index]
