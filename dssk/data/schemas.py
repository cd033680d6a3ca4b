"""One raw row of any known schema -> a question about a context. The one answer rule is here.

Known schemas: Natural Questions as on the Hub (nested), as released by Google (JSON lines) and simplified by
Google (JSON lines), SQuAD's flat row, and plain `context, question, answer`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dssk import prompts
from dssk.data.readers import BadRow, RawRow
from dssk.errors import short

FIELDS = ("id", "title", "context", "question", "answer")  # that a flat row can have


class QA(NamedTuple):
    """A question about a context."""

    id: str
    document: str
    """What the context is a part of; the unit that a split never divides. Empty if the source does not say."""
    context: str
    question: str
    answers: list[str]
    """All acceptable answers; the first is the one to learn."""
    start: int = 0
    """Where in the context the part begins that answers the question, in characters."""
    end: int | None = None
    """One after its last character; None: all of it may."""


class Dropped(Exception):
    """A sound row that has no use here; the text is the reason."""


class UnknownFields(BadRow):
    """A row of no known schema."""


def to_qa(row: RawRow, whole_pages: bool = False) -> QA:
    """Read one raw row of any known schema. Raises `BadRow` or `Dropped`.

    With `whole_pages` the context of a row of Natural Questions is its page, in which the long answer stands.
    """
    value = row.value
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(f"a row is a JSON object, got {type(value).__name__}")
    try:
        if "annotations" in value:
            qa = _nq_question(value, whole_pages)
        elif "context" in value:
            qa = _flat_question(value, row.place)
        else:
            raise UnknownFields(f"no known schema has just the fields {short(', '.join(sorted(value)), 100)}")
    except KeyError as error:
        raise BadRow(f"no {short(error.args[0], 100)}") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadRow(f"wrong type or value: {short(error, 100)}") from error
    return _checked(qa)


def rename(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    """A flat row whose fields have other names: `columns` maps ours to theirs, `a.b` is `b` inside of `a`."""
    if not isinstance(row.value, dict):
        return row
    flat = {name: row.value[name] for name in FIELDS if name in row.value}
    if "answer" not in columns and "answers" in row.value:
        flat["answers"] = row.value["answers"]
    for field, name in columns.items():
        found: Any = row.value
        for part in [name] if name in row.value else name.split("."):
            if not isinstance(found, dict) or part not in found:
                fields = short(", ".join(sorted(row.value)), 100)
                return row._replace(
                    value=BadRow(f"no {short(name, 50)} for {field} among the fields {fields}")
                )
            found = found[part]
        flat[field] = found
    return row._replace(value=flat)


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
    """SQuAD's flat row (`answers`, none = not answerable) or a plain one (`answer`)."""
    if "answers" in row:
        answers = _answer_texts(row["answers"]) or [prompts.NOT_IN_CONTEXT]
    else:
        answers = _answer_texts(row["answer"])
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


def _answer_texts(value: Any) -> list[Any]:
    """One text, yes or no, `{"text": ...}` with one text or some, or a list of such."""
    if isinstance(value, dict):
        value = value["text"]
    entries = value if isinstance(value, list) else [value]
    texts = [entry["text"] if isinstance(entry, dict) else entry for entry in entries]
    return [(prompts.YES if text else prompts.NO) if isinstance(text, bool) else text for text in texts]


class _Span(NamedTuple):
    start: int
    end: int


class _Annotation(NamedTuple):
    """The annotation of one annotator of Natural Questions."""

    long_answer: _Span
    short_answers: list[_Span]
    yes_no: str | None


_YES_NO = {1: prompts.YES, "YES": prompts.YES, 0: prompts.NO, "NO": prompts.NO, -1: None, "NONE": None}


def _nq_question(row: dict, whole_page: bool) -> QA:
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
    parts = [slice(*chosen)]
    if whole_page:
        parts = [slice(chosen.start), *parts, slice(chosen.end, None)]
    texts = [plain_text(tokens[part], is_html[part]) for part in parts]
    start = len(texts[0]) + 1 if whole_page and texts[0] else 0
    return QA(
        id=str(row["id"] if nested else row["example_id"]),
        document=document or "",
        context="\n".join(text for text in texts if text),
        question=row["question"]["text"] if nested else row["question_text"],
        answers=_answers([a for a in annotations if a.long_answer == chosen], tokens, is_html),
        start=start,
        end=start + len(texts[1]) if whole_page else None,
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
