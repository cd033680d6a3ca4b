"""The benchmark of several contexts, on a tiny base that stands for a real one."""

import json
import sys

from benchmarks import bench_contexts
from dssk.__main__ import main
from dssk.inference.tokenizer import load_tokenizer
from dssk.research import cost
from tests.conftest import fused, question_rows


def test_rows_of_a_real_base_stand_beside_the_toys(base_path, tmp_path, monkeypatch):
    rows = [{**row, "title": "even" if i % 4 < 2 else "odd"} for i, row in enumerate(question_rows(16))]
    for name, chosen in (("passages", rows), ("questions", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    fused(base_path).save_pretrained(tmp_path / "fused")
    load_tokenizer(base_path).save_pretrained(tmp_path / "fused")
    results = tmp_path / "contexts.json"
    toy = {"set": "toy", "seed": 0, "em": 0.5}
    results.write_text(json.dumps([{"set": "squad", "seed": 0, "em": 0}, toy, {"set": "squad", "seed": 1}]))
    monkeypatch.setattr(bench_contexts, "RESULTS", results)
    monkeypatch.setattr(bench_contexts, "dssk", lambda *words: main([*map(str, words)]))
    monkeypatch.setattr(cost, "NEW_TOKENS", 3)
    monkeypatch.setattr("dssk.evaluation.scores.DRAWS", 50)
    flags = ["--checkpoint", "fused", "--questions", "questions.jsonl", "--passages", "passages.jsonl"]
    flags += ["--num_contexts", "3", "--output", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench_contexts.py", *flags])
    bench_contexts.main()
    kept, other, *measured = json.loads(results.read_text())
    assert (kept, other) == (toy, {"set": "squad", "seed": 1})
    columns = "set seed num_contexts gold n em em_low em_high f1 first_token_s tokens_per_s bytes system"
    for row in measured:
        assert set(row) >= {*columns.split(), "contexts_left_out"}
        assert (row["set"], row["seed"], row["n"]) == ("squad", 0, 4)
    systems = ("cross_attention", "prompted", "prompted_shuffled")
    assert [(row["num_contexts"], row["gold"], row["system"]) for row in measured] == [
        (3, gold, system) for gold in (True, False) for system in systems
    ]
