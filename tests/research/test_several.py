"""Comparing by the number of contexts that a question reads."""

import json

import pytest

import dssk
from dssk.errors import DsskError
from dssk.inference.tokenizer import load_tokenizer
from dssk.research import compare, cost
from tests.conftest import question_rows

FEW = ("--systems", "cross_attention,prompted", "--controls", "with_context")
SYSTEMS = ["cross_attention", "prompted", "prompted_shuffled"]


@pytest.fixture
def answered(monkeypatch):
    """What was answered by which system on which questions, by folder and file."""
    seen = {}
    original = compare.answer_all

    def watching(questions, system, path, *args):
        seen[path.parent.name, path.stem.removeprefix("predictions-val-")] = system, questions
        return original(questions, system, path, *args)

    monkeypatch.setattr(compare, "answer_all", watching)
    return seen


def by_place(table):
    rows = {(row["system"], row.get("num_contexts"), row.get("gold")): row for row in table}
    assert len(rows) == len(table)
    return rows


def test_all_systems_read_the_same_contexts_and_say_what_they_cost(run_compare, answered, capsys):
    rows = by_place(run_compare(*FEW, "--num_contexts", "5,1"))
    assert [key for key in rows if key[1]] == [
        (system, number, gold) for number in (1, 5) for gold in (True, False) for system in SYSTEMS
    ]
    tokenizer = None
    for (system, number, gold), row in rows.items():
        if number is None:
            continue
        assert row["data"] == "val"
        assert 0 < row["n"] <= 6
        assert row["em_low"] <= row["em"] <= row["em_high"]
        assert row["f1_low"] <= row["f1"] <= row["f1_high"]
        assert row["answer_nll"] > 0
        # Measured once for what computes as much.
        same = rows[system.removesuffix("_shuffled"), number, True]
        for column in ("first_token_s", "tokens_per_s", "bytes"):
            assert row[column] == same[column] > 0
        if system == "cross_attention" or number == 1:
            assert row["contexts_left_out"] == 0
        else:
            assert 0 < row["contexts_left_out"] < 2
        assert ("right_beats_wrong" in row) == gold
    for column in ("em", "f1", "answer_nll"):
        for system in SYSTEMS:
            alone = rows[system.removesuffix("_shuffled"), None, None]
            assert rows[system, 1, True][column] == pytest.approx(alone[column], abs=1e-3)
        assert rows["prompted", 1, False][column] == rows["prompted_shuffled", 1, False][column]
    assert rows["prompted", 5, True]["answer_nll"] != rows["prompted_shuffled", 5, True]["answer_nll"]

    fused, questions = answered["contexts_5", "cross_attention"]
    prompted, shuffled = (answered["contexts_5", system][0] for system in SYSTEMS[1:])
    tokenizer = prompted.tokenizer
    reordered = 0
    for control in ("contexts_5", "missing_5"):
        for row, trial in enumerate(fused.trials[control]):
            ours, other = prompted.trials[control][row], shuffled.trials[control][row]
            if trial is None:
                assert ours is other is None
                continue
            texts = [f"context: {questions.pool.text(number)}" for number in trial.several]
            read, moved = (tokenizer.decode(prompt.context).split(" \n ") for prompt in (ours, other))
            assert [text for text in texts if text in read] == read
            assert sorted(moved) == sorted(read)
            assert (f"context: {questions.rows[row].context}" in read) == (control == "contexts_5")
            reordered += moved != read
    assert reordered > 6
    said = capsys.readouterr().out
    assert "val, 5, the right one among them, 6 questions" in said
    assert "val, 1, the right one missing" in said

    # The states of five contexts of 43 tokens or so, 64 bytes each; a KV cache of 256 bytes each for those that fit.
    read = rows["cross_attention", 5, True]["bytes"]
    assert 4.5 < read / rows["cross_attention", 1, True]["bytes"] < 5.5
    one = rows["prompted", 1, True]["bytes"]
    assert one / rows["cross_attention", 1, True]["bytes"] == pytest.approx(256 / 64, abs=0.01)
    assert 3 < rows["prompted", 5, True]["bytes"] / one < 5


def test_what_is_finished_is_kept_and_another_number_costs_only_itself(run_compare, answered, monkeypatch):
    few = (*FEW, "--max_questions", 2)
    first = by_place(run_compare(*few, "--num_contexts", "2"))
    assert {folder for folder, _ in answered} == {"out", "contexts_2"}
    answered.clear()
    measured = []
    original = cost.measure
    monkeypatch.setattr(
        cost, "measure", lambda systems, asked: measured.append(list(systems)) or original(systems, asked)
    )
    again = by_place(run_compare(*few, "--num_contexts", "1,2"))
    assert sorted(answered) == [("contexts_1", "cross_attention"), ("contexts_1", "prompted")]
    assert measured == [SYSTEMS[:2]] * 2  # of one context as always, and of those that are new
    assert all(again[key] == row for key, row in first.items() if key[1] == 2)
    answered.clear()
    run_compare(
        "--systems", "prompted", "--max_questions", 2, "--num_contexts", "2", "--distractors", "neighbours"
    )
    assert sorted(answered) == [("contexts_2", system) for system in SYSTEMS[1:]]


def test_a_merged_reader_is_compared_on_raw_questions(run_compare, base_path, tmp_path):
    model = dssk.from_base(base_path, reader="merged", encode_layer=2)
    model.save_pretrained(tmp_path / "merged")
    load_tokenizer(base_path).save_pretrained(tmp_path / "merged")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in question_rows(12)))
    flags = ("--checkpoint", tmp_path / "merged", "--data_path", file)
    few = ("--systems", "merged,prompted", "--controls", "with_context")
    rows = by_place(run_compare(*flags, *few, "--num_contexts", "1,3", "--max_questions", 3))
    for column in ("em", "f1", "answer_nll"):
        one, alone = rows["merged", 1, True], rows["merged", None, None]
        assert one[column] == pytest.approx(alone[column], abs=1e-3)
    assert rows["merged", 3, True]["bytes"] > 2.5 * rows["merged", 1, True]["bytes"]


def test_worked_examples_stand_before_several_contexts(run_compare, answered):
    run_compare("--systems", "prompted_examples", "--num_contexts", "2", "--max_questions", 1)
    for name in ("prompted_examples", "prompted_examples_shuffled"):
        system, _ = answered["contexts_2", name]
        assert system.tokenizer.decode(system.prompts("contexts_2")[0].tokens).count(" \n answer:") == 3


def test_mistakes_are_named_before_anything_is_answered(run_compare, answered):
    for flags, message in (
        (("--num_contexts", "0,1"), "want numbers from 1"),
        (("--num_contexts", "2", "--systems", "lora_prompted"), "want some of cross_attention,prompted"),
        (("--num_contexts", "2", "--distractors", "nearby"), "want some of document,neighbours,random"),
        (("--num_contexts", "2", "--distractors", "document"), "do not say which contexts are of one"),
    ):
        with pytest.raises(DsskError, match=message):
            run_compare(*flags)
    assert not answered
