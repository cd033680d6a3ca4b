"""Benchmarks: several contexts, on a tiny base that stands for a real one; and that no plain row is left out."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_contexts, bench_train
from dssk.__main__ import main
from dssk.inference.tokenizer import load_tokenizer
from dssk.research import cost
from tests.conftest import REPOSITORY, fused, question_rows

PLAIN = {  # what a row that flatters must stand beside, wherever it is quoted
    "encode_vs_row_order": "encode_equal_lengths",
    "read_vs_nested": "read_and_tokenize_vs_nested",
}


class Rows:
    """The rows that a benchmark adds to its results, in the place of its file."""

    def __init__(self, *args: Any):
        self.rows: list[dict[str, Any]] = []

    def add(self, row: str, ours: float, reference: float, ratio: float, unit: str, **settings: Any) -> None:
        self.rows.append({"row": row, "ours": ours, "reference": reference, "unit": unit, **settings})

    def write(self) -> None:
        pass


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark's module, as its command finds it: beside the others."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    yield import_module
    for name in ("common", "original", "bench_model", "bench_data"):
        sys.modules.pop(name, None)


def test_training_is_measured_with_every_label_as_with_those_of_an_answer(benchmark, monkeypatch):
    bench = benchmark("bench_model")
    measured = []
    monkeypatch.setattr(bench, "Results", Rows)
    monkeypatch.setattr(bench, "random_base", lambda *args: None)
    monkeypatch.setattr(
        bench,
        "bench_training",
        lambda results, folder, layout, labels, rounds: measured.append((layout, labels)),
    )
    monkeypatch.setattr(sys, "argv", ["bench_model.py", "--only", "training"])
    bench.main()
    for layout in ("small", "medium", "small_llama"):
        assert {(layout, bench.TRAIN_TOKENS), (layout, 16)} <= set(measured)
    assert {layout for layout, _ in measured} == set(bench.TRAINING)


@pytest.mark.parametrize("labels", [64, 16])
def test_so_many_tokens_of_each_row_have_a_label(benchmark, base, labels):
    batch = benchmark("bench_model").training_batch(base, labels)
    assert (batch["labels"] != -100).sum(1).tolist() == [labels] * 4


def test_encoding_is_measured_without_padding_to_save_and_reading_with_its_tokenizing(
    benchmark, monkeypatch, tmp_path
):
    bench = benchmark("bench_data")
    sizes = {"NUM_ENCODED": 8, "NUM_EQUAL": 4, "NUM_READ": 4, "MEDIAN_TOKENS": 6, "ROUNDS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    words, tokenized, results = bench.WORDS, [], Rows()
    tokenize = bench.tokenize_question
    monkeypatch.setattr(
        bench, "tokenize_question", lambda *args: tokenized.append(len(results.rows)) or tokenize(*args)
    )
    bench.make_tokenizer([" ".join(words)], 600).save_pretrained(bench.random_base("SMALL", tmp_path))
    drawn, encoded = [], bench.encoding_rates
    monkeypatch.setattr(
        bench, "encoding_rates", lambda *args: drawn.append({*map(int, args[1])}) or encoded(*args)
    )
    bench.bench_encoding(results, tmp_path)
    bench.bench_reading(results, tmp_path)
    names = [row["row"] for row in results.rows]
    assert set(names) >= {*PLAIN, *PLAIN.values()}
    ragged, equal = drawn
    assert len(ragged) > len(equal) == 1
    assert set(tokenized) == {names.index("read_and_tokenize_vs_nested")}


def test_what_training_costs_refers_to_nothing_from_another_run():
    run = {"training": 9.0, "data": 1.0, "saving": 0.5, "steps": 10, "saves": 5, "checkpoint_bytes": 7,
           "original_checkpoint_bytes": 31, "tokens_per_second": 11.0, "peak_mb": 13.0}  # fmt: skip
    for size in bench_train.RUNS:
        results = Rows()
        bench_train.add_rows(results, size, run)
        for row in results.rows:
            measured = row["reference"] in (row["ours"], run["original_checkpoint_bytes"])
            assert measured or row["unit"].endswith("limit"), row


def results(name: str) -> list[dict[str, Any]]:
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_results_show_plain_rows_both_numbers_of_labels_and_no_reference_of_another_run():
    assert {*PLAIN, *PLAIN.values()} <= {row["row"] for row in results("data")}
    labels: dict[str, set[int]] = {}
    for row in results("model"):
        if row["row"].startswith("train_step_"):
            labels.setdefault(row["settings"]["layout"], set()).add(row["settings"]["labels"])
    assert [labels[layout] for layout in ("small", "medium", "small_llama")] == [{64, 16}] * 3
    for row in results("train"):
        measured = row["reference"] == row["ours"] or row["row"] == "checkpoint_bytes_medium"
        assert measured or row["unit"].endswith("limit"), row


@pytest.mark.parametrize(
    "file", sorted(REPOSITORY.glob("docs/*.md")) + [REPOSITORY / "README.md"], ids=lambda f: f.name
)
def test_a_document_that_names_a_row_that_flatters_names_the_plain_one(file: Path):
    text = file.read_text()
    for flattering, plain in PLAIN.items():
        assert (f"`{flattering}`" in text) <= (f"`{plain}`" in text)


def test_rows_of_a_real_base_stand_beside_the_toys(base_path, tmp_path, monkeypatch):
    rows = [{**row, "title": "even" if i % 4 < 2 else "odd"} for i, row in enumerate(question_rows(16))]
    for name, chosen in (("passages", rows), ("questions", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    fused(base_path).save_pretrained(tmp_path / "fused")
    load_tokenizer(base_path).save_pretrained(tmp_path / "fused")
    results = tmp_path / "contexts.json"
    toy = {"set": "toy", "seed": 0, "em": 0.5}
    same = {"set": "squad", "seed": 0, "system": "prompted", "num_contexts": 3}
    others = [{**same, "seed": 1}, {**same, "num_contexts": 5}, {**same, "system": "prefix_cache"}]
    results.write_text(json.dumps([{**same, "em": 0}, toy, *others]))
    monkeypatch.setattr(bench_contexts, "RESULTS", results)
    monkeypatch.setattr(bench_contexts, "dssk", lambda *words: main([*map(str, words)]))
    monkeypatch.setattr(cost, "NEW_TOKENS", 3)
    monkeypatch.setattr("dssk.evaluation.scores.DRAWS", 50)
    flags = ["--checkpoint", "fused", "--questions", "questions.jsonl", "--passages", "passages.jsonl"]
    flags += ["--num_contexts", "3", "--output", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_contexts.py", *flags])
    bench_contexts.main()
    written = json.loads(results.read_text())
    kept, measured = written[:4], written[4:]
    assert kept == [toy, *others]
    columns = "set seed num_contexts gold n em em_low em_high f1 first_token_s tokens_per_s bytes system"
    for row in measured:
        assert set(row) >= {*columns.split(), "contexts_left_out"}
        assert (row["set"], row["seed"], row["n"]) == ("squad", 0, 4)
    systems = ("cross_attention", "prompted", "prompted_shuffled")
    assert [(row["num_contexts"], row["gold"], row["system"]) for row in measured] == [
        (3, gold, system) for gold in (True, False) for system in systems
    ]
