"""Asking a model at a prompt or in batches, with contexts of a library or given as texts."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from dssk.errors import DsskError
from dssk.inference.answering import encode_texts, tokenize_context
from dssk.inference.loading import load_model
from dssk.store.library import ContextLibrary
from dssk.utils.files import machine_faults, publish_text

QUIT = "/quit"


def ask(args: Namespace) -> None:
    """Do what the flags of `dssk answer` say."""
    model, tokenizer = load_model(args.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.library:
        library = ContextLibrary(args.library)
        library.check_model(args.checkpoint)
        finder = Finder(library, args.context_id, args.k)
    else:
        finder = Finder.of_texts(model, tokenizer, [read_text(path) for path in args.context])
    settings = {"max_new_tokens": args.max_new_tokens, "tokenizer": tokenizer}
    if args.input:
        rows = read_questions(args.input)
        answered = answer_rows(
            model, rows, finder, batch_size=args.batch_size, show_progress=True, **settings
        )
        write_answers(answered, args.output)
    elif args.question:
        rows = [{"question": question} for question in args.question]
        for row in answer_rows(model, rows, finder, batch_size=args.batch_size, **settings):
            print(row["answer"])
    else:
        converse(model, finder, sys.stdin, **settings)


class Finder:
    """Finds the contexts of a question: given ones, or those of a library that share its words."""

    def __init__(self, library: ContextLibrary | None, ids: Sequence[str] | None = None, k: int = 1):
        self._library, self._ids, self._k = library, ids, k
        self._states: list[torch.Tensor] | None = None
        if library and ids:
            self._states = [library.get(id).encoder_hidden_states for id in ids]

    @classmethod
    def of_texts(cls, model, tokenizer, texts: Sequence[str]) -> "Finder":
        """Texts that are encoded here; says if one is too long to be read whole."""
        finder = cls(None)
        finder._states = encode_texts(model, tokenizer, texts)
        for text, states in zip(texts, finder._states, strict=True):
            tokens = len(tokenize_context(tokenizer, text))
            if tokens > len(states):
                print(
                    f"dssk: a context has {tokens} tokens, the first {len(states)} are read", file=sys.stderr
                )
        return finder

    def find(self, question: str, ids: Sequence[str] | None = None) -> tuple[list[str], list[torch.Tensor]]:
        """Ids, none for texts, and encoder states (S, d) of the contexts for `question`; `ids` come first."""
        if self._states is not None and not ids:
            return list(self._ids or []), self._states
        if self._library is None:
            raise DsskError(f"{question[:40]!r} names a context: pass --library")
        ids = ids or [hit.id for hit in self._library.search(question, self._k)]
        return list(ids), [self._library.get(id).encoder_hidden_states for id in ids]


def answer_rows(
    model, rows: Sequence[dict[str, Any]], finder: Finder, **settings: Any
) -> list[dict[str, Any]]:
    """Rows with "answer" and "context_ids" added."""
    found = [finder.find(row["question"], row.get("context_id")) for row in rows]
    answers = model.answer([row["question"] for row in rows], [states for _, states in found], **settings)
    return [
        {**row, "answer": answer, "context_ids": ids}
        for row, answer, (ids, _) in zip(rows, answers, found, strict=True)
    ]


def converse(model, finder: Finder, lines: Iterable[str], tokenizer, **settings: Any) -> None:
    """Answer line by line, until `/quit` or the end; tokens are shown as they come."""
    for question in _typed(lines):
        ids, states = finder.find(question)
        model.answer(question, states, tokenizer, streamer=_Stream(tokenizer), **settings)
        if ids:
            print(f"[{', '.join(ids)}]")


class _Stream(TextStreamer):
    """Prints an answer without the space it begins with."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._started = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        super().on_finalized_text(text, stream_end)


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
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, ids = row["question"], row.get("context_id")
            if not isinstance(question, str) or not isinstance(ids, str | list | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DsskError(
                f'{path}:{number}: want {{"question": text}}, with "id" and "context_id" at will'
            ) from None
        rows.append({**row, "context_id": [ids]} if isinstance(ids, str) else row)
    return rows


def write_answers(rows: Iterable[dict[str, Any]], output: str | None) -> None:
    lines = "".join(
        json.dumps({k: v for k, v in row.items() if k != "context_id"}, ensure_ascii=False) + "\n"
        for row in rows
    )
    if output is None:
        sys.stdout.write(lines)
        return
    path = Path(output)
    with machine_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, lines)


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DsskError(f"cannot read {path}: {error}") from error
