"""The store of encoded contexts: what is in it, how its tables are written, and the one way to read it.

    manifest.json       what the store is, written last: a folder without it is unfinished
    train/, val/        questions: id, context, question, answer, answers, context_index
    contexts/           each distinct context once: context, n_tokens, encoder_hidden_states (bytes) [, scale]

All three are plain Hugging Face datasets. `contexts/` is cut into shards of fixed row ranges, one Arrow file and
one JSON manifest each. A store of texts only has no `contexts/`.
"""

import bisect
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import DatasetDict, Features, List, Value
from pydantic import BaseModel, ConfigDict, Field

from dssk import prompts
from dssk.errors import DamagedData, DsskError
from dssk.inference.fingerprint import is_model, tokenizer_hash
from dssk.inference.loading import load_base_config
from dssk.inference.rounding import SCALE_DTYPE, TORCH_DTYPES, StorageDtype, dequantize
from dssk.inference.tokenizer import load_tokenizer
from dssk.utils import files

MANIFEST = "manifest.json"
CONTEXTS = "contexts"
SPLITS = ("train", "val")
FORMAT_VERSION = 1
HISTOGRAM_BIN_TOKENS = 16
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


def context_features(storage_dtype: StorageDtype) -> Features:
    """The columns of `contexts/`. Arrow has no bfloat16, hence bytes: (n_tokens, hidden_size) in row-major order."""
    columns = {
        "context": Value("string"),
        "n_tokens": Value("int32"),
        "encoder_hidden_states": Value("large_binary"),
    }
    if storage_dtype == "int8":
        columns["scale"] = Value("large_binary")  # (n_tokens,) of bfloat16
    return Features(columns)


class Strict(BaseModel):
    """What is written as JSON: no unknown keys, no wrong types, no change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Encoding(Strict):
    """Which model made encodings, how, and in what form they are kept."""

    format_version: int = FORMAT_VERSION
    model_id: str = Field(description="as it was given: a path or a name on the Hub")
    model_revision: str | None = Field(description="commit on the Hub; None for a folder")
    model_fingerprint: str = Field(description="see `dssk.models.fingerprint`")
    tokenizer_hash: str
    hidden_size: int
    model_dtype: str = Field(description="type that the model computed in, such as bfloat16")
    storage_dtype: StorageDtype | None = Field(description="None: texts only")
    template_version: int = Field(description="of `dssk.prompts`")
    maximum_input_length: int = Field(description="tokens that a context is cut to")


class Settings(Encoding):
    """What decides the content of a store. Two runs with equal settings give equal rows and encodings."""

    shard_rows: int = Field(description="contexts in a shard")
    source: dict[str, str | int | float | None] = Field(
        description="data set, its files' fingerprint, how it was split"
    )

    @property
    def encoding_key(self) -> list:
        """The settings that decide the bytes of an encoded context."""
        return [self.model_fingerprint, self.model_dtype, self.storage_dtype, self.template_version]


class ShardInfo(Strict):
    """One shard of `contexts/`, as its own JSON manifest says."""

    key: str = Field(
        description="xxh3_128 of the tokens that were encoded and of the settings that decide the bytes"
    )
    first_row: int
    rows: int
    tokens: int
    num_bytes: int
    xxh3_128: str
    batch_size: int
    batch_tokens: int
    out_of_memory_splits: int = Field(description="batches cut in two for lack of memory; bytes depend on it")


class FileInfo(Strict):
    num_bytes: int
    xxh3_128: str


class Counts(Strict):
    """What became of the rows that were read."""

    read: int
    dropped: dict[str, int] = Field(description="reason -> rows")
    bad_rows: list[str] = Field(description="place and fault of the rows skipped with --skip_bad_rows")
    rows: dict[str, int] = Field(description="split -> question rows kept")
    contexts: int
    truncated: int = Field(description="contexts longer than maximum_input_length")
    tokens: int = Field(description="of all contexts, after truncation")
    length_histogram: list[int] = Field(description="contexts by n_tokens, in bins of HISTOGRAM_BIN_TOKENS")


class Manifest(Settings):
    """All there is to know about a finished store."""

    counts: Counts
    shards: list[ShardInfo]
    files: dict[str, FileInfo] = Field(description="every other file of the store, by path relative to it")
    checksum: str = Field(default="", description="xxh3_128 of this file without this entry")

    @property
    def settings(self) -> Settings:
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})

    def to_json(self) -> str:
        """The exact text of `manifest.json`."""
        body = self.model_copy(update={"checksum": ""}).model_dump_json()
        checksum = xxhash.xxh3_128_hexdigest(body.encode())
        return self.model_copy(update={"checksum": checksum}).model_dump_json(indent=1) + "\n"


def lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Be the only one to write to a store; the lock file lies beside it, so that the store is only what it holds."""
    return files.lock(folder.with_name(f".{folder.name}.lock"))


def shard_name(index: int, num_shards: int) -> str:
    return f"data-{index:05d}-of-{num_shards:05d}"


def load_shard_info(path: Path) -> ShardInfo | None:
    """The manifest of one shard; None if there is none that can be read."""
    try:
        return ShardInfo.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


# --- writing ---------------------------------------------------------------------------------------------------


def encoded_record(
    texts: Sequence[str],
    input_ids: Sequence[Sequence[int]],
    states: torch.Tensor,
    scale: torch.Tensor | None,
    schema: pa.Schema,
) -> pa.RecordBatch:
    """Contexts with their states (tokens, hidden_size) as `quantize` made them, as rows of `context_features`."""
    lengths = np.array([len(ids) for ids in input_ids])
    columns = [pa.array(texts, pa.string()), pa.array(lengths, pa.int32()), _binary(states, lengths)]
    if scale is not None:
        columns.append(_binary(scale, lengths))
    return pa.record_batch(columns, schema=schema)


def _binary(values: torch.Tensor, lengths: np.ndarray) -> pa.Array:
    """Rows of `values` (tokens, ...), `lengths` of them to each entry, as a large_binary array without a copy."""
    data = values.contiguous().cpu().flatten().view(torch.uint8).numpy()
    row_bytes = len(data) // len(values)
    offsets = np.concatenate([[0], np.cumsum(lengths)]) * row_bytes
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)]
    )


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> FileInfo:
    """Write an Arrow stream, whole or not at all."""
    with files.publish(path) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return FileInfo(num_bytes=file.num_bytes, xxh3_128=file.hexdigest())


def write_dataset_files(folder: Path, features: Features, hashes: dict[str, str]) -> None:
    """The two JSON files that make a folder of Arrow files (name -> xxh3_128) a dataset for `load_from_disk`."""
    info = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""}
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in hashes],
        "_fingerprint": xxhash.xxh3_64_hexdigest(
            json.dumps(hashes).encode()
        ),  # names cached results of `map`
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    for name, value in zip(_DATASET_FILES, (info, state), strict=True):
        files.publish_json(folder / name, value)


def finish(folder: Path, settings: Settings, counts: Counts, shard_names: list[str]) -> Manifest:
    """Write the manifest of a store whose rows and shards (Arrow files of these names) are in place."""
    contexts = folder / CONTEXTS
    shards = {contexts / name: _finished_shard(contexts / name) for name in shard_names}
    if settings.storage_dtype is not None:
        hashes = {path.name: shard.xxh3_128 for path, shard in shards.items()}
        write_dataset_files(contexts, context_features(settings.storage_dtype), hashes)
    files.publish_json(folder / "dataset_dict.json", {"splits": list(SPLITS)})
    infos = {}
    for path in _parts(folder):
        shard = shards.get(path)  # its hash is known
        infos[path.relative_to(folder).as_posix()] = FileInfo(
            num_bytes=path.stat().st_size, xxh3_128=shard.xxh3_128 if shard else files.xxh3_128(path)
        )
    manifest = Manifest(**settings.model_dump(), counts=counts, shards=list(shards.values()), files=infos)
    files.publish_text(folder / MANIFEST, manifest.to_json())
    return load_manifest(folder)


def _parts(folder: Path) -> Iterator[Path]:
    """The files that a store consists of, its manifest left out; what others put beside them does not count."""
    yield folder / "dataset_dict.json"
    for part in (*SPLITS, CONTEXTS):
        if (folder / part).is_dir():
            yield from (folder / part / name for name in _DATASET_FILES)
            yield from sorted((folder / part).glob("data-*"))


def _finished_shard(path: Path) -> ShardInfo:
    shard = load_shard_info(path.with_suffix(".json"))
    if shard is None:
        raise DamagedData(f"{path.with_suffix('.json')} is gone or damaged: start the same command again")
    return shard


# --- reading ---------------------------------------------------------------------------------------------------


def load_manifest(path: str | Path) -> Manifest:
    """Read and check `manifest.json`. Raises `DsskError` if there is none, `DamagedData` if it was altered."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        remedy = (
            "it is unfinished, start the command that began it again"
            if Path(path).is_dir()
            else "no such folder"
        )
        raise DsskError(f"no encoded contexts in {path}: {remedy}")
    raw = file.read_bytes()
    try:
        version = json.loads(raw).get("format_version")
        if version != FORMAT_VERSION:
            raise DsskError(
                f"{file} has format version {version}, this dssk reads {FORMAT_VERSION}: encode again"
            )
        manifest = Manifest.model_validate_json(raw)
    except (ValueError, AttributeError) as error:
        raise DamagedData(f"{file} is damaged and cannot be read: {repair(path)}") from error
    if manifest.to_json().encode() != raw:
        raise DamagedData(f"{file} is damaged, its checksum is another: {repair(path)}")
    return manifest


def repair(path: str | Path) -> str:
    """What to do about damage."""
    return f"run `python -m dssk.data.verify {path} --discard`, then the preprocessing command again"


def check_model(manifest: Encoding, model_path: str | Path, revision: str | None = None) -> None:
    """Raise `DsskError` unless `model_path`, a base or a fused model, made the encodings. Loads no weights.

    See `fingerprint`. A store of texts only suits every model.
    """
    if manifest.storage_dtype is None:
        return
    if manifest.template_version != prompts.TEMPLATE_VERSION:
        raise DsskError(
            f"contexts were encoded with prompt template {manifest.template_version}, this dssk uses "
            f"{prompts.TEMPLATE_VERSION}: encode them again into another folder"
        )
    config = load_base_config(model_path, revision, fused=True)
    if config.hidden_size != manifest.hidden_size:
        difference = f"hidden size {manifest.hidden_size}, not {config.hidden_size}"
    elif tokenizer_hash(load_tokenizer(model_path, revision)) != manifest.tokenizer_hash:
        difference = "another tokenizer"
    elif not is_model(manifest.model_fingerprint, model_path, config, revision):
        difference = "other weights"
    else:
        return
    raise DsskError(
        f"contexts were encoded by {manifest.model_id} ({difference}), the model is {model_path}: train that model, "
        "or encode the contexts again with this one"
    )


def check_sizes(path: str | Path, manifest: Manifest) -> None:
    """Raise `DamagedData` if a file of the store is missing or has another size. Reads no contents."""
    for name, info in manifest.files.items():
        try:
            num_bytes = (Path(path) / name).stat().st_size
        except OSError:
            num_bytes = -1
        if num_bytes != info.num_bytes:
            found = "is missing" if num_bytes < 0 else f"has {num_bytes} bytes, not {info.num_bytes}"
            raise DamagedData(f"{Path(path) / name} {found}: {repair(path)}")


def load_rows(path: str | Path) -> DatasetDict:
    """The rows of a store: splits `train` and `val` with id, context, question, answer, answers, encoder_hidden_states.

    `encoder_hidden_states` of a row is a tensor (n_tokens, hidden_size) in the stored type: a view of the
    memory-mapped file, so it costs nothing until it is used (int8 is decoded to bfloat16). Writing to it does not
    reach the file. A store of texts only has no such column. Sizes of all files are checked; contents are not, that
    is `verify`. In the table itself the column holds the row number of the context in `contexts/`.

    `datasets` keeps what `shuffle` and `filter` make beside the files it has read: pass `keep_in_memory=True` to
    leave the store as it is.
    """
    manifest = load_manifest(path)
    check_sizes(path, manifest)
    rows = {split: datasets.load_from_disk(str(Path(path) / split)) for split in SPLITS}
    if manifest.storage_dtype is None:
        return DatasetDict({split: table.remove_columns("context_index") for split, table in rows.items()})
    fetch = FetchStates(path, manifest)
    return DatasetDict(
        {
            split: table.rename_column("context_index", "encoder_hidden_states").with_transform(fetch)
            for split, table in rows.items()
        }
    )


class FetchStates:
    """Replaces row numbers in the column `encoder_hidden_states` by the states themselves. Pickles as a path."""

    def __init__(self, path: str | Path, manifest: Manifest):
        assert manifest.storage_dtype is not None
        self.folder = Path(path).resolve() / CONTEXTS
        self.storage_dtype: StorageDtype = manifest.storage_dtype
        self.hidden_size = manifest.hidden_size
        self.first_rows = [shard.first_row for shard in manifest.shards]
        self._open: dict[int, Shard] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "encoder_hidden_states" in batch:
            batch["encoder_hidden_states"] = [self.states(row) for row in batch["encoder_hidden_states"]]
        return batch

    def states(self, row: int) -> torch.Tensor:
        """The states of context number `row`: (n_tokens, hidden_size)."""
        index = bisect.bisect_right(self.first_rows, row) - 1
        if index not in self._open:
            name = f"{shard_name(index, len(self.first_rows))}.arrow"
            self._open[index] = Shard(self.folder / name, self.storage_dtype, self.hidden_size)
        return self._open[index].states(row - self.first_rows[index])


class Shard:
    """A memory-mapped Arrow file of encodings. Mapped privately: the tensors can be written to, the file cannot.

    `table` is all that the file holds; nothing of it is read before it is used.
    """

    def __init__(self, path: Path, storage_dtype: StorageDtype, hidden_size: int):
        self._dtype = TORCH_DTYPES[storage_dtype]
        self._hidden_size = hidden_size
        num_bytes = path.stat().st_size
        # torch keeps no file open for its map, so that thousands of shards can be open at once
        self._map = torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8).numpy()
        buffer = pa.py_buffer(self._map)
        self.table = pa.ipc.open_stream(buffer).read_all()
        self._num_tokens: list[int] = self.table["n_tokens"].to_pylist()
        self._starts = _value_starts(self.table["encoder_hidden_states"], buffer.address)
        self._scale_starts = (
            _value_starts(self.table["scale"], buffer.address) if storage_dtype == "int8" else None
        )

    def states(self, row: int) -> torch.Tensor:
        """(n_tokens, hidden_size)"""
        num_tokens = self._num_tokens[row]
        states = self._view(self._dtype, num_tokens * self._hidden_size, self._starts[row])
        states = states.view(num_tokens, self._hidden_size)
        if self._scale_starts is None:
            return states
        scale = self._view(SCALE_DTYPE, num_tokens, self._scale_starts[row])
        return dequantize(states, scale)

    def _view(self, dtype: torch.dtype, count: int, start: int) -> torch.Tensor:
        # not a slice of the map: a loader's worker would send all of that
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)


def _value_starts(column: pa.ChunkedArray, base: int) -> list[int]:
    """Where the bytes of each value begin, counted from address `base`; no value is touched."""
    starts: list[int] = []
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        starts += (np.frombuffer(offsets, np.int64)[: len(chunk)] + (values.address - base)).tolist()
    return starts
