"""Asking a model at a prompt or in batches, with contexts of a library or given as texts."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from dssk.errors import DsskError
from dssk.inference.answering import encode_passages
from dssk.inference.attending import Seen, seen
from dssk.inference.generation import answer_in
from dssk.inference.loading import FusedModel, device, load_model
from dssk.inference.passages import Splitter
from dssk.inference.tokenizer import tokenize_context
from dssk.models.shapes import context_window
from dssk.store.library import Context, ContextLibrary
from dssk.store.search import WordIndex
from dssk.utils.defaults import BATCH_SIZE, MAX_NEW_TOKENS
from dssk.utils.files import machine_faults, write_text
from dssk.utils.json_files import parse_json

QUIT = "/quit"
NOTHING_FOUND = "[no context found: the model answers by itself]"


def ask(
    checkpoint: str,
    library: str | None = None,
    context: Sequence[str] | None = None,
    context_id: Sequence[str] | None = None,
    k: int | None = None,
    question: Sequence[str] | None = None,
    input: str | None = None,
    output: str | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    passage_tokens: int | None = None,
    overlap: int = 0,
    truncate: bool = False,
) -> None:
    """Run `dssk answer`; the arguments are its flags."""
    stems = Counter(Path(path).stem for path in context or [])
    texts = {
        path if stems[Path(path).stem] > 1 else Path(path).stem: read_text(path) for path in context or []
    }
    rows = read_questions(input) if input else [{"question": text} for text in question or []]
    model, tokenizer = load_model(checkpoint, device=device())
    if library:
        contexts = ContextLibrary(library)
        contexts.check_model(checkpoint)
        retriever = Retriever(contexts, context_id, k or 1)
    else:
        longest = context_window(model.config)
        if passage_tokens and passage_tokens > longest:
            raise DsskError(
                f"--passage_tokens {passage_tokens} is more than the {longest} that the model reads: lower it"
            )
        splitter = Splitter(passage_tokens or longest, overlap)
        retriever = Retriever.of_texts(model, tokenizer, texts, splitter, truncate, k)
    if not (input or question):
        converse(model, tokenizer, retriever, sys.stdin, max_new_tokens)
        return
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "show_progress": bool(input)}
    found = [retriever.find(row["question"], row.get("context_id")) for row in rows]
    questions = [row["question"] for row in rows]
    states = [[context.encoder_hidden_states for context in one] for one in found]
    answers = model.answer(questions, states, tokenizer, **settings)
    sources = [
        attended(model, tokenizer, question, answer, one)
        for question, answer, one in zip(questions, answers, found, strict=True)
    ]
    if input:
        write_answers(rows, answers, found if library else [[] for _ in rows], sources, output)
        return
    for answer, read in zip(answers, sources, strict=True):
        say_nothing_found(read)
        print(answer)
        show_sources(read)


class Retriever:
    """Retrieves the contexts of a question: given ones, or those that BM25 finds."""

    def __init__(self, library: ContextLibrary | None, ids: Sequence[str] | None = None, k: int | None = 1):
        self._library, self._k = library, k
        self._known: dict[str, Context] = {}
        self._given: list[Context] | None = self._fetch(ids) if ids else None
        self._index: WordIndex | None = None  # of given texts, where some of them are to be picked

    @classmethod
    def of_texts(
        cls,
        model: FusedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, str],
        splitter: Splitter,
        truncate: bool = False,
        k: int | None = None,
    ) -> "Retriever":
        """Texts by their names, which are encoded here, long ones as passages; the best `k` are read, or all.

        With `truncate` their beginnings are read alone, and how many tokens are lost is said.
        """
        encoded = encode_passages(model, tokenizer, list(texts.values()), truncate, splitter)
        given = []
        for (name, text), several in zip(texts.items(), encoded, strict=True):
            for number, (states, passage) in enumerate(several, start=1):
                id, document = (name, "") if len(several) == 1 else (f"{name}#{number}", name)
                place = (document, passage.start, passage.end)
                given.append(Context(id, "", passage.text, *place, len(states), truncate, states))
            if truncate and (lost := len(tokenize_context(tokenizer, text)) - len(several[0][0])) > 0:
                print(f"dssk: --truncate: {lost} tokens of {name} are not read", file=sys.stderr)
        retriever = cls(None, k=k)
        retriever._given = given
        if k is not None and k < len(given):
            retriever._index = WordIndex.of_texts([context.text for context in given])
        return retriever

    def find(self, question: str, ids: Sequence[str] | None = None) -> list[Context]:
        """The contexts for `question`; `ids` come first."""
        if self._given is not None and not ids:
            if self._index is None:
                return self._given
            return [self._given[row] for row, _ in self._index.search(question, self._k or 1)]
        if self._library is None:
            raise DsskError(f"{question[:40]!r} names a context: pass --library")
        return self._fetch(ids or [hit.id for hit in self._library.search(question, self._k or 1)])

    def _fetch(self, ids: Sequence[str]) -> list[Context]:
        """Contexts of the library; the same states for the same id, so that its questions share a projection."""
        assert self._library is not None
        for id in ids:
            if id not in self._known:
                self._known[id] = self._library.get(id)
        return [self._known[id] for id in ids]


def attended(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str,
    found: Sequence[Context],
) -> list[tuple[Context, Seen]]:
    """The contexts of an answer with what it attended to in each, most first."""
    contexts = [(context.text, context.encoder_hidden_states) for context in found]
    parts = seen(model, tokenizer, question, answer, contexts)
    parts = parts or [Seen(0.0, 0, 0)] * len(found)  # an answer without tokens
    return sorted(zip(found, parts, strict=True), key=lambda pair: -pair[1].share)


def converse(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    retriever: Retriever,
    lines: Iterable[str],
    max_new_tokens: int,
) -> None:
    """Answer line by line, until `/quit` or the end; tokens are shown as they come."""
    for question in _typed(lines):
        found = retriever.find(question)
        say_nothing_found(found)
        stream = _Stream(tokenizer)
        states = [context.encoder_hidden_states for context in found]
        answer = model.answer(question, states, tokenizer, streamer=stream, max_new_tokens=max_new_tokens)
        show_sources(attended(model, tokenizer, question, answer, found))


def say_nothing_found(found: Sequence[Any]) -> None:
    """Say before an answer that there is no context for it."""
    if not found:
        print(NOTHING_FOUND)


def show_sources(sources: Sequence[tuple[Context, Seen]]) -> None:
    """Say after an answer what it was read in: a line for each context, the most attended to first."""
    for context, part in sources:
        title = f" ({context.title})" if context.title else ""
        place = (
            f", characters {context.start} to {context.end} of {context.document}" if context.document else ""
        )
        span = " ".join(context.text[part.start : part.end].split())
        print(f"[{context.id}{title}{place}: {part.share:.0%} of the attention, most to {span!r}]")


class _Stream(TextStreamer):
    """Prints an answer as it is generated: by `answer_in`, nothing of what the model writes after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._text = self._shown = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._text += text
        answer = answer_in(self._text)
        super().on_finalized_text(answer[len(self._shown) :], stream_end)
        self._shown = answer


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
    rows: Sequence[dict[str, Any]],
    answers: Sequence[str],
    found: Sequence[Sequence[Context]],
    sources: Sequence[Sequence[tuple[Context, Seen]]],
    output: str | None,
) -> None:
    """The rows with "answer", "context_ids" and "sources", to a file or standard output.

    `found` are the contexts of a library that each question reads, in the order of the search. A line whose question
    found nothing begins with "nothing_found".
    """
    if without := sum(not read for read in sources):
        print(f"dssk: no context found for {without} of {len(rows)} questions", file=sys.stderr)
    lines = "".join(
        _as_line(
            {
                **({} if read else {"nothing_found": True}),
                **row,
                "answer": answer,
                "context_ids": [context.id for context in one],
                "sources": [_source(*pair) for pair in read],
            }
        )
        for row, answer, one, read in zip(rows, answers, found, sources, strict=True)
    )
    if output is None:
        sys.stdout.write(lines)
        return
    path = Path(output)
    with machine_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, lines)


def _source(context: Context, part: Seen) -> dict[str, Any]:
    """A context of an answer, as it is written: it stands from `start` to `end` in its document, the span in it."""
    return {
        "id": context.id,
        "title": context.title,
        "document": context.document,
        "start": context.start,
        "end": context.end,
        "share": part.share,
        "span": context.text[part.start : part.end],
        "span_start": part.start,
        "span_end": part.end,
    }


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in row.items() if k != "context_id"}, ensure_ascii=False) + "\n"


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DsskError(f"cannot read {path}: {error}") from error
