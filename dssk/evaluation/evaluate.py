"""Scoring a checkpoint on the questions of a data set.

Each question is answered under several controls: a gain that comes from the context shows under `with_context` only. An
interrupted evaluation continues where it stopped; `torchrun` divides the work among processes.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from dssk.config import Source
from dssk.data.distractors import Distractors
from dssk.data.sources import Maker
from dssk.errors import DsskError
from dssk.evaluation import by_number
from dssk.evaluation.predictions import ByControl, answer_all, answer_trials, discard_partial
from dssk.evaluation.questions import (
    QuestionSet,
    check_encodings,
    load_questions,
    other_questions,
    other_rows,
)
from dssk.evaluation.scores import score, table
from dssk.inference.fingerprint import file_fingerprint
from dssk.inference.generation import context_batch, contexts_together, generate_batch, nll_batch
from dssk.inference.loading import FusedModel, device, find_model, load_model
from dssk.inference.tokenizer import template_version, tokenize_answer, tokenize_question
from dssk.run_folder import SCORES, model_step, predictions_of
from dssk.store.opening import load_manifest
from dssk.utils.defaults import BATCH_SIZE, CONTROLS, MAX_NEW_TOKENS
from dssk.utils.files import only_writer, remove_left, write_json
from dssk.utils.flags import nearest
from dssk.utils.ranks import Ranks, join


class Trial(NamedTuple):
    """One question under one control, by row numbers."""

    question: int  # whose question is asked; always scored against the row's own answers
    context: int | None  # whose context is attended to
    shuffled: bool = False  # the context's states in random order
    several: tuple[int, ...] = ()  # contexts that are attended to instead, by their numbers in the pool


class CrossAttentionSystem:
    """A fused model that answers questions from encoder states, under every control."""

    def __init__(
        self,
        model: FusedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: QuestionSet,
        controls: Sequence[str] = CONTROLS,
        max_new_tokens: int = MAX_NEW_TOKENS,
        distractors: Distractors | None = None,
    ):
        """`distractors` are drawn from for controls by number (`by_number.names`)."""
        self.model = model
        self.tokenizer = tokenizer
        self.questions = questions
        self.max_new_tokens = max_new_tokens
        self.trials: dict[str, Sequence[Trial | None]] = {
            control: trials(control, questions, distractors) for control in controls
        }

    def __call__(self, rows: list[int]) -> list[ByControl]:
        return answer_trials(self.trials, rows, self._answer)

    def _answer(self, rows: Sequence[int], chosen: Sequence[Trial]) -> list[tuple[str, float | None]]:
        asked = self.questions.rows
        prompted = [
            tokenize_question(self.tokenizer, asked[trial.question].question, self.model.config.reader)
            for trial in chosen
        ]
        targets = [tokenize_answer(self.tokenizer, asked[row].answers[0]) for row in rows]
        context = self._context(rows, chosen)  # projected once for both
        texts = generate_batch(self.model, self.tokenizer, prompted, self.max_new_tokens, **context)
        losses = nll_batch(self.model, self.tokenizer, prompted, targets, **context)
        return list(zip(texts, losses, strict=True))

    @torch.no_grad()
    def _context(self, rows: Sequence[int], chosen: Sequence[Trial]) -> dict[str, Any]:
        """The model's arguments for each row's context, each projected once; none where the trials have no context."""
        if chosen[0].several:
            return self._several(chosen)
        if chosen[0].context is None:
            return {}
        asked = self.questions.rows
        numbers: dict[tuple[str, int | None], int] = {}
        which = [
            numbers.setdefault(
                (asked[trial.context or 0].context, row if trial.shuffled else None), len(numbers)
            )
            for row, trial in zip(rows, chosen, strict=True)
        ]
        first = [which.index(number) for number in range(len(numbers))]
        states = self._states([rows[i] for i in first], [chosen[i] for i in first])
        return {"context": context_batch(self.model, states)["context"].of_rows(which)}

    def _several(self, chosen: Sequence[Trial]) -> dict[str, Any]:
        """The same for contexts that are read together."""
        pool, groups = self.questions.pool, [list(trial.several) for trial in chosen]
        assert pool is not None
        numbers = sorted({number for group in groups for number in group})
        states = dict(zip(numbers, pool.states(self.model, numbers), strict=True))
        return contexts_together(self.model, [[states[number] for number in group] for group in groups])

    def _states(self, rows: Sequence[int], chosen: Sequence[Trial]) -> list[torch.Tensor]:
        """The encoder states of each row's trial."""
        numbers = [trial.context for trial in chosen if trial.context is not None]
        states = self.questions.states(self.model, numbers)
        return [
            state[torch.from_numpy(np.random.default_rng(row).permutation(len(state)))]
            if trial.shuffled
            else state
            for row, trial, state in zip(rows, chosen, states, strict=True)
        ]


def trials(
    control: str, questions: QuestionSet, distractors: Distractors | None = None
) -> Sequence[Trial | None]:
    """The trial of each row under a control; None where the control does not apply."""
    rows = range(len(questions))
    if distractors and control not in CONTROLS:
        read = by_number.drawn(control, questions, distractors)
        return [
            None if several is None else Trial(row, None, several=several) for row, several in enumerate(read)
        ]
    contexts = [row.context for row in questions.rows]
    if control == "with_context":
        return [Trial(row, row) for row in rows]
    if control == "no_context":
        return [Trial(row, None) for row in rows]
    if control == "wrong_context":
        if len(set(contexts)) == 1:
            return [None for _ in rows]
        return [Trial(row, other) for row, other in enumerate(other_rows(contexts))]
    if control == "shuffled_tokens":
        return [Trial(row, row, shuffled=True) for row in rows]
    assert control == "other_question"
    others = other_questions(contexts, [row.question for row in questions.rows])
    return [None if other is None else Trial(other, row) for row, other in enumerate(others)]


def evaluate(
    model: FusedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: QuestionSet,
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
    controls: Sequence[str] = CONTROLS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    ranks: Ranks | None = None,
    numbers: Sequence[int] = (),
    mix: dict[Source, float] | None = None,
) -> dict[str, Any]:
    """Answer `questions` under the controls and score the answers; predictions go to `path`.

    Returns the content of scores.json (see `scores.score`). `settings` tell one checkpoint from another. `numbers` of
    contexts, drawn by `mix`, are controls on top.
    """
    controls = [*controls, *by_number.names(numbers)]
    distractors = by_number.distractors_of(questions, mix) if numbers and mix else None
    system = CrossAttentionSystem(model, tokenizer, questions, controls, max_new_tokens, distractors)
    settings = {**settings, "controls": controls, "max_new_tokens": max_new_tokens}
    if numbers:
        settings["distractors"] = mix
    settings["template_version"] = template_version(tokenizer)
    ranks = ranks or Ranks(0, 1, 0)
    predictions = answer_all(questions, system, path, settings, batch_size, ranks)
    if ranks.rank == 0:
        for line in left_out(system.trials):
            print(f"dssk: {line}", file=sys.stderr)
    scores = score(predictions, controls)
    for number in numbers:
        for name in by_number.names([number]):
            if name in scores and ranks.rank == 0:
                several = [trial.several if trial else None for trial in system.trials[name]]
                scores[name] |= by_number.cost(model, tokenizer, questions, several)
        if f"{by_number.WITH}{number}" in scores:
            scores[f"{by_number.WITH}{number}"] |= by_number.beats(predictions, number)
    return scores


def left_out(trials: dict[str, Sequence[Trial | None]]) -> list[str]:
    """A line for each control that does not apply to some of the questions."""
    why = {
        "other_question": "their context has no second question",
        "wrong_context": "there is no other context",
    }
    counts = {control: sum(trial is None for trial in of_rows) for control, of_rows in trials.items()}
    return [
        f"{control} leaves out {count} of {len(trials[control])} questions: "
        f"{why.get(control, 'there are not as many contexts')}"
        for control, count in counts.items()
        if count
    ]


def checkpoint_fingerprint(folder: Path) -> str:
    """A fingerprint of the weights in a folder; large files are sampled."""
    names = sorted(
        path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"
    )
    return xxhash.xxh3_128_hexdigest("".join(map(file_fingerprint, names)).encode())


def output_folder(checkpoint: str) -> Path:
    """Where scores go: the run's folder if `checkpoint` names a run, else the folder of the checkpoint itself."""
    folder = find_model(checkpoint)
    return folder if folder == Path(checkpoint) else folder.parent


def control_list(text: str) -> list[str]:
    """Parse the names of controls, divided by commas."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in CONTROLS:
            raise DsskError(
                f"no control {name!r}{nearest(name, CONTROLS)}: want some of {','.join(CONTROLS)}"
            )
    return [control for control in CONTROLS if control in names]


def evaluate_checkpoint(
    checkpoint: str,
    data_path: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    controls: str = ",".join(CONTROLS),
    max_questions: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    output: str | None = None,
    makers: Mapping[str, Maker] | None = None,
    num_contexts: str | None = None,
    distractors: str = "random",
) -> None:
    """Run `dssk evaluate`, as one process or as a rank of torchrun's; the arguments are its flags.

    The questions are those of the store `data_path`, or of the raw data `dataset`, which may be a name of `makers`.
    """
    chosen = control_list(controls)
    numbers = by_number.parse_numbers(num_contexts) if num_contexts else []
    mix = by_number.parse_sources(distractors)
    if data_path:
        load_manifest(data_path)  # before the model: another folder is refused at once
    folder = find_model(checkpoint)
    file = Path(output) if output else output_folder(checkpoint) / SCORES
    predictions = predictions_of(file)
    with join() as ranks, ranks.first_holds(only_writer(predictions)):
        model, tokenizer = load_model(folder, device=device(ranks.local_rank))
        source = data_path or dataset or ""
        check_encodings(source, folder)
        questions = load_questions(
            source, tokenizer, model.config, split, max_questions, makers, with_pool=bool(numbers)
        )
        settings = {"checkpoint": checkpoint_fingerprint(folder)}
        scores = evaluate(
            model,
            tokenizer,
            questions,
            predictions,
            settings,
            batch_size,
            chosen,
            max_new_tokens,
            ranks,
            numbers,
            mix,
        )
        if (step := model_step(folder)) is not None:
            scores["step"] = step
        if ranks.rank == 0:
            remove_left(file)
            write_json(file, scores)
            discard_partial(predictions)
            print(f"{table(scores)}\n{file}")
