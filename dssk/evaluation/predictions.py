"""Answering a set of questions, batch by batch, so that a run that was killed goes on where it stopped.

Finished batches are appended to predictions.partial.jsonl; its first line says what is being answered, by what and
how. Each line begins with its checksum: one that was torn or altered is left out, and its question answered again.
Batches depend on the questions alone, so it changes nothing where a run was interrupted or how many processes share
the work.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from tqdm import tqdm

from dssk.errors import EnvironmentFault
from dssk.evaluation.by_number import golds
from dssk.evaluation.metrics import answer_class, exact_match, f1, rouge_l
from dssk.evaluation.questions import QuestionSet
from dssk.evaluation.scores import Prediction
from dssk.inference.batching import length_batches
from dssk.inference.encoding import BATCH_TOKENS
from dssk.utils import files
from dssk.utils.ranks import Ranks

PARTIAL = "predictions.partial"

# control -> (prediction, negative log-likelihood of the first gold answer in nats a token, or None)
ByControl = dict[str, tuple[str, float | None]]
System = Callable[[list[int]], list[ByControl]]  # row numbers -> the answers to each
Trial = TypeVar("Trial")  # how a system is put one question under one control


def answer_all(
    questions: QuestionSet,
    system: System,
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
    ranks: Ranks,
) -> list[Prediction]:
    """The predictions of all questions in their order, on every rank; the first rank writes them to `path`.

    `settings` must tell everything that decides the answers: a partial file of others is discarded. Call
    `discard_partial` once the results are used.
    """
    batches = length_batches(questions.context_tokens, batch_size, BATCH_TOKENS)
    settings = {**settings, "questions": questions.fingerprint, "batch_size": batch_size}
    done = ranks.from_first(lambda: _resume(path, settings))
    if done and ranks.rank == 0:
        print(f"dssk: {len(done)} of {len(questions)} questions were answered before", file=sys.stderr)
    missing = [batch for batch in batches if not done.keys() >= set(batch)]
    mine = missing[ranks.rank :: ranks.size]
    count = sum(map(len, mine))
    with (
        files.machine_faults(path),
        open(_partial(path, ranks.rank), "a", encoding="utf-8") as file,
        tqdm(total=count, desc=path.stem, unit="question", disable=None if ranks.rank == 0 else True) as bar,
    ):
        if ranks.rank:
            file.write(_checked_line({"settings": settings}))
        for rows in mine:
            answers = system(rows)
            for row, answered in zip(rows, answers, strict=True):
                file.write(_checked_line({"row": row, **_prediction(questions, row, answered)}))
            file.flush()
            bar.update(len(rows))
    ranks.wait()
    return ranks.from_first(lambda: _finish(path, settings, len(questions)))


def answer_trials(
    trials: Mapping[str, Sequence[Trial | None]],
    rows: Sequence[int],
    answer: Callable[[Sequence[int], Sequence[Trial]], Sequence[tuple[str, float | None]]],
) -> list[ByControl]:
    """The answers to some rows under every control.

    `trials` holds, for each control, the trial of every row, or None where the control does not apply. `answer` takes
    row numbers and their trials under one control.
    """
    answers: list[ByControl] = [{} for _ in rows]
    for control, of_rows in trials.items():
        asked = [(i, row, trial) for i, row in enumerate(rows) if (trial := of_rows[row]) is not None]
        if asked:
            places, numbers, chosen = zip(*asked, strict=True)
            for i, answered in zip(places, answer(numbers, chosen), strict=True):
                answers[i][control] = answered
    return answers


def discard_partial(path: Path) -> None:
    """Remove what `answer_all` wrote besides `path`."""
    for partial in _partials(path):
        files.remove(partial)


def _prediction(questions: QuestionSet, row: int, answers: ByControl) -> Prediction:
    asked = questions.rows[row]
    scored = {
        control: {
            "prediction": text,
            "em": exact_match(text, golds(control, asked.answers)),
            "f1": round(f1(text, golds(control, asked.answers)), 4),
            "rouge_l": round(rouge_l(text, golds(control, asked.answers)), 4),
            "answer_nll": None if nll is None else round(nll, 4),
        }
        for control, (text, nll) in answers.items()
    }
    return {
        "id": asked.id,
        "question": asked.question,
        "context": asked.context,
        "answers": asked.answers,
        "answer_class": answer_class(asked.answers[0]),
        "context_tokens": questions.context_tokens[row],
        **scored,
    }


def _resume(path: Path, settings: dict[str, Any]) -> dict[int, Prediction]:
    """The predictions of earlier runs, collected in the first rank's file; removes the files of other ranks."""
    files.make_folder(path.parent)
    files.remove_left(path, _partial(path, 0))
    done = _read(path, settings)
    lines = [{"settings": settings}, *({"row": row, **prediction} for row, prediction in done.items())]
    files.write_text(_partial(path, 0), "".join(map(_checked_line, lines)))
    for partial in _partials(path):
        if partial != _partial(path, 0):
            files.remove(partial)
    return done


def _finish(path: Path, settings: dict[str, Any], count: int) -> list[Prediction]:
    done = _read(path, settings)
    if lost := count - len(done):
        raise EnvironmentFault(
            f"{lost} of {count} answers in {path.parent} are gone: they were removed while others were made; start "
            "the same command again"
        )
    predictions = [done[row] for row in range(count)]
    files.write_text(path, "".join(map(_line, predictions)))
    return predictions


def _read(path: Path, settings: dict[str, Any]) -> dict[int, Prediction]:
    """Predictions by row from all partial files with these settings, lines that are not whole left out."""
    done: dict[int, Prediction] = {}
    for partial in _partials(path):
        header, *rows = _whole_lines(partial) or [None]
        if header == {"settings": settings}:
            done |= {row.pop("row"): row for row in rows}
    return done


def _whole_lines(path: Path) -> list[Any]:
    pairs = (line.partition(b" ") for line in path.read_bytes().split(b"\n"))
    return [json.loads(text) for checksum, _, text in pairs if checksum == _checksum(text)]


def _partial(path: Path, rank: int) -> Path:
    name = path.name.replace("predictions", PARTIAL, 1)
    return path.with_name(name if rank == 0 else f"{name}.{rank}")


def _partials(path: Path) -> list[Path]:
    first = _partial(path, 0).name
    names = path.parent.glob("*")  # none where the folder itself was removed
    return sorted(p for p in names if p.name == first or p.name.startswith(f"{first}."))


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()


def _checked_line(value: Any) -> str:
    line = _line(value)
    return f"{_checksum(line[:-1].encode()).decode()} {line}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
