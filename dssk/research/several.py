"""Comparing by the number of contexts that a question reads: from stored states, or as far as a prompt has room.

All systems read the same contexts in the same places (`evaluation.by_number.drawn`). A prompt that has no room for all
keeps the right one and leaves out the last of the others. Those that stay stand there in their order and, which is a
system of its own (`..._shuffled`), in another.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from dssk.errors import DsskError
from dssk.evaluation import by_number
from dssk.evaluation.predictions import System
from dssk.evaluation.questions import QuestionSet
from dssk.evaluation.scores import Prediction, score
from dssk.inference.generation import contexts_together
from dssk.inference.tokenizer import tokenize_question
from dssk.models.shapes import window
from dssk.research import cost
from dssk.research.prompted import PromptedSystem, cache_bytes_per_token, few_shot, make_prompt
from dssk.research.systems import SHUFFLED, Systems
from dssk.utils import files
from dssk.utils.json_files import read_json

PROMPTS = ("prompted", "prompted_examples")

Row = dict[str, Any]
Timed = tuple[cost.Generate[int], int]  # what answers a row, and the bytes that its contexts take on average


def systems_of(names: Sequence[str], reader: str) -> list[str]:
    """The systems that are compared by the number of contexts, of those that are compared at all."""
    chosen = [name for name in names if name in (reader, *PROMPTS)]
    if not chosen:
        raise DsskError(f"--num_contexts: want some of {','.join((reader, *PROMPTS))} among --systems")
    return [
        system for name in chosen for system in ([name] if name == reader else [name, f"{name}{SHUFFLED}"])
    ]


def scored(system: System, predictions: Sequence[Prediction], number: int) -> dict[str, Any]:
    """The scores with so many contexts, the right one among them and missing."""
    scores = score(predictions, by_number.names([number]))
    for control, row in scores.items():
        prompts = system.prompts(control) if isinstance(system, PromptedSystem) else []
        row["contexts_left_out"] = round(mean(prompt.left_out for prompt in prompts), 2) if prompts else 0.0
    if (right := f"{by_number.WITH}{number}") in scores:
        scores[right] |= by_number.beats(predictions, number)
    return scores


def costs(
    systems: Systems, names: Sequence[str], data: str, questions: QuestionSet, number: int
) -> dict[str, Row]:
    """The cost of an answer by each system with so many contexts, measured together unless that was done before.

    It is measured with the right context among them and in order: without it, or shuffled, as much is computed.
    """
    timed = [name for name in names if not name.endswith(SHUFFLED)]
    settings = {name: systems.settings(name, questions, number) for name in timed}
    file = systems.folder_of(number) / f"costs-{data}.json"
    kept = read_json(file, dict) if file.is_file() else {}
    if kept.get("settings") != settings:
        kept = {"settings": settings, "costs": _measure(systems, timed, questions, number)}
        files.write_json(file, kept)
    return {name: kept["costs"].get(name.removesuffix(SHUFFLED), {}) for name in names}


def _measure(systems: Systems, names: Sequence[str], questions: QuestionSet, number: int) -> dict[str, Row]:
    drawn = by_number.drawn(f"{by_number.WITH}{number}", questions, systems.distractors(questions))
    several = {row: read for row in by_number.timed(drawn) if (read := drawn[row])}
    if not several:
        return {}
    timed = {
        name: (_reading if name == systems.reader else _prompting)(systems, name, questions, several)
        for name in names
    }
    seconds = cost.measure({name: generate for name, (generate, _) in timed.items()}, list(several))
    return {name: {**seconds[name], "bytes": num_bytes} for name, (_, num_bytes) in timed.items()}


def _reading(systems: Systems, _: str, questions: QuestionSet, several: dict[int, tuple[int, ...]]) -> Timed:
    """From stored states, projected for every answer; the bytes of the states."""
    assert questions.pool is not None
    model = systems.fused
    states = {row: questions.pool.states(model, read) for row, read in several.items()}
    asked = {
        row: tokenize_question(systems.tokenizer, questions.rows[row].question, model.config.reader)
        for row in several
    }

    def generate(row: int, clock: BaseStreamer) -> None:
        with torch.no_grad():
            context = contexts_together(model, [states[row]])
        cost.stream(model, asked[row], clock, **context)

    tokens = mean(sum(map(len, read)) for read in states.values())
    return generate, round(tokens * questions.bytes_per_context_token)


def _prompting(
    systems: Systems, name: str, questions: QuestionSet, several: dict[int, tuple[int, ...]]
) -> Timed:
    """From the whole prompt; the bytes of the contexts' KV cache."""
    assert questions.pool is not None
    model, text = systems.model(name), questions.pool.text
    before = few_shot(systems.tokenizer, systems.examples) if name == "prompted_examples" else []
    positions = window(model.config) - len(before)
    prompts = {
        row: make_prompt(
            systems.tokenizer, questions.rows[row], positions, cost.NEW_TOKENS, [text(n) for n in read]
        )
        for row, read in several.items()
    }
    tokens = mean(len(prompt.context) for prompt in prompts.values())

    def generate(row: int, clock: BaseStreamer) -> None:
        cost.stream(model, [*before, *prompts[row].tokens], clock)

    return generate, round(tokens * cache_bytes_per_token(model))


def rows(
    name: str, data: str, number: int, scores: dict[str, Any], costs: Row, settings: dict[str, Any]
) -> list[Row]:
    """A system's rows of table.json for one set of questions and one number of contexts."""
    return [
        {
            "system": name,
            "data": data,
            "num_contexts": number,
            "gold": control.startswith(by_number.WITH),
            **{key: value for key, value in row.items() if not key.startswith("by_")},
            **costs,
            "settings": settings,
        }
        for control, row in scores.items()
    ]


def render(table: Sequence[Row]) -> str:
    """These rows as text for a terminal."""
    head = f"{'contexts read together':36}{'EM':>7}{'95 %':>15}{'F1':>7}{'NLL':>7}{'left out':>9}"
    lines, part = [f"{head}{'bytes':>14}{'first s':>10}{'tok/s':>8}"], None
    for row in table:
        if part != (part := (row["data"], row["num_contexts"], row["gold"])):
            which = "the right one among them" if row["gold"] else "the right one missing"
            lines.append(f"{row['data']}, {row['num_contexts']}, {which}, {row['n']} questions")
        lines.append(
            f"  {row['system']:34}{row['em']:7.3f}{row['em_low']:8.3f}..{row['em_high']:.3f}{row['f1']:7.3f}"
            f"{row['answer_nll']:7.2f}{row['contexts_left_out']:9.1f}{row['bytes']:14,}{row['first_token_s']:10.4f}"
            f"{row['tokens_per_s']:8.1f}"
        )
    return "\n".join(lines)
