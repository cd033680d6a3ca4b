"""Rows out of every kind of file, one at a time, each with its place; damage is one line."""

import gzip
import io
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dssk.data import readers
from dssk.data.readers import BadRow
from dssk.data.schemas import QA, to_qa
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.utils import streams
from tests.data.conftest import rows, write_jsonl

# --- files ------------------------------------------------------------------------------------------------------


def read(path) -> list[dict]:
    return [row.value for row in readers.read_rows([str(path)])]


def test_all_file_types_give_the_same_rows(tmp_path):
    expected = rows(3)
    table = pa.Table.from_pylist(expected)
    write_jsonl(tmp_path / "a.jsonl", expected)
    (tmp_path / "a.json").write_text(json.dumps(expected))
    (tmp_path / "pretty.json").write_text(json.dumps({"version": 1, "data": expected}, indent=1))
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    table.to_pandas().to_csv(tmp_path / "a.csv", index=False)
    table.to_pandas().to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    for path in list(tmp_path.iterdir()):
        content = b"\xef\xbb\xbf" + path.read_bytes()
        path.with_name(f"bom-{path.name}").write_bytes(content)
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
        path.with_name(f"{path.name}.zst").write_bytes(pa.compress(content, "zstd", asbytes=True))
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    datasets.Dataset.from_list(expected).save_to_disk(tmp_path / "saved")
    paths = [*tmp_path.glob("*.*"), *tmp_path.glob("saved/*.arrow")]
    assert len(paths) == 6 * 4 + 3
    for path in paths:
        assert read(path) == expected, path


def test_nested_squad_is_read_as_questions(tmp_path):
    qas = [
        {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]},
        {"id": "2", "question": "r"},
    ]
    squad = {"version": "2", "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": qas}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(squad))
    found = [to_qa(row) for row in readers.read_rows([str(tmp_path / "dev.json")])]
    assert found == [QA("1", "T", "c", "q", ["a"]), QA("2", "T", "c", "r", ["Answer not in context."])]


def test_lines_that_are_not_json_or_not_utf8_are_bad_rows_with_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"context": "c"}\n\n{"a": "\xff"}\n{"a": \n[1]\n')
    found = list(readers.read_rows([str(path)]))
    assert [row.place for row in found] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert [type(row.value) for row in found] == [dict, BadRow, BadRow, list]
    assert str(found[1].value) == "not UTF-8 at byte 7"


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_python_cannot_hold_is_named(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    if name == "a.jsonl":
        (row,) = readers.read_rows([str(path)])
        assert str(row.value).startswith("not JSON: ")
    else:
        with pytest.raises(DsskError, match="a.json cannot be read after row 0: not JSON: "):
            read(path)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", []),
        ("[]", []),
        ("null", [None]),
        ("5", [5]),
        ('{"data": null}', [{"data": None}]),
        ('[1, 2.5e3 , "x",{"a":[1]} ]\n[3]', [1, 2500.0, "x", {"a": [1]}, 3]),
        ('{"data": [{"a": 1}], "n": 7} {"b": 2}', [{"a": 1}, {"b": 2}]),
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 1 << 20])
def test_a_json_document_is_read_value_by_value(tmp_path, monkeypatch, text, values, piece):
    monkeypatch.setattr(readers, "_FIRST_PIECE_BYTES", piece)
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == values


@pytest.mark.parametrize(
    "text", ["[1, 2", "[1 2]", "[1,]", '{"data": [1, 2]', '{"data": [1, 2}', '[1, 2, "é', "[1, 2]]"]
)
def test_a_json_document_that_breaks_off_or_is_none_names_the_last_row(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        DsskError, match=r"a.json cannot be read after row [12]: not JSON: .*: mend it, or name it .jsonl"
    ):
        read(tmp_path / "a.json")


def test_a_bomb_is_unpacked_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(streams.lines, "__defaults__", (1 << 20,))
    row = json.dumps(rows(1)[0]).encode()
    for name, content in (
        ("a.json.gz", b"[" + row + b" " * (60 << 20) + b"," + row + b"]"),
        ("a.jsonl.gz", row + b"\n" + b"x" * (60 << 20) + b"\n" + row),
        ("b.json.gz", b"[" + row + b', "' + b"x" * (60 << 20)),
        ("a.csv.gz", b"id,context\n1,c\n2," + b"x" * (60 << 20)),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content, 1))
        tracemalloc.start()
        found = readers.read_rows([str(tmp_path / name)])
        if name[0] == "a" and ".json" in name:
            values = [row.value for row in found]
            assert values[0] == values[-1] == rows(1)[0]
            assert [str(value) for value in values[1:-1]] == ["longer than 1.0 MB"] * ("l." in name)
        else:
            next(found)
            with pytest.raises(DsskError, match=r"longer than 1.0 MB|Unterminated string"):
                next(found)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 30 << 20, name


# --- CSV --------------------------------------------------------------------------------------------------------


def csv_rows(tmp_path, content: bytes) -> list[readers.RawRow]:
    (tmp_path / "a.csv").write_bytes(content)
    return list(readers.read_rows([str(tmp_path / "a.csv")]))


def test_csv_cells_may_hold_commas_quotes_and_lines_and_know_their_line(tmp_path):
    found = csv_rows(tmp_path, b'id,context\r\n1,"a, ""b""\nc"\r\n\r\n2,d')
    assert [row.value for row in found] == [{"id": "1", "context": 'a, "b"\nc'}, {"id": "2", "context": "d"}]
    assert [row.place for row in found] == ["a.csv:3", "a.csv:5"]


def test_a_bad_line_of_a_csv_costs_no_other(tmp_path):
    found = csv_rows(tmp_path, b"id,context\n1,\xff\n2\n3,c,d\n4,c\n")
    assert [str(row.value) for row in found[:3]] == [
        "not UTF-8",
        "1 cells, but 2 columns",
        "3 cells, but 2 columns",
    ]
    assert found[3].value == {"id": "4", "context": "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'id,context\n1,"never closed\n2,b\n', "a.csv:3: unexpected end of data: put cells"),
        (b'id,context\n1,"a" b\n', "a.csv:2: .*: put cells"),
        (b"id,id\n1,2\n", "a column name stands twice"),
    ],
)
def test_a_csv_that_cannot_be_divided_into_rows_is_refused(tmp_path, content, message):
    with pytest.raises(DsskError, match=message):
        csv_rows(tmp_path, content)


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [10, 60])
def test_a_cut_gzip_file_is_damaged_data(tmp_path, cut):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(rows(20)).encode())[:cut])
    with pytest.raises(DamagedData, match="is damaged"):
        read(path)


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_flipped_bits_of_a_compressed_file_are_found(tmp_path, compress):
    whole = compress(json.dumps(rows(20)).encode())
    name = "a.json.gz" if compress is gzip.compress else "a.json.zst"
    for at in (0, len(whole) // 2, len(whole) - 6):
        content = bytearray(whole)
        content[at] ^= 4
        (tmp_path / name).write_bytes(content)
        with pytest.raises((DamagedData, DsskError)):
            read(tmp_path / name)


def test_a_file_that_may_not_be_read_is_a_fault_of_the_machine(tmp_path, monkeypatch):
    def refuse(url):
        raise PermissionError(13, "Permission denied", url)

    monkeypatch.setattr(readers, "open_file", refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot read .*a.jsonl: Permission denied$"):
        read(tmp_path / "a.jsonl")


def test_a_line_of_the_limit_is_whole_and_one_above_is_none():
    stream = io.BytesIO(b"1234\n123\n12345\n1\n" + b"x" * 11)
    assert list(streams.lines(stream, 5)) == [b"1234\n", b"123\n", None, b"1\n", None]
