import numpy as np
import pytest

from dssk.data.distractors import Distractors
from dssk.errors import DsskError

TEXTS = [
    "the mill by the river",
    "the tower by the river",
    "a mill of stone",
    "a tower of wood",
    "a mill by the lake",
    "bread and cheese",
]
TITLES = ["river", "river", "stone", "stone", "", ""]


def make(mix, members=range(6), titles=TITLES):
    return Distractors(titles, TEXTS.__getitem__, list(members), mix)


def drawn(distractors, own=0, question="where is the mill", count=1, times=60, **more):
    return [
        distractors.draw(own, question, count, np.random.default_rng(seed), **more) for seed in range(times)
    ]


def test_the_same_document_gives_its_other_contexts_and_then_gives_way_to_random_ones():
    found = drawn(make({"document": 1.0}), count=3)
    assert all(numbers[0] == 1 and len({0, *numbers}) == 4 for numbers in found)
    assert {n for numbers in found for n in numbers[1:]} == {2, 3, 4, 5}


def test_neighbours_share_words_with_the_question_and_are_of_other_documents():
    assert {n for (n,) in drawn(make({"neighbours": 1.0}))} == {2, 4}
    assert {n for (n,) in drawn(make({"neighbours": 1.0}), question="xylophone")} == {2, 3, 4, 5}  # gave way


def test_random_ones_are_of_other_documents_and_among_the_members():
    assert {n for (n,) in drawn(make({"random": 1.0}))} == {2, 3, 4, 5}
    assert {n for (n,) in drawn(make({"random": 1.0}, members=[0, 1, 3]))} == {3}
    assert drawn(make({"random": 1.0}, members=[0, 1]), times=1) == [[]]
    assert {n for (n,) in drawn(make({"random": 1.0}), own=4)} == {0, 1, 2, 3, 5}  # a document by itself


def test_sources_are_drawn_by_their_weights_and_nothing_unfit_is_drawn():
    mixed = [n for (n,) in drawn(make({"document": 3.0, "random": 1.0}), times=400)]
    assert 0.68 < mixed.count(1) / 400 < 0.82
    assert {n for (n,) in drawn(make({"random": 1.0}), without=["Wood", "cheese"])} == {2, 4}


def test_contexts_of_the_batch_are_of_other_documents_and_give_way_to_random_ones():
    batch = make({"batch": 1.0})
    assert {n for (n,) in drawn(batch, batch=[0, 1, 3, 5])} == {3, 5}
    assert {n for (n,) in drawn(batch, batch=[0, 3, 5], without=["wood"])} == {5}
    assert {n for (n,) in drawn(batch, batch=[0])} == {2, 3, 4, 5}
    assert all(set(numbers) >= {3, 5} for numbers in drawn(batch, batch=[0, 3, 5], count=3))


def test_no_draw_holds_a_context_twice_and_there_may_be_too_few():
    for numbers in drawn(make({"random": 1.0, "neighbours": 1.0, "document": 1.0}), count=9):
        assert len(numbers) == len(set(numbers)) <= 5
        assert 0 not in numbers


def test_documents_that_nobody_named_cannot_be_drawn_from():
    with pytest.raises(DsskError, match="do not say which contexts are of one"):
        make({"document": 1.0}, titles=[""] * 6)
