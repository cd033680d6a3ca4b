"""Score a checkpoint on the questions of a prepared data set: `python -m dssk.evaluation.evaluate --help`.

Each question is answered three times: with its own context, with none, and with another row's context. A gain
that comes from the context shows in the first and not in the others.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np
import torch

from dssk.checkpoint import find_model, load_model
from dssk.console import quiet_libraries
from dssk.data.store import load_rows
from dssk.errors import DsskError, run
from dssk.evaluation.generate import MAX_NEW_TOKENS, Contexts, answer_nll, generate_answers
from dssk.evaluation.metrics import answer_class, exact_match, f1
from dssk.files import publish_json, publish_text
from dssk.flags import Parser, positive_int

CONTROLS = ("with_context", "no_context", "wrong_context")


def evaluate(model, tokenizer, rows: datasets.Dataset, batch_size: int, max_new_tokens: int = MAX_NEW_TOKENS):
    """Answer `rows` under every control.

    Returns the scores, `{control: {em, f1, n, span_em, answer_nll}, right_beats_wrong}` with `em`, `f1` and shares
    from 0 to 1 and `answer_nll` in nats a token, and one dict a question with its predictions.
    """
    texts = rows.select_columns(["id", "context", "question", "answer", "answers"]).to_list()
    questions = [t["question"] for t in texts]
    golds = [t["answers"] or [t["answer"]] for t in texts]
    wrong = other_rows([t["context"] for t in texts])
    contexts: dict[str, Contexts] = {
        "with_context": lambda i: rows[i]["encoder_hidden_states"],
        "no_context": lambda i: None,
        "wrong_context": lambda i: rows[wrong[i]]["encoder_hidden_states"],
    }
    scores: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = [
        {"id": t["id"], "question": q, "answers": g} for t, q, g in zip(texts, questions, golds, strict=True)
    ]
    nll: dict[str, list[float]] = {}
    spans = [answer_class(t["answer"]) == "span" for t in texts]
    for control in CONTROLS:
        answers = generate_answers(model, tokenizer, questions, contexts[control], batch_size, max_new_tokens)
        firsts = [t["answer"] for t in texts]
        nll[control] = answer_nll(model, tokenizer, questions, firsts, contexts[control], batch_size)
        scores[control] = _scores(answers, golds, spans, nll[control])
        for prediction, answer, loss in zip(predictions, answers, nll[control], strict=True):
            prediction[control] = {"prediction": answer, "answer_nll": round(loss, 4)}
    beats = [right < other for right, other in zip(nll["with_context"], nll["wrong_context"], strict=True)]
    scores["right_beats_wrong"] = round(mean(beats), 4)
    return scores, predictions


def _scores(
    answers: Sequence[str], golds: Sequence[Sequence[str]], spans: Sequence[bool], nll: Sequence[float]
) -> dict[str, Any]:
    matches = [exact_match(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
    on_spans = [match for match, span in zip(matches, spans, strict=True) if span]
    return {
        "em": round(mean(matches), 4),
        "f1": round(mean(f1(answer, gold) for answer, gold in zip(answers, golds, strict=True)), 4),
        "n": len(answers),
        "span_em": round(mean(on_spans), 4) if on_spans else None,
        "answer_nll": round(mean(nll), 4),
    }


def other_rows(contexts: Sequence[str]) -> list[int]:
    """For each row the nearest following row (cyclically) with another context.

    Raises `DsskError` if all contexts are the same: then there is no wrong context to give.
    """
    if len(set(contexts)) < 2:
        raise DsskError("all questions share one context: wrong_context needs at least two")
    count = len(contexts)
    return [
        next(j % count for j in range(i + 1, i + count) if contexts[j % count] != contexts[i])
        for i in range(count)
    ]


def sample(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most `limit` rows, spread evenly: the same ones every time."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, limit).round().astype(int).tolist())


def table(scores: dict[str, Any]) -> str:
    """The scores as a small table for a terminal."""
    lines = [f"{'':14} {'EM':>7} {'F1':>7} {'span EM':>8} {'answer NLL':>11} {'n':>6}"]
    for control in CONTROLS:
        row = scores[control]
        span = "-" if row["span_em"] is None else f"{row['span_em']:.3f}"
        lines.append(
            f"{control:14} {row['em']:7.3f} {row['f1']:7.3f} {span:>8} {row['answer_nll']:11.3f} {row['n']:6}"
        )
    return "\n".join(
        [*lines, f"gold answer likelier with its own context: {scores['right_beats_wrong']:.1%}"]
    )


def main() -> None:
    parser = Parser(prog="python -m dssk.evaluation.evaluate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint, fused model, or a run's folder")
    parser.add_argument("--data_path", required=True, help="folder made by dssk/data/preproc_nq.py")
    parser.add_argument("--split", default="val", help="split to score (%(default)s)")
    parser.add_argument(
        "--max_questions", type=positive_int, help="score this many questions, spread over the split"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=32, help="questions at a time (%(default)s)"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=MAX_NEW_TOKENS,
        help="longest answer, in tokens (%(default)s)",
    )
    parser.add_argument(
        "--output", help="where scores go; predictions lie beside (scores.json in the checkpoint)"
    )
    args = parser.parse_args()
    quiet_libraries()

    folder = find_model(args.checkpoint)
    rows = load_rows(args.data_path)
    if args.split not in rows:
        raise DsskError(f"{args.data_path} has no split {args.split}, it has {', '.join(rows)}")
    model, tokenizer = load_model(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    scores, predictions = evaluate(
        model, tokenizer, sample(rows[args.split], args.max_questions), args.batch_size, args.max_new_tokens
    )
    output = Path(args.output) if args.output else folder / "scores.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    publish_text(output.with_name("predictions.jsonl"), lines)
    publish_json(output, scores)
    print(f"{table(scores)}\n{output}")


if __name__ == "__main__":
    sys.exit(run(main))
