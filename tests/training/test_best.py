import pytest

from dssk.training.best import best_evaluation, evaluations_since_best, is_exhausted


def history(*evaluations: tuple[float, float | None]) -> list[dict]:
    """Of losses and F1; what else was logged stands between them."""
    entries = [{"eval_loss": loss, **({} if f1 is None else {"eval_f1": f1})} for loss, f1 in evaluations]
    return [line for entry in entries for line in ({"loss": 1.0}, entry)]


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ([(3.0, 0.1), (2.0, 0.3), (1.0, 0.2)], 1),
        ([(3.0, 0.3), (2.0, 0.3), (2.0, 0.3)], 1),
        ([(3.0, None), (1.0, None), (2.0, None)], 1),
        ([(3.0, 0.1), (2.0, None), (1.0, None)], 2),  # resumed without answers: what all have decides
    ],
)
def test_the_best_has_the_highest_f1_or_the_lowest_loss(evaluations, best):
    seen = history(*evaluations)
    assert best_evaluation(seen) == seen[2 * best + 1]
    assert evaluations_since_best(seen) == len(evaluations) - 1 - best
    assert is_exhausted(seen, len(evaluations) - 1 - best)
    assert not is_exhausted(seen, len(evaluations) - best)
    assert not is_exhausted(seen, None)


def test_no_evaluation_is_no_best():
    assert best_evaluation(history()) is None
    assert evaluations_since_best(history()) == 0
