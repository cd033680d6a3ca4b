"""Raw data sets -> question rows. Every schema ends in `QA`; the one answer rule is `_answers`.

Known schemas: Natural Questions as on the Hub (nested), as released by Google (JSON lines) and simplified by
Google (JSON lines), SQuAD (nested and flat), and plain `context, question, answer`.
"""

import dataclasses
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import load_dataset_builder
from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError

from dssk import prompts
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.inference.fingerprint import file_fingerprint

NATURAL_QUESTIONS = "google-research-datasets/natural_questions"
TOY = "toy"
_TOY_TRAIN, _TOY_VAL = 6000, 500

# A whole Wikipedia page as HTML and as tokens is a few MB; anything far above is no row of these data sets.
_MAX_LINE_BYTES = 256 << 20
_NQ_COLUMNS = [
    "id",
    "document.title",
    "document.tokens.token",
    "document.tokens.is_html",
    "question.text",
    "annotations",
]
_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".arrow")
_NOT_DATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_SPLIT_WORDS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}


class QA(NamedTuple):
    """A question about a context."""

    id: str
    document: str
    """What the context is a part of; the unit that a split never divides. Empty if the source does not say."""
    context: str
    question: str
    answers: list[str]
    """All acceptable answers; the first is the one to learn."""


class BadRow(Exception):
    """A row that is not what its schema promises."""


class Dropped(Exception):
    """A sound row that has no use here; the text is the reason."""


class RawRow(NamedTuple):
    """A row as it was read, or why it could not be."""

    place: str
    """Where to find it: `file:line`, or `file:row` for tables."""
    value: Any


# --- which rows ------------------------------------------------------------------------------------------------

COMMITS = ("dataset_commit", "val_dataset_commit")


@dataclass(frozen=True)
class Source:
    """Which rows to read."""

    dataset: str
    """A data set on the Hub, a file, a folder, or `toy`."""
    revision: str | None = None
    """Of a data set on the Hub."""
    split: str | None = None
    """Read only this split of `dataset`."""
    val_dataset: str | None = None
    """Where the val rows come from, if not from `dataset`."""
    val_fraction: float = 0.05
    """Share of rows for val if no split of that name is found."""
    max_examples: int | None = None
    """Most usable rows of each split."""
    seed: int = 0
    """Of the toy data set."""

    def describe(self) -> dict[str, str | int | float | None]:
        """What decides the rows, for comparing two runs. Asks nothing of the Hub."""
        described = dataclasses.asdict(self)
        if self.dataset != TOY:
            del described["seed"]
        for name in ("dataset", "val_dataset"):
            value = described[name]
            if value and Path(value).exists():
                described[f"{name}_contents"] = _fingerprint(find_files(value, None))
        return described

    def open(self) -> dict[str, Iterator[RawRow]]:
        """Rows by split: `train` and `val`, or `all` if they are not divided yet."""
        if self.dataset == TOY:
            return {split: _toy_rows(split, self.max_examples, self.seed) for split in ("train", "val")}
        return {split: read_rows(paths) for split, paths in self._files().items()}

    def commits(self) -> dict[str, str]:
        """The commits on the Hub that the rows come from."""
        pairs = zip(COMMITS, (self.dataset, self.val_dataset), strict=True)
        return {key: _commit(name, self.revision) for key, name in pairs if name and _is_on_hub(name)}

    def _files(self) -> dict[str, list[str]]:
        found = find_files(self.dataset, self.revision)
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


def find_files(name: str, revision: str | None) -> dict[str, list[str]]:
    """The files of a data set by split: `train`, `val`, others by their own names, `all` if there are no splits."""
    path = Path(name)
    if path.is_file():
        return {"all": [str(path)]}
    if path.is_dir():
        return _folder_files(path)
    if not _is_on_hub(name):
        raise DsskError(f"no such file or folder: {name}")
    return _hub_files(name, revision)


def _is_on_hub(name: str) -> bool:
    """Whether a name that may be a path is a data set on the Hub: `name` or `owner/name`."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_SUFFIXES)
    return name != TOY and not looks_like_path and not Path(name).exists()


def _folder_files(folder: Path) -> dict[str, list[str]]:
    """The files below a folder; one called (or below one called) train, validation, val or dev says its split."""
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or not path.name.endswith(_SUFFIXES) or path.name in _NOT_DATA:
            continue
        split = "all"
        for part in path.relative_to(folder).parts:
            words = re.split(r"[^a-z]+", part.lower())
            split = next((word for word in words if word in _SPLIT_WORDS or word == "test"), split)
        files.setdefault(_SPLIT_WORDS.get(split, split), []).append(str(path))
    if not files:
        raise DsskError(f"no data in {folder}: want files ending in {', '.join(_SUFFIXES)}")
    return files


def _fingerprint(found: dict[str, list[str]]) -> str:
    """What tells the contents of these files from others."""
    digest = xxhash.xxh3_128()
    for paths in found.values():
        for path in paths:
            digest.update(file_fingerprint(Path(path)).encode())
    return digest.hexdigest()


def _hub_files(name: str, revision: str | None) -> dict[str, list[str]]:
    """The files of a data set on the Hub, as `hf://` addresses that name the commit. Nothing is downloaded yet."""
    try:
        builder = load_dataset_builder(name, revision=revision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        hint = "" if get_token() else "; a gated or private one needs `hf auth login` first"
        raise EnvironmentFault(
            f"cannot open the data set {name} on the Hub: {reason}: check its name and the network{hint}; a local "
            "copy is given as a path"
        ) from error
    found = builder.config.data_files or {}
    return {
        _SPLIT_WORDS.get(str(split), str(split)): [str(url) for url in urls] for split, urls in found.items()
    }


def _commit(name: str, revision: str | None) -> str:
    """The commit in the addresses of a data set's files, as in `hf://datasets/owner/name@commit/file`."""
    url = next(url for urls in _hub_files(name, revision).values() for url in urls)
    return url.partition("@")[2].partition("/")[0]


# --- rows as they are ----------------------------------------------------------------------------------------


def read_rows(files: Iterable[str]) -> Iterator[RawRow]:
    """All rows of some files, in order."""
    for file in files:
        yield from _read_file(file)


def _read_file(url: str) -> Iterator[RawRow]:
    name = url.rsplit("/", 1)[-1]
    try:
        with _open(url) as file:
            if name.endswith(".parquet"):
                yield from _parquet_rows(file, name)
            elif name.endswith(".arrow"):
                yield from _arrow_rows(file, name)
            else:
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if name.endswith(".gz") else file
                is_whole = name.removesuffix(".gz").endswith(".json")
                yield from _json_rows(stream, name) if is_whole else _json_line_rows(stream, name)
    except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowInvalid) as error:
        raise DamagedData(f"{url} is damaged: {str(error).splitlines()[0]}: fetch it again") from error
    except OSError as error:
        raise EnvironmentFault(f"cannot read {url}: {error}") from error


def _open(url: str) -> BinaryIO:
    # A path is opened as it is: `*` and `[1]` in it are ordinary characters.
    return fsspec.open(url, "rb").open() if url.startswith("hf://") else open(url, "rb")  # noqa: SIM115


def _json_line_rows(file: BinaryIO, name: str) -> Iterator[RawRow]:
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), start=1):
        if line.strip():
            yield RawRow(f"{name}:{number}", _parse_json(line))


def _json_rows(file: BinaryIO, name: str) -> Iterator[RawRow]:
    """A `.json` file: a list of rows, SQuAD's `{"data": [...]}`, or JSON lines under a wrong name."""
    content = file.read()
    value = _parse_json(content)
    if isinstance(value, BadRow):
        yield from _json_line_rows(io.BytesIO(content), name)
        return
    rows = value.get("data", [value]) if isinstance(value, dict) else value
    for number, row in enumerate(rows, start=1):
        for flat in _squad_questions(row) if isinstance(row, dict) and "paragraphs" in row else [row]:
            yield RawRow(f"{name}:{number}", flat)


def _squad_questions(article: dict) -> Iterator[Any]:
    """A SQuAD article as flat rows."""
    try:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield {
                    "id": qa.get("id"),
                    "title": article.get("title"),
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": qa.get("answers", []),
                }
    except (KeyError, TypeError, AttributeError) as error:
        yield BadRow(f"not a SQuAD article: {error!r}")


def _parse_json(content: bytes) -> Any:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {error.start}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON: {error}")


def _parquet_rows(file: BinaryIO, name: str) -> Iterator[RawRow]:
    table = pq.ParquetFile(file)
    # The HTML of Natural Questions is most of its bytes and is not needed: it is never fetched.
    columns = _NQ_COLUMNS if "document" in table.schema_arrow.names else None
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield RawRow(f"{name}:{number}", row)


def _arrow_rows(file: BinaryIO, name: str) -> Iterator[RawRow]:
    number = 0
    for batch in pa.ipc.open_stream(file):
        for row in batch.to_pylist():
            number += 1
            yield RawRow(f"{name}:{number}", row)


def _toy_rows(split: str, max_examples: int | None, seed: int) -> Iterator[RawRow]:
    """The embedded toy data set, in the Hub's layout of Natural Questions."""
    from dssk.research import toy

    num_examples = max_examples or _TOY_TRAIN if split == "train" else min(max_examples or _TOY_VAL, _TOY_VAL)
    for number, row in enumerate(toy.generate(split, num_examples, seed), start=1):
        yield RawRow(f"toy {split}:{number}", row)


# --- rows as questions -----------------------------------------------------------------------------------------


def to_qa(row: RawRow) -> QA:
    """Read one raw row of any known schema. Raises `BadRow` or `Dropped`."""
    value = row.value
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(f"a row is a JSON object, got {type(value).__name__}")
    try:
        if "annotations" in value:
            qa = _nq_question(value)
        elif "context" in value:
            qa = _flat_question(value, row.place)
        else:
            raise BadRow(f"no known schema has just the keys {', '.join(sorted(map(str, value)))}")
    except KeyError as error:
        raise BadRow(f"no {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadRow(f"wrong type or value: {error}") from error
    return _checked(qa)


def _checked(qa: QA) -> QA:
    """Refuse what no text table can hold, drop what is empty."""
    for name, text in (
        *zip(("id", "title", "context", "question"), qa[:4], strict=True),
        *(("answer", a) for a in qa.answers),
    ):
        if not isinstance(text, str):
            raise BadRow(f"{name} is {type(text).__name__}, want text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} has half a surrogate pair at character {error.start}") from error
    if not qa.context.strip():
        raise Dropped("empty context")
    if not qa.question.strip():
        raise Dropped("empty question")
    if not all(answer.strip() for answer in qa.answers):
        raise Dropped("empty answer")
    return qa


def _flat_question(row: dict, place: str) -> QA:
    """SQuAD's flat row (`answers.text`, none = not answerable) or a plain one (`answer`: a text or some)."""
    if "answers" in row:
        found = row["answers"]
        answers = (
            found["text"]
            if isinstance(found, dict)
            else [a["text"] if isinstance(a, dict) else a for a in found]
        )
        answers = list(answers) or [prompts.NOT_IN_CONTEXT]
    else:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        if not answers:
            raise Dropped("empty answer")
    row_id = row.get("id")
    return QA(
        id=place if row_id is None else str(row_id),
        document=row.get("title") or "",
        context=row["context"],
        question=row["question"],
        answers=list(dict.fromkeys(answers)),
    )


class _Span(NamedTuple):
    start: int
    end: int


class _Annotation(NamedTuple):
    """What one annotator of Natural Questions marked."""

    long_answer: _Span
    short_answers: list[_Span]
    yes_no: str | None


_YES_NO = {1: prompts.YES, "YES": prompts.YES, 0: prompts.NO, "NO": prompts.NO, -1: None, "NONE": None}


def _nq_question(row: dict) -> QA:
    """A row of Natural Questions in any of its three layouts."""
    if "document_tokens" in row:
        tokens = [token["token"] for token in row["document_tokens"]]
        is_html = [token["html_token"] for token in row["document_tokens"]]
    elif "document_text" in row:
        tokens = row["document_text"].split(" ")
        is_html = [_HTML_TOKEN.fullmatch(token) is not None for token in tokens]
    else:
        tokens, is_html = row["document"]["tokens"]["token"], row["document"]["tokens"]["is_html"]
    nested = "document" in row
    document = (
        row["document"].get("title") if nested else row.get("document_title") or row.get("document_url")
    )
    annotations = [_annotation(entry, len(tokens)) for entry in _records(row["annotations"])]
    chosen = next((a.long_answer for a in annotations if a.long_answer.start >= 0), None)
    if chosen is None:
        raise Dropped("no long answer")
    return QA(
        id=str(row["id"] if nested else row["example_id"]),
        document=document or "",
        context=plain_text(tokens[slice(*chosen)], is_html[slice(*chosen)]),
        question=row["question"]["text"] if nested else row["question_text"],
        answers=_answers([a for a in annotations if a.long_answer == chosen], tokens, is_html),
    )


def _annotation(entry: dict, num_tokens: int) -> _Annotation:
    long_answer = _span(entry["long_answer"], num_tokens)
    shorts = [_span(short, num_tokens) for short in _records(entry["short_answers"])]
    return _Annotation(long_answer, shorts, _YES_NO[entry["yes_no_answer"]])


def _span(entry: dict, num_tokens: int) -> _Span:
    span = _Span(entry["start_token"], entry["end_token"])
    if span.start >= 0 and not span.start < span.end <= num_tokens:
        raise ValueError(f"answer {span.start}..{span.end} in a document of {num_tokens} tokens")
    return span


def _records(value: Any) -> list[dict]:
    """A list of dicts; Hugging Face features turn one into a dict of lists."""
    if isinstance(value, dict):
        return [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=False)]
    return value


def _answers(annotations: list[_Annotation], tokens: list[str], is_html: list[bool]) -> list[str]:
    """The answer rule, over the annotators of one long answer: short answers, else yes or no, else not answered."""
    spans = [span for a in annotations for span in a.short_answers if span.start >= 0]
    texts = [
        " ".join(t for t, html in zip(tokens[slice(*s)], is_html[slice(*s)], strict=True) if not html)
        for s in spans
    ]
    texts += [a.yes_no for a in annotations if a.yes_no]
    return list(dict.fromkeys(text for text in texts if text)) or [prompts.NOT_IN_CONTEXT]


# --- text of Natural Questions ---------------------------------------------------------------------------------

_HTML_TOKEN = re.compile(r"<(/?)([A-Z][A-Za-z0-9]*)(_[^>]*)?>")  # <P>, </Table>, <Td_colspan="2">
_CELLS = ("Td", "Th")
_ITEMS = ("Li",)
_LINES = ("P", "Tr", "Dd", "Dt", "Caption", "Ul", "Ol", "Dl", "Table", "H1", "H2", "H3", "H4", "H5", "H6")


def plain_text(tokens: list[str], is_html: list[bool]) -> str:
    """The words, joined by spaces. Markup is left out, but rows, items and paragraphs keep lines of their own.

    Cells of a table row are divided by `|`, items of a list begin with `-`.
    """
    lines: list[list[str]] = [[]]
    cells = 0  # of the open table row; 0 outside
    for token, html in zip(tokens, is_html, strict=True):
        if not html:
            lines[-1].append(token)
            continue
        match = _HTML_TOKEN.match(token.replace(" ", "_"))
        closing, tag = match.group(1, 2) if match else ("", "")
        if tag in _CELLS and not closing:
            if cells:
                lines[-1].append("|")
            cells += 1
        elif tag == "Tr" or (not cells and tag in _LINES):
            lines.append([])
            cells = 0
        elif not cells and tag in _ITEMS:
            lines.append([] if closing else ["-"])
    texts = [" ".join(line).rstrip(" |") for line in lines]
    return "\n".join(text for text in texts if text not in ("", "-"))
