"""Wrapping a page and what its annotators marked into the three layouts of Natural Questions."""

import re
from typing import Any, NamedTuple

LAYOUTS = ("hub", "original", "simplified")
_HUB_YES_NO = {"YES": 1, "NO": 0, "NONE": -1}


class Annotation(NamedTuple):
    """Answers are pieces of the page's text; `long_answer` None: the annotator found none."""

    long_answer: str | None
    short_answers: list[str] = []  # noqa: RUF012 - never changed
    yes_no: str = "NONE"


class Page(NamedTuple):
    id: str
    title: str
    question: str
    text: str
    """Tokens and markup, divided by blanks; markup with attributes is one token."""
    annotations: list[Annotation]


def wrap(layout: str, page: Page) -> dict[str, Any]:
    """`page` as a raw row, between other text of the page."""
    tokens = _tokens(f"{page.title} - Wikipedia <H1> {page.title} </H1> {page.text} <P> The end . </P>")
    if layout == "original":
        return {
            "example_id": int(page.id),
            "document_title": page.title,
            "question_text": page.question,
            "document_tokens": [
                {"token": t, "html_token": _is_html(t), "start_byte": 0, "end_byte": 1} for t in tokens
            ],
            "annotations": [_annotation(a, tokens) for a in page.annotations],
        }
    if layout == "simplified":
        return {
            "example_id": int(page.id),
            "document_title": page.title,
            "question_text": page.question,
            "document_text": " ".join(token.replace(" ", "_") for token in tokens),
            "annotations": [_annotation(a, tokens) for a in page.annotations],
        }
    annotations = [_annotation(a, tokens) for a in page.annotations]
    for annotation in annotations:
        annotation["short_answers"] = _columns(annotation["short_answers"], ("start_token", "end_token"))
        annotation["yes_no_answer"] = _HUB_YES_NO[annotation["yes_no_answer"]]
    return {
        "id": page.id,
        "document": {
            "title": page.title,
            "tokens": {"token": tokens, "is_html": [_is_html(t) for t in tokens]},
        },
        "question": {"text": page.question},
        "annotations": _columns(annotations, ("long_answer", "short_answers", "yes_no_answer")),
    }


def _tokens(text: str) -> list[str]:
    return re.findall(r"<[A-Z]\w* [^<>]*>|\S+", text)


def _is_html(token: str) -> bool:
    return re.fullmatch(r"</?[A-Z]\w*( [^<>]*)?>", token) is not None


def _annotation(annotation: Annotation, tokens: list[str]) -> dict[str, Any]:
    long_answer = _find(annotation.long_answer, tokens, 0) if annotation.long_answer else (-1, -1)
    shorts = [_find(short, tokens, max(long_answer[0], 0)) for short in annotation.short_answers]
    return {
        "long_answer": {"start_token": long_answer[0], "end_token": long_answer[1]},
        "short_answers": [{"start_token": start, "end_token": end} for start, end in shorts],
        "yes_no_answer": annotation.yes_no,
    }


def _find(text: str, tokens: list[str], first: int) -> tuple[int, int]:
    wanted = _tokens(text)
    for start in range(first, len(tokens)):
        if tokens[start : start + len(wanted)] == wanted:
            return start, start + len(wanted)
    raise ValueError(f"{text!r} is not on the page")


def _columns(entries: list[dict], names: tuple[str, ...]) -> dict[str, list]:
    return {name: [entry[name] for entry in entries] for name in names}
