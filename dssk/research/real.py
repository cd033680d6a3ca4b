"""Real questions for the real base: what is trained on, what is watched, what is scored, and that nothing leaks.

SQuAD and NQ-Swap come in rows of one paragraph and one question. NQ-Swap holds most paragraphs several times, each
time with another answer put in: rows are held out with all that share a question or twelve words in a row with them.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from dssk.data import schemas
from dssk.data.schemas import QA
from dssk.data.sources import Source
from dssk.errors import DsskError
from dssk.utils import files
from dssk.utils.defaults import LONGEST_TRAINED

RUN_WORDS = 12  # that two paragraphs have in common if one is the other with some words changed
SHARED_QUESTIONS = 4  # of a paragraph that is worth its reading in training
HELD_OUT = 300  # rows of NQ-Swap, at least
WATCHED_CONTEXTS = 16  # of SQuAD, kept for `val`
SINGLES = {
    "squad": 600,
    "nq_swap": 1200,
}  # rows of paragraphs that have fewer, enough for an hour of training
SINGLE_SHARE = 2 / 3  # of the longest paragraph: one with fewer questions must be so short
_WORD = re.compile(r"\w+")
_TAG = re.compile(r"<[^>]*>")

SETS = ("train", "val", "xquad", "nq_swap")
FILES = {"squad": "squad_v1_*.jsonl.gz", "nq_swap": "nq_swap_*.jsonl.gz", "xquad": "xquad_en_*.jsonl.gz"}
HUB = {
    "squad": Source("rajpurkar/squad", split="train"),
    "nq_swap": Source(
        "pminervini/NQ-Swap", split="dev", columns={"context": "sub_context", "answer": "sub_answer"}
    ),
    "xquad": Source("google/xquad", config="xquad.en", split="validation"),
}


def write_real_sets(
    data: Path | None, folder: Path, longest: int = LONGEST_TRAINED, all_questions: bool = False
) -> None:
    """Run `dssk real`: write the sets from files below a folder, or from the Hub.

    Trained on are paragraphs of at most `longest` characters; of those with few questions some, or all questions.
    """
    sources = {name: [source] for name, source in HUB.items()} if data is None else in_folder(data)
    counts = write_sets(sources, folder, longest, all_questions)
    print(f"{folder}: {', '.join(f'{count} {name}' for name, count in counts.items())}")


def in_folder(data: Path) -> dict[str, list[Source]]:
    """The files of each source, wherever below a folder they lie. Raises `DsskError` for one that is missing."""
    found = {name: sorted(data.rglob(pattern)) for name, pattern in FILES.items()}
    if missing := [FILES[name] for name, paths in found.items() if not paths]:
        raise DsskError(
            f"no {missing[0]} below {data}: want the files of SQuAD, NQ-Swap and XQuAD there, or leave the folder out "
            "and take them from the Hub"
        )
    return {name: [Source(str(path)) for path in paths] for name, paths in found.items()}


def write_sets(
    sources: dict[str, list[Source]], folder: Path, longest: int, all_questions: bool = False
) -> dict[str, int]:
    """Write the four sets as `<set>.jsonl` and return how many rows each has; files that are right already stay."""
    found = {name: [row for source in several for row in read(source)] for name, several in sources.items()}
    sets = divide(found["squad"], found["nq_swap"], found["xquad"], longest, all_questions)
    check(sets)
    files.make_folder(folder)
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        text = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)
    return {name: len(rows) for name, rows in sets.items()}


def read(source: Source) -> list[QA]:
    """All usable rows of a source, whatever its splits."""
    rows = []
    for split in source.open().values():
        for raw in split:
            try:
                rows.append(schemas.to_qa(raw))
            except schemas.Dropped:
                continue
            except schemas.BadRow as error:
                raise DsskError(f"{raw.place}: {error}: mend or remove that row") from error
    return rows


def divide(
    squad: Sequence[QA],
    nq_swap: Sequence[QA],
    xquad: Sequence[QA],
    longest: int,
    all_questions: bool = False,
) -> dict[str, list[QA]]:
    """The rows of each set; which ones are chosen depends on their texts alone.

    What would tell anything of a scored row is left out of the rows that are trained on, whose paragraphs have at most
    `longest` characters.
    """
    held_out, rest = hold_out(nq_swap, HELD_OUT)
    scored = Scored([*xquad, *held_out])
    squad = [row for row in squad if not scored.leaked_by(row)]
    by_context: dict[str, list[QA]] = defaultdict(list)
    for row in squad:
        by_context[row.context].append(row)
    shared = [
        rows
        for context, rows in by_context.items()
        if len(rows) >= SHARED_QUESTIONS and len(context) <= longest
    ]
    single = [row for rows in by_context.values() if len(rows) < SHARED_QUESTIONS for row in rows]
    watched = set(_drawn({rows[0].context for rows in shared}, str)[:WATCHED_CONTEXTS])
    return {
        "train": [
            *(row for rows in shared if rows[0].context not in watched for row in rows),
            *_singles(single, None if all_questions else SINGLES["squad"], longest),
            *_singles(rest, None if all_questions else SINGLES["nq_swap"], longest),
        ],
        "val": [row for rows in shared if rows[0].context in watched for row in rows],
        "xquad": list(xquad),
        "nq_swap": held_out,
    }


def hold_out(rows: Sequence[QA], count: int) -> tuple[list[QA], list[QA]]:
    """Families of rows with at least `count` rows together, and all other rows."""
    family = families(rows)
    by_family: dict[int, list[QA]] = defaultdict(list)
    for row, number in zip(rows, family, strict=True):
        by_family[number].append(row)
    chosen: set[int] = set()
    size = 0
    for number in _drawn(by_family, lambda number: by_family[number][0].question):
        if size >= count:
            break
        chosen.add(number)
        size += len(by_family[number])
    pairs = list(zip(rows, family, strict=True))
    return [row for row, n in pairs if n in chosen], [row for row, n in pairs if n not in chosen]


def families(rows: Sequence[QA]) -> list[int]:
    """For each row the number of the rows that it belongs to: they share a question or a run of words."""
    first: dict[str, int] = {}
    parent = list(range(len(rows)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for number, row in enumerate(rows):
        for key in [f"? {_key(row)}", *runs(row.context)]:
            parent[root(number)] = root(first.setdefault(key, number))
    return [root(number) for number in range(len(rows))]


def runs(text: str) -> set[str]:
    """Every run of `RUN_WORDS` words of a text."""
    words = _words(text)
    return {" ".join(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


class Scored:
    """Rows that are scored, and whether another row would leak something about one of them."""

    def __init__(self, rows: Iterable[QA]):
        rows = list(rows)
        self.questions = {_key(row) for row in rows}
        self.runs = {run for text in {row.context for row in rows} for run in runs(text)}

    def leaked_by(self, row: QA) -> bool:
        """Whether a row has the question of a scored one, or more than a tenth of its runs of words."""
        found = runs(row.context)
        return _key(row) in self.questions or 10 * len(found & self.runs) > len(found)


def check(sets: dict[str, list[QA]]) -> None:
    """Raise `DsskError` if a training row leaks something about a scored one, or has the paragraph of one."""
    scored = Scored([*sets["xquad"], *sets["nq_swap"]])
    unseen = {row.context for name in SETS[1:] for row in sets[name]}
    for row in sets["train"]:
        if row.context in unseen or scored.leaked_by(row):
            raise DsskError(f"the row {row.id} is trained on and its paragraph scored: {row.question[:80]!r}")


def _singles(rows: Iterable[QA], count: int | None, longest: int) -> list[QA]:
    short = [row for row in rows if len(row.context) <= SINGLE_SHARE * longest]
    return _drawn(short, lambda row: row.id + row.question)[:count]


def _drawn(values: Iterable[Any], text: Callable[[Any], str]) -> list[Any]:
    """The values in an order that looks random and depends on their texts alone."""
    return sorted(values, key=lambda value: xxhash.xxh3_64_hexdigest(text(value).encode()))


def _key(row: QA) -> str:
    return " ".join(_words(row.question))


def _words(text: str) -> list[str]:
    return _WORD.findall(_TAG.sub(" ", text).lower())


def _plain(row: QA) -> dict[str, Any]:
    return {
        "id": row.id,
        "title": row.document,
        "context": row.context,
        "question": row.question,
        "answers": {"text": row.answers, "answer_start": [-1] * len(row.answers)},
    }
