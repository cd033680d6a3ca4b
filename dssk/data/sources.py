"""Which rows: a file, a folder, a data set on the Hub, or rows made on the spot; and their splits."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import xxhash
from datasets import load_dataset_builder
from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError

from dssk.data.readers import ENDINGS, RawRow, is_data, read_rows
from dssk.data.schemas import FIELDS, rename
from dssk.errors import DsskError, EnvironmentFault, short
from dssk.inference.fingerprint import file_fingerprint

_NOT_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLIT_WORDS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}
COMMITS = ("dataset_commit", "val_dataset_commit")

Maker = Callable[[int | None, int], Mapping[str, Iterable[dict]]]
"""(most rows of a split, seed) -> rows of `train` and `val`, made on the spot."""


@dataclass(frozen=True)
class Source:
    """Which rows to read."""

    dataset: str
    """A data set on the Hub, a file, a folder, or a name among `makers`."""
    revision: str | None = None
    """Of a data set on the Hub."""
    config: str | None = None
    """Of a data set on the Hub that has several."""
    split: str | None = None
    """Read only this split of `dataset`."""
    val_dataset: str | None = None
    """Where the val rows come from, if not from `dataset`."""
    val_fraction: float = 0.05
    """Share of rows for val if no split of that name is found."""
    max_examples: int | None = None
    """Most usable rows of each split."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Ours -> theirs, for flat rows whose fields have other names."""
    seed: int = 0
    """Of rows that are made on the spot."""
    makers: Mapping[str, Maker] = field(default_factory=dict)
    """Data sets that are made on the spot, by name."""

    def __post_init__(self) -> None:
        if unknown := set(self.columns) - set(FIELDS):
            raise DsskError(
                f"no field {short(min(unknown), 50)} to name a column for, want {', '.join(FIELDS)}"
            )

    def describe(self) -> dict[str, str | int | float | None]:
        """The settings that decide the rows, for comparing two runs. Makes no request to the Hub."""
        described = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "makers"}
        if self.dataset not in self.makers:
            del described["seed"]
        del described["columns"]
        if self.config is None:
            del described["config"]
        if self.columns:
            described["columns"] = ",".join(
                f"{ours}={theirs}" for ours, theirs in sorted(self.columns.items())
            )
        for name in ("dataset", "val_dataset"):
            value = described[name]
            if value and os.path.exists(value):
                described[f"{name}_contents"] = _fingerprint(find_files(value, None))
        return described

    def open(self) -> dict[str, Iterator[RawRow]]:
        """Rows by split: `train` and `val`, or `all` if they are not divided yet."""
        if maker := self.makers.get(self.dataset):
            made = maker(self.max_examples, self.seed)
            return {split: _numbered(f"{self.dataset} {split}", rows) for split, rows in made.items()}
        opened = {split: read_rows(paths) for split, paths in self._files().items()}
        if self.columns:
            opened = {
                split: map(partial(rename, columns=self.columns), rows) for split, rows in opened.items()
            }
        return opened

    def commits(self) -> dict[str, str]:
        """The commits on the Hub that the rows come from."""
        pairs = zip(COMMITS, (self.dataset, self.val_dataset), strict=True)
        return {
            key: _commit(name, self.revision, self.config if key == COMMITS[0] else None)
            for key, name in pairs
            if name and name not in self.makers and _is_on_hub(name)
        }

    def _files(self) -> dict[str, list[str]]:
        found = find_files(self.dataset, self.revision, self.config)
        if self.split is not None:
            wanted = _SPLIT_WORDS.get(self.split, self.split)
            if wanted not in found:
                raise DsskError(f"{self.dataset} has no split {self.split}, only {', '.join(sorted(found))}")
            found = {"all": found[wanted]}
        train = found.get("train") or found.get("all")
        if not train:
            raise DsskError(
                f"{self.dataset} has no split train, only {', '.join(sorted(found))}: name it with --split"
            )
        val = found.get("val")
        if self.val_dataset:
            others = find_files(self.val_dataset, self.revision)
            val = others.get("val") or others.get("all") or others.get("train")
        return {"train": train, "val": val} if val else {"all": train}


def _numbered(name: str, rows: Iterable[dict]) -> Iterator[RawRow]:
    return (RawRow(f"{name}:{number}", row) for number, row in enumerate(rows, start=1))


def find_files(name: str, revision: str | None, config: str | None = None) -> dict[str, list[str]]:
    """The files of a data set by split: `train`, `val`, others by their own names, `all` if there are no splits."""
    if os.path.isfile(name):
        return {"all": [name]}
    if os.path.isdir(name):
        return _folder_files(Path(name))
    if not _is_on_hub(name):
        raise DsskError(f"no such file or folder: {short(name, 200)}")
    return _hub_files(name, revision, config)


def _is_on_hub(name: str) -> bool:
    """Whether a name that may be a path is a data set on the Hub: `name` or `owner/name`."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or is_data(name)
    return not looks_like_path and not os.path.exists(name)


def _folder_files(folder: Path) -> dict[str, list[str]]:
    """The files below a folder; one called (or below one called) train, validation, val or dev says its split."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or not is_data(path.name) or path.name in _NOT_DATA:
            continue
        split = "all"
        for part in path.relative_to(folder).parts:
            words = re.split(r"[^a-z]+", part.lower())
            split = next((word for word in words if word in _SPLIT_WORDS or word == "test"), split)
        found.setdefault(_SPLIT_WORDS.get(split, split), []).append(str(path))
    if not found:
        raise DsskError(
            f"no data in {folder}: want files ending in {', '.join(ENDINGS)}, or these with .gz or .zst"
        )
    return found


def _fingerprint(found: dict[str, list[str]]) -> str:
    """A fingerprint of the contents of these files."""
    digest = xxhash.xxh3_128()
    for path in (path for paths in found.values() for path in paths):
        try:
            digest.update(file_fingerprint(Path(path)).encode())
        except OSError as error:
            raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _hub_files(name: str, revision: str | None, config: str | None = None) -> dict[str, list[str]]:
    """The files of a data set on the Hub, as `hf://` addresses that name the commit. Nothing is downloaded yet."""
    try:
        builder = load_dataset_builder(name, config, revision=revision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = short(str(error).splitlines()[0], 200)
        hint = "" if get_token() else "; a gated or private one needs `hf auth login` first"
        raise EnvironmentFault(
            f"cannot open the data set {name} on the Hub: {reason}: check its name and the network{hint}; a local "
            "copy is given as a path"
        ) from error
    found = builder.config.data_files or {}
    return {
        _SPLIT_WORDS.get(str(split), str(split)): [str(url) for url in urls] for split, urls in found.items()
    }


def _commit(name: str, revision: str | None, config: str | None) -> str:
    """The commit in the addresses of a data set's files, as in `hf://datasets/owner/name@commit/file`."""
    url = next(url for urls in _hub_files(name, revision, config).values() for url in urls)
    return url.partition("@")[2].partition("/")[0]
