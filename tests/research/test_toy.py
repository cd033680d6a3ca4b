from collections import Counter

import numpy as np
import pytest

from dssk import prompts
from dssk.data.readers import RawRow
from dssk.data.schemas import to_qa
from dssk.errors import DsskError
from dssk.research import toy


@pytest.fixture(scope="module")
def rows():
    return toy.generate("train", 2000, seed=0)


def short_answers(row):
    return row["annotations"]["short_answers"][0]


def paragraph(row):
    long_answer = row["annotations"]["long_answer"][0]
    tokens = row["document"]["tokens"]["token"]
    return " ".join(tokens[long_answer["start_token"] + 1 : long_answer["end_token"] - 1])


def is_unanswerable(row):
    return not short_answers(row)["text"] and row["annotations"]["yes_no_answer"] == [-1]


def test_a_short_answer_is_what_its_tokens_and_bytes_say(rows):
    for row in rows:
        tokens, html = row["document"]["tokens"]["token"], row["document"]["html"].encode()
        found = short_answers(row)
        for text, start, end, start_byte, end_byte in zip(
            found["text"],
            found["start_token"],
            found["end_token"],
            found["start_byte"],
            found["end_byte"],
            strict=True,
        ):
            assert " ".join(tokens[start:end]) == text
            assert html[start_byte:end_byte].decode() == text


def test_the_long_answer_is_the_candidate_it_names_and_a_whole_p_element(rows):
    for row in rows:
        tokens = row["document"]["tokens"]
        (long_answer,) = row["annotations"]["long_answer"]
        candidates = row["long_answer_candidates"]
        assert candidates["start_token"][long_answer["candidate_index"]] == long_answer["start_token"]
        assert tokens["token"][long_answer["start_token"]] == "<P>"
        assert tokens["token"][long_answer["end_token"] - 1] == "</P>"
        assert tokens["is_html"] == [token.startswith("<") for token in tokens["token"]]


def test_rows_read_as_natural_questions_do(rows):
    kinds = Counter()
    for row in rows:
        qa = to_qa(RawRow("toy", row))
        assert qa.context == paragraph(row)
        assert qa.question == " ".join(row["question"]["tokens"])
        kind = "none" if is_unanswerable(row) else "span" if short_answers(row)["text"] else "yes or no"
        kinds[kind] += 1
        if kind == "span":
            assert qa.answers == short_answers(row)["text"]
            assert qa.answers[0] in qa.context
        elif kind == "none":
            assert qa.answers == [prompts.NOT_IN_CONTEXT]
        else:
            assert qa.answers[0] in (prompts.YES, prompts.NO)
    shares = {kind: count / len(rows) for kind, count in kinds.items()}
    assert 0.84 < shares["span"] < 0.90
    assert 0.08 < shares["none"] < 0.12
    assert 0.02 < shares["yes or no"] <= 0.05


def test_train_and_val_share_no_paragraph_and_no_subject_whatever_the_seeds():
    train = [row for seed in range(3) for row in toy.generate("train", 2000, seed)]
    val = [row for seed in range(3) for row in toy.generate("val", 500, seed)]
    assert not {paragraph(row) for row in train} & {paragraph(row) for row in val}
    assert not {row["document"]["title"] for row in train} & {row["document"]["title"] for row in val}
    val_names = {row["document"]["title"] for row in val}
    for _, questions, _ in toy.pages(1000, seed=0):
        for question, answer in questions:
            if answer not in (prompts.YES, prompts.NO):  # those name a value too, which may be anything
                assert not any(name in question for name in val_names)


def test_val_names_are_made_of_words_that_train_names_are_made_of():
    words = {
        split: {word for row in toy.generate(split, 2000, 0) for word in row["document"]["title"].split()}
        for split in toy.SPLITS
    }
    assert words["val"] == words["train"]


def test_a_row_depends_on_split_seed_and_index_alone():
    assert toy.generate("train", 30, seed=1)[:10] == toy.generate("train", 10, seed=1)
    first, second = (toy.generate("train", 10, seed) for seed in (1, 2))
    assert not {paragraph(row) for row in first} & {paragraph(row) for row in second}
    assert (
        len({row["id"] for s in toy.SPLITS for row in toy.generate(s, 10, 1) + toy.generate(s, 10, 2)}) == 40
    )


def test_no_answer_is_frequent_enough_to_be_guessed(rows):
    spans = Counter(text for row in rows for text in short_answers(row)["text"])
    assert spans.most_common(1)[0][1] / spans.total() < 0.02


def test_unanswerable_questions_ask_for_what_the_paragraph_does_not_tell():
    rng = np.random.default_rng(0)
    unanswerable = 0
    for _ in range(2000):
        text = toy.make_paragraph("train", rng)
        question = toy.make_question(text, rng)
        told = {asked.format(n=text.name) for fact in text.facts for asked in fact.relation.questions}
        if question.answer == prompts.NOT_IN_CONTEXT:
            unanswerable += 1
            assert question.text not in told
        elif question.fact is not None:
            assert question.text in told
    assert unanswerable


def test_a_yes_or_no_question_is_answered_by_the_paragraph():
    rng = np.random.default_rng(0)
    answers = Counter()
    for _ in range(3000):
        text = toy.make_paragraph("train", rng)
        question = toy.make_question(text, rng)
        if question.yes_no >= 0:
            told = {fact.relation.yes_no.format(n=text.name, v=fact.value) for fact in text.facts}
            assert question.answer == (prompts.YES if question.text in told else prompts.NO)
            answers[question.answer] += 1
    assert min(answers[prompts.YES], answers[prompts.NO]) > 30


def test_pages_hold_the_answers_to_their_questions():
    for text, questions, name in toy.pages(200, seed=0):
        assert len(questions) == 4
        assert name in text
        for _, answer in questions:
            assert answer in text or answer in (prompts.YES, prompts.NO, prompts.NOT_IN_CONTEXT)


def test_an_unknown_split_is_refused():
    with pytest.raises(DsskError, match="no split 'test' in the toy data, want one of train, val"):
        toy.generate("test", 1, seed=0)


def test_both_splits_are_those_that_are_made_at_once():
    made = {split: list(rows) for split, rows in toy.splits(30, seed=1).items()}
    assert made == {split: toy.generate(split, 30, seed=1) for split in toy.SPLITS}
