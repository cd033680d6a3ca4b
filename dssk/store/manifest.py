"""The manifest of a store, `manifest.json`. It is written last: a folder without it is unfinished.

    manifest.json       the model that encoded, and every other file with its size and checksum
    contexts/           segments: each context once, with its encoder states
    search-*/           an index of their words: of a library
    train/, val/        questions about the contexts: of a data set

A library is a store that grows and is searched; the store of a data set is one with questions.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json, to_json

from dssk.errors import DsskError
from dssk.inference.rounding import StorageDtype

MANIFEST = "manifest.json"
CONTEXTS = "contexts"
SPLITS = ("train", "val")
FORMAT_VERSION = 2
HISTOGRAM_BIN_TOKENS = 16
LAST_LAYER = "last"

Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """Base of what is stored as JSON: immutable, without unknown keys or wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Checked(Strict):
    """The content of a JSON file with its own checksum: any changed byte is detected."""

    checksum: str = Field(default="", description="xxh3_128 of this file without this entry")

    def to_json(self) -> str:
        """The exact text of the file."""
        body = self.model_copy(update={"checksum": ""}).model_dump_json()
        checksum = xxhash.xxh3_128_hexdigest(body.encode())
        return self.model_copy(update={"checksum": checksum}).model_dump_json(indent=1) + "\n"

    @classmethod
    def from_file(cls, raw: bytes) -> Self:
        """Raises `ValueError` for anything but what `to_json` made."""
        checked_json(raw)
        return cls.model_validate_json(raw)


def checked_json(raw: bytes) -> dict[str, Any]:
    """Parse the output of `Checked.to_json`, whatever its fields. Raises `ValueError` if a byte was changed."""
    body = from_json(raw)
    if not isinstance(body, dict):
        raise ValueError("no JSON object")
    checksum = xxhash.xxh3_128_hexdigest(to_json({**body, "checksum": ""}))
    if body.get("checksum") != checksum or to_json(body, indent=1) + b"\n" != raw:
        raise ValueError("its checksum is another")
    return body


class FileInfo(Strict):
    """A file as it was written."""

    num_bytes: Count
    xxh3_128: Hash


class Segment(FileInfo):
    """One file of contexts."""

    name: str = Field(description="path relative to the store")
    rows: Positive


class Encoding(Strict):
    """The model that made encodings, its settings, and the form in which they are stored."""

    model_id: str = Field(description="as it was given: a path or a name on the Hub")
    model_revision: str | None = Field(description="commit on the Hub; None for a folder")
    model_fingerprint: str = Field(description="see `dssk.inference.fingerprint`")
    tokenizer_hash: str
    hidden_size: Annotated[int, Field(ge=1, le=1 << 20)]
    model_dtype: str = Field(description="type that the model computed in, such as bfloat16")
    storage_dtype: StorageDtype | None = Field(description="None: texts only")
    template_version: Positive = Field(description="of the prompts as they are tokenized")
    maximum_input_length: Positive = Field(description="tokens that a context is cut to")
    encode_layer: str = Field(
        default=LAST_LAYER,
        description="whose input the states are, or last: after the final norm; two stand behind one another, 10+18",
    )


class Settings(Encoding):
    """All settings that decide the content of a data set's store: equal ones give equal rows and encodings."""

    shard_rows: Positive = Field(description="contexts in a segment")
    source: dict[str, str | int | float | None] = Field(
        description="data set, its files' fingerprint, how it was split"
    )

    @property
    def encoding_key(self) -> list:
        """The settings that decide the bytes of an encoded context."""
        return [
            self.model_fingerprint,
            self.model_dtype,
            self.storage_dtype,
            self.template_version,
            self.encode_layer,
        ]


class ShardInfo(Checked):
    """The record of a finished segment of a data set's store, beside it as JSON: for resuming preprocessing."""

    key: str = Field(
        description="xxh3_128 of the tokens that were encoded and of the settings that decide the bytes"
    )
    first_row: Count
    rows: Positive
    tokens: Count
    num_bytes: Count
    xxh3_128: Hash
    batch_size: Positive
    batch_tokens: Positive
    out_of_memory_splits: Count = Field(
        description="batches cut in two for lack of memory; bytes depend on it"
    )


class Counts(Strict):
    """Counts of the rows that were read, dropped and kept."""

    read: Count
    dropped: dict[str, Count] = Field(description="reason -> rows")
    bad_rows: list[str] = Field(description="place and fault of the rows skipped with --skip_bad_rows")
    rows: dict[str, Count] = Field(description="split -> question rows kept")
    contexts: Count
    truncated: Count = Field(description="contexts longer than maximum_input_length")
    lost_tokens: Count = Field(default=0, description="of those, beyond maximum_input_length")
    tokens: Count = Field(description="of all contexts, after truncation")
    length_histogram: list[Count] = Field(description="contexts by n_tokens, in bins of HISTOGRAM_BIN_TOKENS")


class DataSet(Strict):
    """The part of a manifest that only a store with questions has."""

    shard_rows: Positive
    source: dict[str, str | int | float | None]
    counts: Counts


class Manifest(Encoding, Checked):
    """All there is to know about a finished store."""

    format_version: Literal[2] = FORMAT_VERSION  # type: ignore[assignment]
    segments: list[Segment] = Field(description="files of contexts, in the order of their rows")
    files: dict[str, FileInfo] = Field(description="every other file of the store, by path relative to it")
    data_set: DataSet | None = Field(default=None, description="None: a library")

    @property
    def all_files(self) -> dict[str, FileInfo]:
        return {**{segment.name: segment for segment in self.segments}, **self.files}

    @property
    def is_library(self) -> bool:
        return self.data_set is None

    @property
    def counts(self) -> Counts:
        return self.require_questions().counts

    @property
    def source(self) -> dict[str, str | int | float | None]:
        return self.require_questions().source

    @property
    def settings(self) -> Settings:
        data_set = self.require_questions()
        encoding = {name: getattr(self, name) for name in Encoding.model_fields}
        return Settings(**encoding, shard_rows=data_set.shard_rows, source=data_set.source)

    def require_questions(self) -> DataSet:
        """Raises `DsskError` for a library."""
        if self.data_set is None:
            raise DsskError("got a library, which has no questions: want a folder that dssk preproc made")
        return self.data_set


def shard_name(index: int, num_shards: int) -> str:
    return f"data-{index:05d}-of-{num_shards:05d}"


def load_shard_info(path: Path) -> ShardInfo | None:
    """The manifest of one shard; None if there is none that can be read."""
    try:
        return ShardInfo.from_file(path.read_bytes())
    except (OSError, ValueError):
        return None
