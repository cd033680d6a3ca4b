import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import rouge_score, squad

from dssk import prompts
from dssk.evaluation.metrics import answer_class, exact_match, f1, normalize, rouge_l

# Texts rich in what normalization is about: articles, punctuation, cases, spaces, and letters beyond ASCII.
WORDS = st.sampled_from(
    ["a", "an", "the", "The", "A.", "Nile", "nile", "U.S.", "é", "1,776", "-", "İ", "ß", "the-"]
)
TEXTS = st.one_of(st.text(), st.lists(WORDS, max_size=6).map(" ".join))


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


# Free-text answers of Natural Questions are scored by SQuAD's rule: lower case, then no punctuation, then no articles,
# then single spaces. Short answers as that data set has them:
@pytest.mark.parametrize(
    ("prediction", "answer", "matches"),
    [
        ("The Beatles", "beatles", True),
        ("14 December 1972 UTC", "14 december 1972 utc", True),
        ("December 14, 1972", "December 14 1972", True),
        ("Bobby Scott", "Bobby  Scott.", True),
        ("the-atre", "atre", False),  # punctuation goes first, and joins
        ("an A-list", "alist", True),
        ("December 1972", "14 December 1972", False),
        ("ninety", "90", False),
    ],
)
def test_normalization_suits_short_answers_of_natural_questions(prediction, answer, matches):
    assert exact_match(prediction, [answer]) == matches


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_exact_match_and_f1_are_those_of_an_independent_squad(prediction, answers):
    theirs = squad(
        {"prediction_text": prediction, "id": "0"},
        {"answers": {"answer_start": [0] * len(answers), "text": answers}, "id": "0"},
    )
    assert exact_match(prediction, answers) * 100 == theirs["exact_match"].item()
    assert f1(prediction, answers) * 100 == pytest.approx(theirs["f1"].item(), abs=1e-3)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_rouge_l_is_that_of_an_independent_implementation(prediction, answers):
    # The other scores two empty texts 0, where a right empty answer is as right as any.
    answers = [answer for answer in answers if normalize(answer)] or ["Nile"]
    theirs = rouge_score(
        prediction,
        [answers],
        rouge_keys="rougeL",
        normalizer=normalize,
        tokenizer=str.split,
        accumulate="best",
    )
    assert rouge_l(prediction, answers) == pytest.approx(theirs["rougeL_fmeasure"].item(), abs=1e-5)


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


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("x y z", ["z y x"], 1 / 3),
        ("x q y", ["x y"], 0.8),
        ("the", ["an"], 1),
        ("", ["x"], 0),
        ("y", ["x", "y"], 1),
    ],
)
def test_rouge_l_counts_words_in_their_order(prediction, answers, expected):
    assert rouge_l(prediction, answers) == pytest.approx(expected)


@given(st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_scores_lie_between_0_and_1_and_an_exact_match_has_full_f1(prediction, answers):
    assert 0 <= rouge_l(prediction, answers) <= f1(prediction, answers) + 1e-9 <= 1 + 1e-9
    if exact_match(prediction, answers):
        assert f1(prediction, answers) == rouge_l(prediction, answers) == 1


def test_answers_fall_into_three_classes():
    assert [answer_class(a) for a in ("Yes", "No", prompts.NOT_IN_CONTEXT, "Nile")] == [
        "yes_no",
        "yes_no",
        "unanswerable",
        "span",
    ]
