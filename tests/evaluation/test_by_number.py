"""Evaluation by number of contexts."""

import json

import pytest

from dssk.errors import DsskError
from dssk.evaluation import by_number
from dssk.evaluation.evaluate import CrossAttentionSystem, evaluate
from dssk.evaluation.questions import load_questions
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import fused, question_rows

RANDOM = {"random": 1.0}


@pytest.fixture(scope="module")
def loaded(base_path):
    return fused(base_path), load_tokenizer(base_path)


@pytest.fixture(scope="module")
def questions(loaded, store_path):
    model, tokenizer = loaded
    return load_questions(str(store_path), tokenizer, model.config, with_pool=True)


def drawn(control, questions, mix):
    return by_number.drawn(control, questions, by_number.distractors_of(questions, mix))


def test_the_right_context_stands_at_a_random_place_among_distinct_others(questions):
    rows = drawn("contexts_4", questions, RANDOM)
    places = set()
    for row, read in enumerate(rows):
        own = questions.pool.of_row[row]
        assert questions.pool.text(own) == questions.rows[row].context
        assert len(set(read)) == 4
        assert own in read
        places.add(read.index(own))
    assert len(places) > 1
    assert rows == drawn("contexts_4", questions, RANDOM)
    assert {len(read) for read in drawn("contexts_1", questions, RANDOM)} == {1}


def test_without_the_right_context_no_other_says_the_answer(questions):
    for row, read in enumerate(drawn("missing_3", questions, RANDOM)):
        texts = [questions.pool.text(number) for number in read]
        assert len(set(texts)) == 3
        assert questions.rows[row].context not in texts
        assert not any(questions.rows[row].answers[0] in text for text in texts)
    assert set(drawn("missing_40", questions, RANDOM)) == {None}  # val has six contexts


def test_the_answer_without_the_right_context_is_that_there_is_none(questions):
    assert by_number.golds("missing_2", ["1842"]) == ["Answer not in context."]
    assert by_number.golds("contexts_2", ["1842"]) == by_number.golds("with_context", ["1842"]) == ["1842"]


def test_one_context_of_several_is_that_context(loaded, questions):
    model, tokenizer = loaded
    controls = ["with_context", "contexts_1", "contexts_3"]
    distractors = by_number.distractors_of(questions, RANDOM)
    system = CrossAttentionSystem(model, tokenizer, questions, controls, 6, distractors)
    for answer in system(list(range(len(questions)))):
        assert answer["contexts_1"][0] == answer["with_context"][0]
        assert answer["contexts_1"][1] == pytest.approx(answer["with_context"][1], abs=1e-4)
        assert answer["contexts_3"][1] != pytest.approx(answer["with_context"][1], abs=1e-4)


def test_scores_and_costs_of_each_number_become_rows(loaded, questions, tmp_path):
    model, tokenizer = loaded
    scores = evaluate(
        model,
        tokenizer,
        questions,
        tmp_path / "p.jsonl",
        {},
        8,
        ["with_context"],
        4,
        numbers=[1, 3],
        mix=RANDOM,
    )
    rows = by_number.rows(scores, "mills", 7)
    assert [(row["num_contexts"], row["gold"]) for row in rows] == [
        (1, True),
        (1, False),
        (3, True),
        (3, False),
    ]
    for row in rows:
        assert row["set"] == "mills"
        assert row["seed"] == 7
        assert row["n"] == len(questions)
        assert 0 <= row["em_low"] <= row["em"] <= row["em_high"] <= 1
        assert row["first_token_s"] > 0
        assert row["tokens_per_s"] > 0
    assert rows[2]["bytes"] > 2.5 * rows[0]["bytes"]
    assert 0 <= rows[0]["right_beats_wrong"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert set(lines[0]) >= {"with_context", "contexts_3", "missing_3"}


def test_raw_questions_have_their_documents_for_distractors(loaded, tmp_path):
    model, tokenizer = loaded
    file = tmp_path / "rows.jsonl"
    rows = [{**row, "title": "even" if i % 4 < 2 else "odd"} for i, row in enumerate(question_rows(16))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = load_questions(str(file), tokenizer, model.config, limit=3, with_pool=True)
    assert len(questions) == 3
    for read in drawn("contexts_3", questions, {"document": 1.0}):
        assert len({questions.pool.titles[number] for number in read}) == 1
    states = questions.pool.states(model, [0, 5])
    assert [s.shape[1] for s in states] == [32, 32]


def test_numbers_and_sources_that_make_no_sense_are_refused():
    assert by_number.parse_numbers("5,1,2") == [1, 2, 5]
    for text in ("0,1", "two", ""):
        with pytest.raises(DsskError, match="want numbers from 1"):
            by_number.parse_numbers(text)
    assert by_number.parse_sources("document,random") == {"document": 1.0, "random": 1.0}
    with pytest.raises(DsskError, match="want some of document,neighbours,random"):
        by_number.parse_sources("nearby")
