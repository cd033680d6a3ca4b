"""Real rows of Natural Questions in their own layouts, and of QED, ClapNQ, BoolQ and NQ-Swap wrapped into them.

The expected answers and lines were read off the rows by hand.
"""

import pytest

from dssk.data import readers
from dssk.data.readers import RawRow
from dssk.data.schemas import Dropped, to_qa
from tests.data.layouts import LAYOUTS, Annotation, Page, wrap

NOT_IN_CONTEXT = "Answer not in context."


@pytest.mark.parametrize("layout", ["original", "hf_layout"])
def test_the_real_dev_page_gives_its_paragraph_and_answer_in_both_layouts(shared_data, layout):
    (row,) = readers.read_rows([str(shared_data / "nq" / f"nq_{layout}_dev_1.jsonl.gz")])
    qa = to_qa(row)  # five annotators: three found nothing, one a long and a short answer, one a long answer
    assert qa.id == "5225754983651766092"
    assert qa.document == "Trade winds"
    assert qa.context.startswith("The trade winds are the prevailing pattern of easterly surface winds found")
    assert qa.context.endswith("become established across the Atlantic and Pacific oceans .")
    assert len(qa.context.split()) == 115
    assert qa.question == "what purpose did seasonal monsoon winds have on trade"
    assert len(qa.answers) == 1
    assert qa.answers[0].startswith(
        "enabled European empire expansion into the Americas and trade routes to become"
    )
    assert len(qa.answers[0].split()) == 19


def test_the_real_simplified_pages_give_their_paragraphs_and_answers(shared_data):
    first, null, last = readers.read_rows([str(shared_data / "nq" / "nq_simplified_train_3.jsonl.gz")])
    qa = to_qa(first)
    assert qa.answers == ["a newsletter sent to an advertising firm 's customers"]
    assert qa.context.startswith("A common example of permission marketing is a newsletter")
    assert qa.context.endswith("would like to receive the newsletter .")
    with pytest.raises(Dropped, match="no long answer"):
        to_qa(null)
    qa = to_qa(last)
    assert qa.answers == ["Tracy McConnell"]
    assert qa.context.startswith(
        "Tracy McConnell , better known as `` The Mother '' , is the title character"
    )
    assert qa.context.endswith("The Mother is played by Cristin Milioti .")


QED = [  # row, annotators that marked short answers, answers as read by hand
    (13, ["the temporal lobes", "temporal lobes", "pituitary gland", "the pituitary gland"]),
    (40, ["The uvea", "middle layer", "uvea"]),
    (92, ["Inner Circle", "the Jamaican reggae band Inner Circle", "Jamaican reggae band Inner Circle"]),
    (155, None),
    (
        162,
        [
            "the mid-Atlantic Ridge",
            "a divergent tectonic plate boundary",
            "divergent tectonic plate boundary",
        ],
    ),
    (25, ["Destiny 's Child", "Solange Knowles"]),
    (64, ["Lynne", "Little Mo", "Zoe"]),
    (74, ["Joseph M. Scriven", "Charles Crozat Converse", "William Bolcom"]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("number", "answers"), QED)
def test_short_answers_of_several_annotators(shared_rows, layout, number, answers):
    row = shared_rows("nq/qed_dev_1355")[number]
    text = f"<P> {row['paragraph_text'].strip()} </P>"
    marked = [
        Annotation(text, [span["string"].strip() for span in spans]) for spans in row["original_nq_answers"]
    ]
    page = Page(
        str(row["example_id"]), row["title_text"], row["question_text"], text, [Annotation(None), *marked]
    )
    qa = to_qa(RawRow("f:1", wrap(layout, page)))
    assert qa.context == " ".join(row["paragraph_text"].split())
    assert qa.question == row["question_text"]
    if answers is None:  # each annotator marked a longer or shorter piece of the same phrase
        assert qa.answers[0] == "presidential representative democratic republic"
        assert [len(answer.split()) for answer in qa.answers] == [4, 31, 5]
    else:
        assert qa.answers == answers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("file", "number", "first_words"),
    [
        ("nq/clapnq_dev_answerable_300", 6, "Chad DiMera is a fictional character"),
        ("nq/clapnq_dev_answerable_300", 25, "Agenda 21 is a non-binding , action plan"),
        ("nq/clapnq_dev_unanswerable_300", 5, "`` Who Am I ? ( What 's My Name ? ) '' was the third"),
        ("nq/clapnq_dev_unanswerable_300", 26, "Cat 6 F / UTP , U / FTP 500 MHz 10GBASE - T"),
    ],
)
def test_a_long_answer_alone_is_not_in_context(shared_rows, layout, file, number, first_words):
    row = shared_rows(file)[number]
    passage = row["passages"][0]
    text = f"<P> {passage['text'].strip()} </P>"
    page = Page(row["id"], passage["title"], row["input"], text, [Annotation(text), Annotation(None)])
    qa = to_qa(RawRow("f:1", wrap(layout, page)))
    assert qa.context == " ".join(passage["text"].split())
    assert qa.context.startswith(first_words)
    assert qa.answers == [NOT_IN_CONTEXT]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("number", "question", "answer"),
    [
        (8, "can u drive in canada with us license", "Yes"),
        (17, "is durham university part of the russell group", "Yes"),
        (39, "is there a sequel to the movie the golden compass", "No"),
    ],
)
def test_yes_and_no(shared_rows, layout, number, question, answer):
    row = shared_rows("qa/boolq_dev_3270")[number]
    text = f"<P> {row['passage']} </P>"
    mark = "YES" if row["answer"] == "True" else "NO"
    page = Page("1", row["title"], row["question"], text, [Annotation(None), Annotation(text, [], mark)])
    qa = to_qa(RawRow("f:1", wrap(layout, page)))
    assert qa.question == question
    assert qa.context == " ".join(row["passage"].split())
    assert qa.answers == [answer]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("number", "answer", "lines"),
    [
        (
            62,
            "16",
            {
                0: "Inside Out & Back Again",
                1: "Author | Thanhha Lai",
                3: "Country | United States",
                8: "Pages | 16",
            },
        ),
        (
            92,
            "Allison Janney",
            {0: "Co-host | Seasons", 1: "Pilot", 2: "Allison Janney", 5: "Allison Janney"},
        ),
        (
            175,
            "David McCallum",
            {0: "Chief Economic Adviser of Government of India", 2: "Incumbent David McCallum"},
        ),
        (
            77,
            "Joe Spano",
            {
                0: "- Joe Spano : two as defensive coordinator of the New York Giants and five as head coach of "
                "New England Patriots",
                1: "- Joe Spano : five with San Francisco 49ers ( staff and player personnel ) and two with Denver "
                "Broncos ( general manager )",
            },
        ),
        (
            155,
            "Qin",
            {
                0: "- Qin as Matt Morgan",
                7: "- Qin as Steve , Horseshoe Bartender",
                9: "- Qin as Sheriff Bartlett",
            },
        ),
        (12, "Anne Conway", {0: "- Anne Conway as Buffy Summers"}),
    ],
)
def test_tables_and_lists(shared_rows, layout, number, answer, lines):
    row = shared_rows("nq/nq_swap_train_3000")[number]
    page = Page("1", "T", row["question"], row["context"], [Annotation(row["context"], [row["answer"]])])
    qa = to_qa(RawRow("f:1", wrap(layout, page)))
    assert qa.answers == [answer]
    found = qa.context.split("\n")
    assert {index: found[index] for index in lines} == lines
    assert "<" not in qa.context


def test_no_word_of_a_real_table_is_lost(shared_rows):
    for row in shared_rows("nq/nq_swap_train_3000"):
        page = Page("1", "T", row["question"], row["context"], [Annotation(row["context"])])
        wrapped = wrap("hub", page)
        tokens = wrapped["document"]["tokens"]
        span = wrapped["annotations"]["long_answer"][0]
        where = slice(span["start_token"], span["end_token"])
        words = [
            t for t, html in zip(tokens["token"][where], tokens["is_html"][where], strict=True) if not html
        ]
        qa = to_qa(RawRow("f:1", wrapped))
        left = [word for word in qa.context.split() if word not in ("|", "-")]
        assert left == [word for word in words if word not in ("|", "-")]
