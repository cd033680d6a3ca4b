"""`dssk library`: what it reads, prints, and says when there is nothing to print."""

import gzip
import json
import re
from functools import partial

import pytest

from dssk.commands import library
from dssk.store.library import ContextLibrary, content_id

TEXTS = ["Mill 1 was built in 1701.", "The bridge of Aston is longer than the mill is high.", "Ann."]


@pytest.fixture
def command(run_command):
    return partial(run_command, library)


def test_the_command(base_path, tmp_path, command):
    (tmp_path / "mill.txt").write_text(TEXTS[0] + "\n")
    more = tmp_path / "more.jsonl"
    rows = [{"context": TEXTS[1], "id": 7, "title": "Aston"}, {"context": TEXTS[2]}]
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "library"
    added = command(folder, "add", tmp_path / "mill.txt", more, "--checkpoint", base_path)
    assert added == command(folder, "list")
    lines = [line.split("\t") for line in added.splitlines()]
    assert [line[0] for line in lines] == ["mill", "7", content_id("Ann.")]
    assert lines[1][1:] == ["61 tokens", "Aston"]
    assert "7\t" in command(folder, "search", "aston", "--k", "1")
    assert command(folder, "remove", "7") == ""
    assert "Aston" not in command(folder, "list")
    assert "2 contexts are as they were written" in command(folder, "verify")


@pytest.fixture
def folder(base_path, tmp_path):
    """A library without contexts."""
    return ContextLibrary(tmp_path / "library", base_path).path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(
                b'{"id": "one", "title": "T", "text": "first"}\n{"id": 2, "text": "second"}\n', mtime=0
            ),
        ),
        ("a.csv", b"\xef\xbb\xbfid,title,context\none,T,first\n2,,second\n"),
        ("a.tsv", b"id\ttitle\ttext\none\tT\tfirst\n2\t\tsecond\n"),
        ("a.json", b'[{"id": "one", "title": "T", "context": "first"}, {"id": 2, "context": "second"}]'),
    ],
)
def test_rows_of_every_kind_of_file(folder, tmp_path, command, name, content):
    (tmp_path / name).write_bytes(content)
    command(folder, "add", tmp_path / name)
    opened = ContextLibrary(folder)
    assert [(id, opened.get(id).title, opened.get(id).text) for id in opened] == [
        ("one", "T", "first"),
        ("2", "", "second"),
    ]


def test_a_text_may_be_packed_and_have_a_byte_order_mark(folder, tmp_path, command):
    (tmp_path / "mill.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfMill 1."))
    command(folder, "add", tmp_path / "mill.txt.gz")
    assert ContextLibrary(folder).get("mill").text == "Mill 1."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "cannot read .*no.txt: No such file"),
        ("no.jsonl", None, "cannot read .*no.jsonl: no such file"),
        ("a.txt", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("a.txt", b" \n", "a.txt holds no context"),
        ("a.jsonl", b"", "a.jsonl holds no context"),
        ("a.csv", b"id,title,text\n", "a.csv holds no context"),
        (
            "a.jsonl",
            b'{"context": "fine"}\n{"answer": "x"}\n',
            "a.jsonl:2: want a text as 'context' or 'text'",
        ),
        ("a.jsonl", b'{"context": "fine"}\n{"context": [1]}\n', "a.jsonl:2: want a text"),
        ("a.jsonl", b'{"context": "fine"}\n[\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"context": "\\ud800"}\n', "a.jsonl:1: a lone surrogate"),
        ("a.jsonl", b'{"context": "fine", "title": "\\ud800"}\n', "a.jsonl:1: a lone surrogate"),
        ("a.jsonl", b'{"context": "fine", "id": "\\ud800"}\n', "a.jsonl:1: a lone surrogate"),
        ("a.jsonl", b'{"context": "x"}\n{"context": "x"}\n', "has a context"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_begins_no_library(
    base_path, tmp_path, command, name, content, message
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = command(tmp_path / "new", "add", tmp_path / name, "--checkpoint", base_path, code=2)
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert "has a context" in message or not (tmp_path / "new").exists()


def test_nothing_found_is_said(folder, tmp_path, run_command, capsys):
    def said(*argv) -> str:
        library.main([str(folder), *argv])
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    assert said("list") == f"dssk: {folder} holds no contexts\n"
    ContextLibrary(folder).add(["a mill"])
    assert said("search", "zeppelin") == "dssk: no context shares a word with the question\n"


def test_a_text_that_is_cut_is_named(base_path, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("x" * 100)
    flags = ["--checkpoint", str(base_path), "--maximum_input_length", "20"]
    library.main([str(tmp_path / "cut"), "add", str(tmp_path / "long.txt"), *flags, "--truncate"])
    said = "dssk: 89 tokens of 1 texts are lost, which --truncate cut to 20: without it they become passages"
    assert capsys.readouterr().err.splitlines()[-1] == said
    library.main([str(tmp_path / "whole"), "add", str(tmp_path / "long.txt"), *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("long#2\t20 tokens (characters 11 to 22)\t")
    assert len(lines) == 10


def test_what_is_no_library_is_named(tmp_path, command):
    assert "no library of contexts" in command(tmp_path / "none", "list", code=2)
