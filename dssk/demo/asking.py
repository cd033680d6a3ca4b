"""Asking a model at a prompt or in batches, with contexts of a library or given as texts."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from dssk.errors import DsskError
from dssk.inference.encoding import Encoder
from dssk.inference.loading import FusedModel, device, load_model
from dssk.inference.tokenizer import tokenize_context
from dssk.store.library import ContextLibrary
from dssk.utils.defaults import BATCH_SIZE, MAX_NEW_TOKENS
from dssk.utils.files import machine_faults, publish_text
from dssk.utils.json_files import parse_json

QUIT = "/quit"
NOTHING_FOUND = "[no context found: the model answers by itself]"

Found = tuple[list[str], list[torch.Tensor]]  # ids, none for texts, and encoder states (S, d)


def ask(
    checkpoint: str,
    library: str | None = None,
    context: Sequence[str] | None = None,
    context_id: Sequence[str] | None = None,
    k: int = 1,
    question: Sequence[str] | None = None,
    input: str | None = None,
    output: str | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """What `dssk answer` does; the arguments are its flags."""
    texts = [read_text(path) for path in context or []]
    rows = read_questions(input) if input else [{"question": text} for text in question or []]
    model, tokenizer = load_model(checkpoint, device=device())
    if library:
        contexts = ContextLibrary(library)
        contexts.check_model(checkpoint)
        finder = Finder(contexts, context_id, k)
    else:
        finder = Finder.of_texts(model, tokenizer, texts)
    if not (input or question):
        converse(model, tokenizer, finder, sys.stdin, max_new_tokens)
        return
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "show_progress": bool(input)}
    found = [finder.find(row["question"], row.get("context_id")) for row in rows]
    questions, states = [row["question"] for row in rows], [states for _, states in found]
    answers = model.answer(questions, states, tokenizer, **settings)
    if input:
        write_answers(rows, answers, found, output)
        return
    for answer, sources in zip(answers, found, strict=True):
        show_source(sources, before=True)
        print(answer)
        show_source(sources, before=False)


class Finder:
    """Finds the contexts of a question: given ones, or those of a library that share its words."""

    def __init__(self, library: ContextLibrary | None, ids: Sequence[str] | None = None, k: int = 1):
        self._library, self._k = library, k
        self._states: dict[str, torch.Tensor] = {}
        self._given: Found | None = self._fetch(ids) if ids else None

    @classmethod
    def of_texts(
        cls, model: FusedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
    ) -> "Finder":
        """Texts that are encoded here; says if one is too long to be read whole."""
        states = Encoder(model, tokenizer).encode(texts)
        for text, encoded in zip(texts, states, strict=True):
            tokens = len(tokenize_context(tokenizer, text))
            if tokens > len(encoded):
                print(
                    f"dssk: a context has {tokens} tokens, the first {len(encoded)} are read", file=sys.stderr
                )
        finder = cls(None)
        finder._given = [], states
        return finder

    def find(self, question: str, ids: Sequence[str] | None = None) -> Found:
        """The contexts for `question`; `ids` come first."""
        if self._given is not None and not ids:
            return self._given
        if self._library is None:
            raise DsskError(f"{question[:40]!r} names a context: pass --library")
        return self._fetch(ids or [hit.id for hit in self._library.search(question, self._k)])

    def _fetch(self, ids: Sequence[str]) -> Found:
        """Contexts of the library; the same states for the same id, so that its questions share a projection."""
        assert self._library is not None
        for id in ids:
            if id not in self._states:
                self._states[id] = self._library.get(id).encoder_hidden_states
        return list(ids), [self._states[id] for id in ids]


def converse(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    finder: Finder,
    lines: Iterable[str],
    max_new_tokens: int,
) -> None:
    """Answer line by line, until `/quit` or the end; tokens are shown as they come."""
    for question in _typed(lines):
        found = finder.find(question)
        show_source(found, before=True)
        stream = _Stream(tokenizer)
        model.answer(question, found[1], tokenizer, streamer=stream, max_new_tokens=max_new_tokens)
        show_source(found, before=False)


def show_source(found: Found, before: bool) -> None:
    """Say before an answer that there is no context for it, or after it from which ones of a library it comes."""
    ids, states = found
    if before and not states:
        print(NOTHING_FOUND)
    elif not before and ids:
        print(f"[{', '.join(ids)}]")


class _Stream(TextStreamer):
    """Prints an answer, and nothing of what a model goes on to write below it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._started = self._ended = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        line, newline, _ = text.partition("\n")
        shown = "" if self._ended else line
        self._ended |= bool(newline)
        super().on_finalized_text(shown, stream_end)


def _typed(lines: Iterable[str]) -> Iterator[str]:
    """The questions in `lines`; someone at a terminal is asked for them."""
    asked = sys.stdin.isatty()
    if asked:
        print(f"Ask; {QUIT} ends.")
    lines = iter(lines)
    while True:
        if asked:
            print("> ", end="", flush=True)
        line = next(lines, QUIT).strip()
        if line == QUIT:
            return
        if line:
            yield line


def read_text(path: str) -> str:
    """A text that is not empty."""
    text = _read(path)
    if not text.strip():
        raise DsskError(f"the context {path} is empty")
    return text.strip()


def read_questions(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file, "context_id" as a list."""
    return [
        _question(f"{path}:{number}", line)
        for number, line in enumerate(_read(path).splitlines(), start=1)
        if line.strip()
    ]


def _question(place: str, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
        question, ids = row["question"], row.get("context_id")
        ids = [ids] if isinstance(ids, str) else ids
        if not isinstance(question, str) or not all(isinstance(id, str) for id in ids or []):
            raise TypeError
        _as_line(row).encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DsskError(f'{place}: want {{"question": text}}, with "id" and "context_id" at will') from None
    return {**row, "context_id": ids} if ids else row


def write_answers(
    rows: Sequence[dict[str, Any]], answers: Sequence[str], found: Sequence[Found], output: str | None
) -> None:
    """The rows with "answer" and "context_ids", to a file or standard output."""
    if without := sum(not states for _, states in found):
        print(f"dssk: no context found for {without} of {len(rows)} questions", file=sys.stderr)
    lines = "".join(
        _as_line({**row, "answer": answer, "context_ids": ids})
        for row, answer, (ids, _) in zip(rows, answers, found, strict=True)
    )
    if output is None:
        sys.stdout.write(lines)
        return
    path = Path(output)
    with machine_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, lines)


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k != "context_id"}, ensure_ascii=False) + "\n"


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DsskError(f"cannot read {path}: {error}") from error
