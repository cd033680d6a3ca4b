"""Questions that read several contexts: their own among others at a random place, and, as a control, the others alone.

`contexts_5` is a question with its own context and four others, `missing_5` one with five others: its answer is then
"Answer not in context.". Which others, and where its own stands, depends on the row and the number alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dssk import prompts
from dssk.config import Source
from dssk.data.distractors import Distractors
from dssk.errors import DsskError
from dssk.evaluation.questions import QuestionSet, spread
from dssk.evaluation.scores import Prediction, with_interval
from dssk.inference.generation import contexts_together, generate_batch
from dssk.inference.loading import FusedModel
from dssk.inference.timing import Clock
from dssk.inference.tokenizer import tokenize_question

WITH, WITHOUT = "contexts_", "missing_"
SCORES = ("n", "em", "em_low", "em_high", "f1", "right_beats_wrong")
COLUMNS = (*SCORES, "first_token_s", "tokens_per_s", "bytes")  # of a table by number of contexts
TIMED_QUESTIONS, TIMED_TOKENS = 5, 9  # whose seconds are measured, after one that warms up


def names(numbers: Sequence[int]) -> list[str]:
    """The controls of these numbers of contexts."""
    return [f"{kind}{number}" for number in numbers for kind in (WITH, WITHOUT)]


def is_name(control: str) -> bool:
    """Whether it is one of `names`, of any number."""
    return control.startswith((WITH, WITHOUT))


def parse_numbers(text: str) -> list[int]:
    """Numbers of contexts, divided by commas. Raises `DsskError` for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise DsskError(f"--num_contexts {text}: want numbers from 1 with commas between, such as 1,2,5")
    return sorted(set(numbers))


def parse_sources(text: str) -> dict[Source, float]:
    """Where distractors come from, divided by commas, all alike."""
    known: dict[str, Source] = {"document": "document", "neighbours": "neighbours", "random": "random"}
    wrong = [name for name in text.split(",") if name not in known]
    if wrong:
        raise DsskError(f"--distractors {text}: want some of {','.join(known)}")
    return {known[name]: 1.0 for name in text.split(",")}


def distractors_of(questions: QuestionSet, mix: dict[Source, float]) -> Distractors:
    """Where the others come from: all contexts of the split, by the shares of `mix`."""
    assert questions.pool is not None
    pool = questions.pool
    return Distractors(pool.titles, pool.text, pool.members, mix)


def drawn(control: str, questions: QuestionSet, distractors: Distractors) -> list[tuple[int, ...] | None]:
    """The contexts that each row reads under a control, by number in the pool; None where there are not as many.

    Where its own context is missing there are none either that say an answer of the question.
    """
    assert questions.pool is not None
    pool = questions.pool
    kind, number = control.rsplit("_", 1)
    gold = f"{kind}_" == WITH
    rows: list[tuple[int, ...] | None] = []
    for row, asked in enumerate(questions.rows):
        rng = np.random.default_rng([row, int(number), gold])
        own, count = pool.of_row[row], int(number) - gold
        others = distractors.draw(own, asked.question, count, rng, without=[] if gold else asked.answers)
        if gold:
            others.insert(int(rng.integers(len(others) + 1)), own)
        rows.append(tuple(others) if len(others) == int(number) else None)
    return rows


def shuffled(number: int, row: int) -> np.random.Generator:
    """What decides the order of a row's contexts for systems to which order matters, drawn anew."""
    return np.random.default_rng([row, number, 2])


def timed(several: Sequence[tuple[int, ...] | None]) -> list[int]:
    """The rows whose seconds are measured: some of those that have contexts, the same ones every time."""
    usable = [row for row, read in enumerate(several) if read]
    return [usable[i] for i in spread(len(usable), TIMED_QUESTIONS)]


def golds(control: str, answers: list[str]) -> list[str]:
    """The right answers to a question under a control."""
    return [prompts.NOT_IN_CONTEXT] if control.startswith(WITHOUT) else answers


def beats(predictions: Sequence[Prediction], number: int) -> dict[str, float]:
    """Share of the questions whose gold answer is likelier with their own context among others than with others alone.

    Questions that their own context does not answer are left out.
    """
    right, wrong = f"{WITH}{number}", f"{WITHOUT}{number}"
    compared = [p for p in predictions if right in p and wrong in p and p["answer_class"] != "unanswerable"]
    if not compared:
        return {}
    values = [p[right]["answer_nll"] < p[wrong]["answer_nll"] for p in compared]
    return with_interval("right_beats_wrong", values, compared)


def cost(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: QuestionSet,
    several: Sequence[tuple[int, ...] | None],
) -> dict[str, float]:
    """Medians of one question at a time: seconds to the first token, from stored states, tokens a second after it.

    `bytes` are those that the contexts' states take as they are kept, on average.
    """
    assert questions.pool is not None
    chosen = timed(several)
    clocks, kept = [], []
    for row in tqdm([chosen[0], *chosen], desc="cost", disable=None):
        read = several[row]
        assert read is not None
        prompt = tokenize_question(tokenizer, questions.rows[row].question, model.config.reader)
        states = questions.pool.states(model, read)
        clock = Clock(model.device)
        with torch.no_grad():
            context = contexts_together(model, [states])
        settings: dict[str, Any] = {"min_new_tokens": TIMED_TOKENS, "streamer": clock, **context}
        generate_batch(model, tokenizer, [prompt], TIMED_TOKENS, **settings)
        clocks.append(clock)
        kept.append(sum(map(len, states)) * questions.bytes_per_context_token)
    return {
        "first_token_s": round(float(np.median([clock.first_token for clock in clocks[1:]])), 6),
        "tokens_per_s": round(float(np.median([clock.tokens_per_second for clock in clocks[1:]])), 2),
        "bytes": round(float(np.mean(kept[1:]))),
    }


def rows(scores: dict[str, Any], set_name: str, seed: int) -> list[dict[str, Any]]:
    """The scores by number of contexts as rows of a table: {set, seed, num_contexts, gold, n, em, ...}."""
    return [
        {
            "set": set_name,
            "seed": seed,
            "num_contexts": int(name.rsplit("_", 1)[1]),
            "gold": name.startswith(WITH),
        }
        | {column: score[column] for column in COLUMNS if column in score}
        for name, score in scores.items()
        if is_name(name)
    ]
