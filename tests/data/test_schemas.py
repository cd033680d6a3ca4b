"""Every schema gives the same rows, and what cannot be a row is named."""

import pytest

from dssk.data import schemas
from dssk.data.readers import BadRow, RawRow
from dssk.data.schemas import QA, Dropped, UnknownFields, plain_text, rename, to_qa
from tests.data.layouts import LAYOUTS, Annotation, Page, wrap

PARAGRAPH = "<P> The mill was built in 1850 by Ada Hill and Karl Bell . </P>"
PLAIN = "The mill was built in 1850 by Ada Hill and Karl Bell ."
BOTH_PARAGRAPHS = "<P> Nothing here . </P> " + PARAGRAPH


def page(annotations, text=BOTH_PARAGRAPHS):
    return Page(id="7", title="Mill", question="who built the mill", text=text, annotations=annotations)


def qa_of(layout, annotations, text=BOTH_PARAGRAPHS) -> QA:
    return to_qa(RawRow("f:1", wrap(layout, page(annotations, text))))


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


# --- the answer rule --------------------------------------------------------------------------------------------


def test_the_first_short_answer_is_the_answer(layout):
    qa = qa_of(layout, [Annotation(PARAGRAPH, ["Ada Hill", "Karl Bell"])])
    assert qa.context == PLAIN
    assert qa.answers == ["Ada Hill", "Karl Bell"]
    assert qa.id == "7"
    assert qa.document == "Mill"
    assert qa.question == "who built the mill"


@pytest.mark.parametrize(
    ("mark", "answer"), [("YES", "Yes"), ("NO", "No"), ("NONE", "Answer not in context.")]
)
def test_without_a_short_answer_yes_or_no_or_not_in_context_is_the_answer(layout, mark, answer):
    assert qa_of(layout, [Annotation(PARAGRAPH, [], mark)]).answers == [answer]


def test_a_row_without_a_long_answer_is_dropped(layout):
    with pytest.raises(Dropped, match="no long answer"):
        qa_of(layout, [Annotation(None), Annotation(None)])


def test_several_annotators_of_one_long_answer_pool_their_answers(layout):
    annotations = [Annotation(None), Annotation(PARAGRAPH), Annotation(PARAGRAPH, ["Ada Hill"])]
    annotations += [
        Annotation(PARAGRAPH, ["Karl Bell", "Ada Hill"]),
        Annotation("<P> Nothing here . </P>", ["here"]),
    ]
    qa = qa_of(layout, annotations)
    assert qa.context == PLAIN
    assert qa.answers == ["Ada Hill", "Karl Bell"]


def test_tables_and_lists_stay_readable(layout):
    text = (
        '<Table> Mills <Tr> <Th> Name </Th> <Th> Built </Th> </Tr> <Tr> <Td> </Td> <Td colspan="2"> 1850 </Td> </Tr> '
        "</Table>"
    )
    qa = qa_of(layout, [Annotation(text, ["1850"])], f"{text} {PARAGRAPH}")
    assert qa.context == "Mills\nName | Built\n| 1850"
    assert qa.answers == ["1850"]
    text = "<Ul> <Li> Ada <P> the elder </P> </Li> <Li> </Li> <Li> Karl </Li> </Ul>"
    assert qa_of(layout, [Annotation(text)], text).context == "- Ada\nthe elder\n- Karl"


def test_an_answer_across_cells_has_no_marks_of_the_table():
    tokens = "<Tr> <Td> Ada </Td> <Td> Hill </Td> </Tr>".split(" ")
    is_html = [token.startswith("<") for token in tokens]
    assert plain_text(tokens, is_html) == "Ada | Hill"
    table = "<Table> <Tr> <Td> Ada </Td> <Td> Hill </Td> </Tr> </Table>"
    assert qa_of("simplified", [Annotation(table, ["Ada </Td> <Td> Hill"])], table).answers == ["Ada Hill"]


def test_words_that_look_like_markup_stay_words_in_the_simplified_layout():
    text = "<P> I <3 you , if a < b and <unk> ok </P>"
    assert qa_of("simplified", [Annotation(text)], text).context == "I <3 you , if a < b and <unk> ok"


def test_an_answer_may_end_with_the_page_but_not_one_token_behind_it(layout):
    row = wrap(layout, page([Annotation(PARAGRAPH, ["Ada Hill"])]))
    tokens = row["document_text"].split(" ") if layout == "simplified" else row.get("document_tokens")
    num_tokens = len(tokens or row["document"]["tokens"]["token"])
    annotation = schemas._records(row["annotations"])[0]
    annotation["long_answer"]["end_token"] = num_tokens
    assert to_qa(RawRow("f:1", row | {"annotations": [annotation]})).context.endswith("The end .")
    annotation["long_answer"]["end_token"] = num_tokens + 1
    with pytest.raises(BadRow, match=f"answer .*{num_tokens + 1} in a document of {num_tokens} tokens"):
        to_qa(RawRow("f:1", row | {"annotations": [annotation]}))


# --- flat rows --------------------------------------------------------------------------------------------------


def flat(**row) -> QA:
    return to_qa(RawRow("f.jsonl:3", {"context": "c", "question": "q"} | row))


def test_flat_rows_of_every_kind_are_read():
    assert flat(answer="a") == QA("f.jsonl:3", "", "c", "q", ["a"])
    assert flat(answer=["a", "b", "a"], id=5, title="T") == QA("5", "T", "c", "q", ["a", "b"])
    assert flat(answers={"text": ["a", "b"], "answer_start": [0, 1]}).answers == ["a", "b"]
    assert flat(answers=[{"text": "a"}]).answers == ["a"]
    assert flat(answers=["a"]).answers == ["a"]
    assert flat(answers=[]).answers == ["Answer not in context."]
    assert flat(answers={"text": [], "answer_start": []}).answers == ["Answer not in context."]


def test_one_text_is_one_answer_never_its_letters():
    for answers in ("Paris", {"text": "Paris"}, [{"text": "Paris"}]):
        assert flat(answers=answers).answers == flat(answer=answers).answers == ["Paris"]


def test_true_and_false_are_yes_and_no():
    assert flat(answer=True).answers == ["Yes"]
    assert flat(answers=[False]).answers == ["No"]


@pytest.mark.parametrize("row", [{"context": " "}, {"question": ""}, {"answer": ""}, {"answer": []}])
def test_an_empty_text_is_dropped_with_its_reason(row):
    with pytest.raises(Dropped, match=f"empty {next(iter(row))}"):
        flat(**({"answer": "a"} | row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no answer"),
        ({"answer": None}, "answer is NoneType"),
        ({"answer": 3}, "answer is int"),
        ({"answer": "a", "context": ["c"]}, "context is list"),
        ({"answer": "a", "question": "\ud800"}, "question has half a surrogate pair"),
        ({"answers": 7}, "answer is int"),
        ({"answers": [["a"]]}, "wrong type"),
        ({"answers": None}, "answer is NoneType"),
        ({"answers": {}}, "no text"),
    ],
)
def test_a_row_with_a_wrong_type_or_without_a_key_is_bad(row, message):
    with pytest.raises(BadRow, match=message):
        flat(**row)


def test_a_message_about_a_row_is_short_and_printable():
    keys = {f"k{i}\n\x1b[2J": 1 for i in range(100_000)}
    with pytest.raises(UnknownFields, match=r"just the fields k0\\n\\x1b\[2J") as caught:
        to_qa(RawRow("f:1", keys))
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


# --- other names for columns ------------------------------------------------------------------------------------

BOOLQ = {"passage": "p", "question": "q", "answer": True, "title": "T"}
NESTED = {"doc": {"text": "c"}, "q.text": "q", "answers": {"a": ["x", "y"]}, "annotations": []}


def test_columns_of_other_names_are_found_also_inside_of_others():
    renamed = rename(RawRow("f:1", BOOLQ), {"context": "passage"})
    assert to_qa(renamed) == QA("f:1", "T", "p", "q", ["Yes"])
    columns = {"context": "doc.text", "question": "q.text", "answer": "answers.a"}
    assert to_qa(rename(RawRow("f:1", NESTED), columns)) == QA("f:1", "", "c", "q", ["x", "y"])


@pytest.mark.parametrize("name", ["nothing", "doc.nothing", "answers.a.b"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(name):
    with pytest.raises(
        BadRow, match=f"no {name} for context among the fields annotations, answers, doc, q.text"
    ):
        to_qa(rename(RawRow("f:1", NESTED), {"context": name}))


def test_a_row_that_could_not_be_read_stays_one():
    assert rename(RawRow("f:1", [1]), {"context": "c"}).value == [1]


@pytest.mark.parametrize("value", [[], 1, "text", None, {"a": 1}, {"annotations": 3}, {"annotations": [{}]}])
def test_a_row_of_no_known_schema_is_bad(value):
    with pytest.raises(BadRow):
        to_qa(RawRow("f:1", value))


def test_an_answer_outside_of_the_page_is_bad(layout):
    row = wrap(layout, page([Annotation(PARAGRAPH, ["Ada Hill"])]))
    annotation = schemas._records(row["annotations"])[0]
    annotation["long_answer"]["end_token"] = 10_000
    with pytest.raises(BadRow, match="10000"):
        to_qa(RawRow("f:1", row | {"annotations": [annotation]}))
