import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssk import prompts
from dssk.evaluation.metrics import answer_class, exact_match, f1, normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Amber Falls!", "amber falls"),
        ("an apple, a day", "apple day"),
        ("U.S.A.", "usa"),
        ("Theory of a thing", "theory of thing"),
        ("1,776", "1776"),
    ],
)
def test_normalization_is_squads(text, expected):
    assert normalize(text) == expected


def test_any_of_the_answers_counts():
    assert exact_match("the Nile", ["Amazon", "Nile."]) == 1
    assert exact_match("Nile river", ["Amazon", "Nile"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Ann Smith", ["Ann Jones"], 0.5),
        ("Ann", ["Ann Jones"], 2 / 3),
        ("x y", ["a b"], 0),
        ("the", ["an"], 1),
        ("", ["Ann"], 0),
        ("Ann Ann", ["Ann Jones"], 0.5),
        ("Ann Smith", ["zz", "Ann Smith Jones"], 0.8),
    ],
)
def test_f1_is_the_overlap_of_words(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected)


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_scores_lie_between_0_and_1_and_an_exact_match_has_full_f1(prediction, answers):
    assert 0 <= f1(prediction, answers) <= 1
    if exact_match(prediction, answers):
        assert f1(prediction, answers) == 1


def test_answers_fall_into_three_classes():
    assert [answer_class(a) for a in ("Yes", "No", prompts.NOT_IN_CONTEXT, "Nile")] == [
        "yes_no",
        "yes_no",
        "unanswerable",
        "span",
    ]
