"""A run with everything a report can show, made by hand around a tiny model."""

import json

import pytest

from dssk.commands.report import main
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import experiment, fused, make_base

CONTROLS = ("with_context", "no_context", "wrong_context")


def score(em: float, n: int = 8) -> dict:
    interval = {"em_low": max(em - 0.05, 0), "em_high": em + 0.05, "f1_low": em, "f1_high": em + 0.1}
    bins = [
        {
            "low": low,
            "high": low + 64,
            "n": n // 2,
            "em": em,
            "em_low": max(em - 0.1, 0),
            "em_high": em + 0.1,
            "f1": em,
        }
        for low in (0, 64)
    ]
    classes = {cls: {"n": n // 2, "em": em, "f1": em} for cls in ("span", "unanswerable")}
    totals = {"n": n, "em": em, "f1": em + 0.05, "rouge_l": em, "span_em": em, "answer_nll": 0.5}
    return {**totals, **interval, "by_class": classes, "by_context_tokens": bins}


def row(i: int, context: str, question: str, answers: list[str], prediction: str) -> dict:
    cell = {"em": 0.0, "f1": 0.0, "rouge_l": 0.0, "answer_nll": 0.5}
    return {
        "id": f"q{i}",
        "question": question,
        "context": context,
        "answers": answers,
        "answer_class": "span",
        "context_tokens": len(f"context: {context}".encode()),
        "with_context": {"prediction": prediction, **cell},
        "no_context": {"prediction": f"guess {i}", **cell},
    }


def write(folder, name: str, value) -> None:
    (folder / name).write_text(json.dumps(value))


def write_lines(folder, name: str, values: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="session")
def narrow_base(tmp_path_factory):
    """So small that it reads 10,000 tokens within a second."""
    return make_base(tmp_path_factory.mktemp("narrow"), n_positions=10_500, n_embd=8, n_layer=2, n_head=2)


def make_run(folder, base, predictions: list[dict]):
    """A run's folder with a model, metrics, scores and `predictions`, and a comparison in `compare` below it."""
    folder.mkdir()
    write(folder, "exp_dict.json", experiment(base))
    fused(base, cross_attn_layers_stride=1).save_pretrained(folder / "final")
    load_tokenizer(base).save_pretrained(folder / "final")
    metrics = [{"step": s, "loss": 2 / s, "eval_loss": 2.1 / s, "eval_f1": 1 - 1 / s} for s in (1, 2, 4)]
    write_lines(folder, "metrics.jsonl", metrics)
    scores = {name: score(em) for name, em in zip(CONTROLS, (0.9, 0.1, 0.05), strict=True)}
    write(folder, "scores.json", {**scores, "right_beats_wrong": 0.97})
    write_lines(folder, "predictions.jsonl", predictions)
    compare = folder / "compare"
    compare.mkdir()
    times = {"cross_attention": 0.004, "prompted": 0.1, "heuristic/overlap": None}
    table = [
        {"system": system, "data": data, **score(0.8), "trained_parameters": 1000, "tokens_per_s": 50}
        | {"bytes_per_context_token": 16, "first_token_s": seconds}
        for data in ("one", "two")
        for system, seconds in times.items()
    ]
    write(compare, "table.json", table)
    write(compare, "cost.json", [table[0] | {"em": None, "f1": None, "first_token_s": 0.05}])
    return folder


@pytest.fixture(scope="session")
def run_folder(narrow_base, tmp_path_factory):
    """Eight questions, every second one answered rightly."""
    predictions = [
        row(
            i,
            f"Mill {i} was built in {1700 + i} by Ann.",
            f"when was mill {i} built",
            [str(1700 + i)],
            answer,
        )
        for i, answer in enumerate(["1700", "1600", "1702", "", "1704", "about 1705", "1706", "1000"])
    ]
    return make_run(tmp_path_factory.mktemp("runs") / "run", narrow_base, predictions)


@pytest.fixture(scope="session")
def report(run_folder):
    """The path of its page."""
    main([str(run_folder), "--compare", str(run_folder / "compare")])
    return run_folder / "report.html"
