"""Answers from contexts that are given as text, as encoder states, or projected ahead of time.

Each distinct context is encoded once, however many questions ask it, and questions that share one are generated
together from one projection of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dssk.errors import DsskError
from dssk.inference.attending import seen
from dssk.inference.batching import length_batches
from dssk.inference.encoding import Encoder
from dssk.inference.generation import Tokens, contexts_together, generate_batch
from dssk.inference.passages import Passage, Splitter, passages_of
from dssk.inference.tokenizer import load_tokenizer, tokenize_question
from dssk.models.modeling import CONTEXT_ARGUMENTS
from dssk.models.modeling import Context as Projected
from dssk.models.shapes import context_window, window
from dssk.utils.defaults import BATCH_SIZE, MAX_NEW_TOKENS

Context = str | torch.Tensor  # a text, or its encoder states (S, d)
States = list[torch.Tensor]  # of the contexts of one question


class Answers:
    """Mixed into fused models: the method `answer`."""

    def answer(
        self,
        questions: str | Sequence[str],
        contexts: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        return_sources: bool = False,
        truncate: bool = False,
        **generate: Any,
    ) -> Any:
        """Answer one question with a text, or several with a list of texts.

        Args:
            contexts: what the answer is to be found in: a text, encoder states (S, d), or a list of these, which
                are encoded apart and attended to together. With several questions, a list of one such entry a
                question, or one text, states or projected context for all. `None` asks the base.
            tokenizer: with the padding token set, as `dssk.inference.tokenizer.load_tokenizer` does. If not given
                it is loaded on each call from where the model was loaded from.
            return_sources: give each answer as an `Answered`, with the sources that it attended to, most first.
            truncate: cut a text that is longer than the model's window off, instead of reading it as passages.
            generate: `batch_size` (32 questions), `show_progress`; the rest goes to `generate`. By default that is
                greedy and ends after 32 tokens.

        A text is encoded once, however many questions it is given with, and rounded as a store keeps it. One that is
        longer than the model's window is read as several passages. An answer is the first line that is generated: what
        evaluation scores.
        """
        how = {"return_sources": return_sources, "truncate": truncate}
        return answer(self, questions, contexts, tokenizer, **how, **generate)


class Source(NamedTuple):
    """A context of an answer, or a passage of it. Positions are in characters of the context's text."""

    context: int  # which of the question's contexts
    start: int  # of the passage
    end: int
    share: float  # of the attention that went to all contexts, 0 to 1
    span: tuple[int, int]  # what was most attended to in it
    text: str  # the span's text; empty where states were given, whose text is not known


class Answered(NamedTuple):
    """An answer with its sources; none if no context was given."""

    answer: str
    sources: list[Source]


class Read(NamedTuple):
    """A context with its states, and the passage of the text that they encode (empty if only states were given)."""

    context: int
    states: torch.Tensor
    passage: Passage


def answer(
    model: Any,
    questions: str | Sequence[str],
    contexts: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = BATCH_SIZE,
    show_progress: bool = False,
    return_sources: bool = False,
    truncate: bool = False,
    **generate: Any,
) -> Any:
    """See `Answers.answer`."""
    how = {"return_sources": return_sources, "truncate": truncate}
    if isinstance(questions, str):
        one = contexts if isinstance(contexts, Projected) else [contexts]
        return answer(model, [questions], one, tokenizer, batch_size, show_progress, **how, **generate)[0]
    _check(questions, generate)
    if return_sources and isinstance(contexts, Projected):
        raise ValueError("sources of a projected context are not known: give its text or its states")
    tokenizer = tokenizer or load_tokenizer(model.name_or_path)
    max_new_tokens = generate.pop("max_new_tokens", MAX_NEW_TOKENS)
    prompted = _tokenize(model, tokenizer, questions, max_new_tokens)
    projected = contexts if isinstance(contexts, Projected) else None
    read, groups = _reads(model, tokenizer, None if projected else contexts, len(questions), truncate)
    states = [[context.states for context in several] for several in read]
    answers = [""] * len(questions)
    bar = tqdm(
        total=len(questions), desc="answering", unit="question", disable=None if show_progress else True
    )
    with bar:
        for rows in _batches(states, groups, [len(ids) for ids in prompted], batch_size):
            context = {"context": projected} if projected else _project(model, states, groups, rows)
            texts = generate_batch(
                model, tokenizer, [prompted[row] for row in rows], max_new_tokens, **context, **generate
            )
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            bar.update(len(rows))
    if not return_sources:
        return answers
    return [
        Answered(text, _sources(model, tokenizer, question, text, several))
        for question, text, several in zip(questions, answers, read, strict=True)
    ]


def _sources(
    model: Any, tokenizer: PreTrainedTokenizerBase, question: str, text: str, several: list[Read]
) -> list[Source]:
    contexts = [(read.passage.text, read.states) for read in several]
    found = []
    for read, part in zip(several, seen(model, tokenizer, question, text, contexts), strict=False):
        whole, start, end = read.passage
        span = (start + part.start, start + part.end)
        found.append(Source(read.context, start, end, part.share, span, whole[part.start : part.end]))
    return sorted(found, key=lambda source: -source.share)


def _check(questions: Sequence[str], generate: dict[str, Any]) -> None:
    if not all(isinstance(question, str) for question in questions):
        raise ValueError("questions are texts: want one, or a list of them")
    if generate.get("num_return_sequences", 1) != 1:
        raise ValueError("answer gives one answer a question: use generate for num_return_sequences")
    if given := [name for name in CONTEXT_ARGUMENTS if name in generate]:
        raise ValueError(f"got {given[0]} as an argument of generate: give it as contexts")


def _tokenize(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_new_tokens: int
) -> list[Tokens]:
    positions = window(model.config)
    tokens = [tokenize_question(tokenizer, question, model.config.reader) for question in questions]
    for question, ids in zip(questions, tokens, strict=True):
        if len(ids) + max_new_tokens > positions:
            raise DsskError(
                f"the question {question[:40]!r} has {len(ids)} tokens, with {max_new_tokens} new ones more than the "
                f"model's {positions}: shorten it, or lower max_new_tokens"
            )
    return tokens


def _reads(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: Any, count: int, truncate: bool
) -> tuple[list[list[Read]], list[int]]:
    """The contexts of each question with their states, and a group number shared by questions with equal contexts.

    Each distinct text is encoded once.
    """
    per_question = _per_question(contexts, count, model.config.states_width)
    texts = list(dict.fromkeys(c for several in per_question for c in several if isinstance(c, str)))
    encoded = encode_passages(model, tokenizer, texts, truncate)
    numbers: dict[tuple, int] = {}
    groups = [
        numbers.setdefault(tuple(c if isinstance(c, str) else id(c) for c in several), len(numbers))
        for several in per_question
    ]
    of_text = dict(zip(texts, encoded, strict=True))
    reads = [
        [
            Read(number, states, passage)
            for number, context in enumerate(several)
            for states, passage in (
                of_text[context] if isinstance(context, str) else [(context, Passage("", 0, 0))]
            )
        ]
        for several in per_question
    ]
    return reads, groups


def encode_passages(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    truncate: bool = False,
    splitter: Splitter | None = None,
) -> list[list[tuple[torch.Tensor, Passage]]]:
    """The passages of each text with their states; by default as long as the model reads.

    With `truncate` each text is one passage, of which as much is read.
    """
    splitter = None if truncate else splitter or Splitter(context_window(model.config))
    cut = [passages_of(splitter, tokenizer, text) for text in texts]
    states = iter(Encoder(model, tokenizer).encode([passage.text for several in cut for passage in several]))
    return [[(next(states), passage) for passage in several] for several in cut]


def _per_question(contexts: Any, count: int, hidden_size: int) -> list[list[Context]]:
    """The contexts of each of `count` questions as a list."""
    if contexts is None or isinstance(contexts, Context):
        contexts = [contexts] * count
    want = f"want a text, encoder states (tokens, {hidden_size}), a list of these, or a projected context for all"
    if not isinstance(contexts, list | tuple):
        raise ValueError(f"contexts are {type(contexts).__name__}: {want}")
    if len(contexts) != count:
        raise ValueError(
            f"got {count} questions and contexts for {len(contexts)}, want as many, or one for all"
        )
    per_question = []
    for entry in contexts:
        several = [] if entry is None else [entry] if isinstance(entry, Context) else entry
        if not isinstance(several, list | tuple):
            raise ValueError(f"a context is {type(entry).__name__}: {want}")
        for context in several:
            states = isinstance(context, torch.Tensor)
            if not isinstance(context, str) and not (states and context.shape[1:] == (hidden_size,)):
                got = f"a tensor {tuple(context.shape)}" if states else type(context).__name__
                raise ValueError(f"a context is {got}: {want}")
        per_question.append(list(several))
    return per_question


def _batches(
    states: list[States], groups: Sequence[int], prompt_tokens: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    """Row numbers, at most `batch_size` at a time: longest contexts first, those of one context together.

    Rows with and without a context are never in one batch: without any, the model is the base.
    """
    tokens = [sum(map(len, several)) for several in states]
    rows = sorted(range(len(states)), key=lambda row: (groups[row], -prompt_tokens[row]))
    for part in ([row for row in rows if tokens[row]], [row for row in rows if not tokens[row]]):
        # Batching keeps the order of rows with equally long contexts.
        for batch in length_batches([tokens[row] for row in part], batch_size):
            yield [part[i] for i in batch]


def _project(model: Any, states: list[States], groups: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """Contexts joined and projected: one for all rows of a batch, or one each; nothing if there are none."""
    if not states[rows[0]]:
        return {}
    distinct = rows[:1] if len({groups[row] for row in rows}) == 1 else rows
    with torch.no_grad():
        return contexts_together(model, [states[row] for row in distinct])
