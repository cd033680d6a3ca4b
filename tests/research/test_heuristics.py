import pytest

from dssk.evaluation.questions import Question, QuestionSet
from dssk.research.heuristics import HeuristicSystem, entities, overlap, random_entity

TEXT = (
    "Many visit Amber Falls for its maps . The founder of the town was Hugo Marsh . "
    "It began in 1695 , says Ann O'Neil ."
)


def ask(question, context=TEXT):
    return Question("0", question, context, ["x"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, ["Amber Falls", "Hugo Marsh", "1695", "Ann O'Neil"]),
        ("In 1,776 men of the United States Navy.", ["1,776", "United States Navy"]),
        ("nothing here, at all", []),
        ('<Table> <Th colspan="2"> Grey </Th> <Td> Sandra Oh </Td> 3 < 4', ["Grey", "Sandra Oh", "3", "4"]),
    ],
)
def test_entities_are_runs_of_capitalized_words_and_numbers(text, expected):
    assert entities(text) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (
            "who was the founder of Amber Falls",
            "Hugo Marsh",
        ),  # its own sentence names only what was asked about
        ("when did it begin , says Ann O'Neil", "1695"),
        ("what do people visit Amber Falls for", "Hugo Marsh"),
    ],
)
def test_overlap_names_what_the_best_sentence_adds_to_the_question(question, expected):
    assert overlap(ask(question), 0) == expected


def test_a_random_entity_is_any_of_the_context_and_always_the_same():
    assert {random_entity(ask("q"), seed) for seed in range(50)} == set(entities(TEXT))
    assert random_entity(ask("q"), 3) == random_entity(ask("q"), 3)
    assert overlap(ask("q", "no names"), 0) == random_entity(ask("q", "no names"), 0) == ""


def test_heuristics_have_no_likelihood():
    questions = QuestionSet([ask("who was the founder of Amber Falls")], [1], "", 0)
    assert HeuristicSystem("overlap", questions)([0]) == [{"with_context": ("Hugo Marsh", None)}]
