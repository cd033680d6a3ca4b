import numpy as np
import pytest

from dssk.evaluation.scores import interval, score, score_control, table


def prediction(em, context="c", answer_class="span", context_tokens=10, nll=1.0, wrong_nll=None):
    row = {
        "context": context,
        "answer_class": answer_class,
        "context_tokens": context_tokens,
        "with_context": {"prediction": "x", "em": em, "f1": em / 2, "rouge_l": em / 4, "answer_nll": nll},
    }
    if wrong_nll is not None:
        row["wrong_context"] = row["with_context"] | {"answer_nll": wrong_nll}
    return row


def test_scores_are_means_over_the_answered_questions():
    rows = [prediction(1.0), prediction(0.0, answer_class="yes_no", nll=2.0), prediction(1.0, "d")]
    scores = score_control(rows, "with_context")
    assert scores["n"] == 3
    assert scores["em"] == pytest.approx(2 / 3, abs=1e-4)
    assert scores["f1"] == pytest.approx(1 / 3, abs=1e-4)
    assert scores["rouge_l"] == pytest.approx(1 / 6, abs=1e-4)
    assert scores["span_em"] == 1
    assert scores["answer_nll"] == pytest.approx(4 / 3, abs=1e-4)
    assert scores["by_class"] == {
        "span": {"n": 2, "em": 1, "f1": 0.5},
        "yes_no": {"n": 1, "em": 0, "f1": 0},
    }


def test_a_control_is_scored_on_the_questions_that_it_fits():
    rows = [prediction(1.0, wrong_nll=3.0), prediction(0.0)]
    scores = score(rows, ["with_context", "wrong_context", "other_question"])
    assert [scores[control]["n"] for control in ("with_context", "wrong_context")] == [2, 1]
    assert "other_question" not in scores
    assert scores["right_beats_wrong"] == 1


def test_bins_of_length_hold_every_question_once():
    lengths = np.random.default_rng(0).integers(5, 300, 101)
    rows = [
        prediction(float(length < 50), str(i), context_tokens=int(length)) for i, length in enumerate(lengths)
    ]
    bins = score_control(rows, "with_context")["by_context_tokens"]
    assert sum(row["n"] for row in bins) == 101
    assert len(bins) == 5
    assert all(15 <= row["n"] <= 25 for row in bins)
    assert bins[0]["low"] == lengths.min()
    assert bins[-1]["high"] == lengths.max()
    assert all(a["high"] < b["low"] for a, b in zip(bins, bins[1:], strict=False))
    assert bins[0]["em"] > bins[-1]["em"] == 0
    same = score_control([prediction(1.0), prediction(0.0)], "with_context")["by_context_tokens"]
    assert [(row["low"], row["high"], row["n"]) for row in same] == [(10, 10, 2)]


def test_the_interval_resamples_contexts_and_not_questions():
    values = [1.0] * 50 + [0.0] * 50
    by_question = interval(values, range(100))
    by_context = interval(values, [i // 10 for i in range(100)])
    assert by_question == interval(values, range(100))  # the same every time
    assert by_question == pytest.approx((0.4, 0.6), abs=0.03)  # 1.96 standard errors: 0.098
    assert by_context[1] - by_context[0] > 2.5 * (by_question[1] - by_question[0])


def test_questions_of_one_context_are_resampled_together():
    rows = [prediction(1.0, "c", wrong_nll=2.0)] * 9 + [prediction(0.0, "d", nll=3.0, wrong_nll=2.0)] * 9
    scores = score(rows, ["with_context"])
    assert (scores["with_context"]["em_low"], scores["with_context"]["em_high"]) == (0.0, 1.0)
    assert (scores["right_beats_wrong_low"], scores["right_beats_wrong_high"]) == (0.0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(50):
        rates = rng.beta(2, 2, 40)  # of 40 contexts with 5 questions each; their mean is one half
        low, high = interval(rng.binomial(1, np.repeat(rates, 5)).astype(float), np.repeat(np.arange(40), 5))
        covered += low <= 0.5 <= high
    assert 43 <= covered <= 50


def test_contexts_weigh_as_many_questions_as_they_have():
    values = [1.0] * 9 * 20 + [0.0] * 20  # 20 contexts with 9 right questions, 20 with a wrong one
    low, high = interval(values, [*np.repeat(np.arange(20), 9), *range(20, 40)])
    assert 0.75 < low < 0.9 < high < 0.97


def test_the_table_shows_every_control():
    rows = [prediction(1.0, wrong_nll=3.0), prediction(0.0, wrong_nll=0.5)]
    text = table(score(rows, ["with_context", "wrong_context"]))
    assert "with_context      0.500" in text
    assert "gold answer likelier with its own context: 50.0%" in text
