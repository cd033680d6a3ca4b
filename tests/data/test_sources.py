"""Every schema gives the same rows, and what cannot be a row is named."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dssk.data import sources
from dssk.data.sources import QA, BadRow, Dropped, RawRow, Source, plain_text, to_qa
from dssk.errors import DamagedData, DsskError
from tests.data.conftest import rows, write_jsonl
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


# --- flat rows --------------------------------------------------------------------------------------------------


def flat(**row) -> QA:
    return to_qa(RawRow("f.jsonl:3", {"context": "c", "question": "q"} | row))


def test_flat_rows_of_every_kind_are_read():
    assert flat(answer="a") == QA("f.jsonl:3", "", "c", "q", ["a"])
    assert flat(answer=["a", "b", "a"], id=5, title="T") == QA("5", "T", "c", "q", ["a", "b"])
    assert flat(answers={"text": ["a", "b"], "answer_start": [0, 1]}).answers == ["a", "b"]
    assert flat(answers=[{"text": "a"}]).answers == ["a"]
    assert flat(answers=["a"]).answers == ["a"]
    assert flat(answers={"text": [], "answer_start": []}).answers == ["Answer not in context."]


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
        ({"answers": 7}, "wrong type"),
        ({"answers": {}}, "no text"),
    ],
)
def test_a_row_with_a_wrong_type_or_without_a_key_is_bad(row, message):
    with pytest.raises(BadRow, match=message):
        flat(**row)


@pytest.mark.parametrize("value", [[], 1, "text", None, {"a": 1}, {"annotations": 3}, {"annotations": [{}]}])
def test_a_row_of_no_known_schema_is_bad(value):
    with pytest.raises(BadRow):
        to_qa(RawRow("f:1", value))


def test_an_answer_outside_of_the_page_is_bad(layout):
    row = wrap(layout, page([Annotation(PARAGRAPH, ["Ada Hill"])]))
    annotation = sources._records(row["annotations"])[0]
    annotation["long_answer"]["end_token"] = 10_000
    with pytest.raises(BadRow, match="10000"):
        to_qa(RawRow("f:1", row | {"annotations": [annotation]}))


# --- files ------------------------------------------------------------------------------------------------------


def read(path) -> list[dict]:
    return [row.value for row in sources.read_rows([str(path)])]


def test_all_file_types_give_the_same_rows(tmp_path):
    expected = rows(3)
    table = pa.Table.from_pylist(expected)
    write_jsonl(tmp_path / "a.jsonl", expected)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(expected))
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    pq.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset.from_list(expected).save_to_disk(tmp_path / "saved")
    paths = [*tmp_path.glob("*.*"), *tmp_path.glob("saved/*.arrow")]
    assert len(paths) == 6
    for path in paths:
        assert read(path) == expected, path


def test_nested_squad_is_read_as_questions(tmp_path):
    qas = [
        {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]},
        {"id": "2", "question": "r"},
    ]
    squad = {"version": "2", "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": qas}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(squad))
    found = [to_qa(row) for row in sources.read_rows([str(tmp_path / "dev.json")])]
    assert found == [QA("1", "T", "c", "q", ["a"]), QA("2", "T", "c", "r", ["Answer not in context."])]


def test_the_html_of_a_parquet_page_is_not_read(tmp_path):
    row = wrap("hub", page([Annotation(PARAGRAPH, ["Ada Hill"])]))
    row["document"]["html"] = "<html>" * 1000
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = read(tmp_path / "a.parquet")
    assert "html" not in found["document"]
    assert to_qa(RawRow("f:1", found)).answers == ["Ada Hill"]


def test_lines_that_are_not_json_or_not_utf8_are_bad_rows_with_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"context": "c"}\n\n{"a": "\xff"}\n{"a": \n[1]\n')
    found = list(sources.read_rows([str(path)]))
    assert [row.place for row in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert [type(row.value) for row in found] == [dict, BadRow, BadRow, list]
    assert str(found[1].value) == "not UTF-8 at byte 7"


@pytest.mark.parametrize("cut", [10, 60])
def test_a_cut_gzip_file_is_damaged_data(tmp_path, cut):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(rows(20)).encode())[:cut])
    with pytest.raises(DamagedData, match="is damaged"):
        read(path)


@pytest.mark.parametrize("name", ["a b", "é日本", "[1]", "a*", "50%", 'it\'s "q"', "line\nbreak", "-r"])
def test_any_file_name_is_opened_as_it_is(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write_jsonl(folder / f"{name}.jsonl", rows(1))
    assert len(read(folder / f"{name}.jsonl")) == 2
    assert len(list(Source(str(folder)).open()["all"])) == 2


def test_folders_and_files_named_after_splits_are_splits(tmp_path):
    for name in ("train/a.jsonl", "train/b.jsonl", "dev/a.jsonl", "test/a.jsonl", "train/dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, rows(1, 1))
    counted = {split: len(list(found)) for split, found in Source(str(tmp_path)).open().items()}
    assert counted == {"train": 2, "val": 1}
    assert len(list(Source(str(tmp_path), split="test").open()["all"])) == 1
    with pytest.raises(DsskError, match="no split other, only test, train, val"):
        Source(str(tmp_path), split="other").open()


def test_val_can_come_from_another_place(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows(3))
    write_jsonl(tmp_path / "b.jsonl", rows(1))
    found = Source(str(tmp_path / "a.jsonl"), val_dataset=str(tmp_path / "b.jsonl")).open()
    assert {split: len(list(part)) for split, part in found.items()} == {"train": 6, "val": 2}


@pytest.mark.parametrize("name", ["/no/such/file", "./missing", "missing.jsonl", "a/b/c"])
def test_a_path_that_is_not_there_is_named_without_asking_the_hub(name):
    with pytest.raises(DsskError, match="no such file or folder"):
        Source(name).open()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(DsskError, match="no data in"):
        Source(str(tmp_path)).open()


def test_a_changed_file_changes_the_description(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    before = Source(str(path)).describe()
    assert before == Source(str(path)).describe()
    write_jsonl(path, rows(3, start=1))
    assert before != Source(str(path)).describe()
