"""The command that answers, in its three ways."""

import json
import os
import pty
import subprocess
import sys

import pytest

from dssk.commands import answer
from dssk.demo.asking import NOTHING_FOUND, _Stream
from dssk.errors import exit_code_of
from dssk.inference.tokenizer import load_tokenizer
from dssk.store.library import ContextLibrary
from tests.conftest import REPOSITORY, encode_rows, make_base, question_rows
from tests.inference.test_answering import QUESTIONS, TEXTS, loud


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(scope="module")
def model(base_path):
    return loud(base_path)


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def library(base_path, tmp_path_factory) -> ContextLibrary:
    library = ContextLibrary(tmp_path_factory.mktemp("contexts") / "library", base_path)
    library.add(TEXTS, ids=["mill", "bridge", "ann"])
    return library


@pytest.fixture
def command(checkpoint, monkeypatch, capsys):
    """The command in this process: what it says on standard output, or as an error or a note on the other."""

    def command(*argv: object, code: int = 0, note: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["answer", "--checkpoint", str(checkpoint), *map(str, argv)])
        assert exit_code_of(answer.main) == code
        said = capsys.readouterr()
        return said.err if code or note else said.out

    return command


def jsonl(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_answers_from_files(command, model, tokenizer, tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path, text in zip(paths, TEXTS, strict=False):
        path.write_text(f"{text}\n")
    asked = ["--question", QUESTIONS[0], "--question", QUESTIONS[1], "--max_new_tokens", 8]
    expected = model.answer(QUESTIONS[:2], TEXTS[0], tokenizer, max_new_tokens=8)
    said = command("--context", paths[0], *asked).splitlines()
    assert said[::2] == expected
    assert all(line.startswith("[a: 100% of the attention, most to '") for line in said[1::2])
    expected = model.answer(QUESTIONS[:2], [TEXTS[:2]] * 2, tokenizer, max_new_tokens=8)
    said = command("--context", paths[0], "--context", paths[1], *asked).splitlines()
    assert said[::3] == expected
    assert {line[:2] for line in said[1:3]} == {"[a", "[b"}
    paths[0].write_text("long " * 100)
    said = command("--context", paths[0], *asked, "--truncate", note=True)
    assert said == "dssk: --truncate: 252 tokens of a are not read\n"


LONG = " ".join(f"Mill number {i} stands by the river." for i in range(24))


def test_a_long_text_is_read_as_passages_that_answers_name(command, model, tokenizer, tmp_path):
    (tmp_path / "mills.txt").write_text(LONG)
    rows = jsonl(tmp_path / "in", [{"question": "where is mill number 17"}])
    flags = ["--context", tmp_path / "mills.txt", "--input", rows, "--max_new_tokens", 8]
    whole = json.loads(command(*flags))
    assert whole["answer"] == model.answer("where is mill number 17", LONG, tokenizer, max_new_tokens=8)
    assert whole["context_ids"] == []
    sources = whole["sources"]
    assert len(sources) > 3
    assert sum(source["share"] for source in sources) == pytest.approx(1, abs=1e-2)
    assert [s["share"] for s in sources] == sorted((s["share"] for s in sources), reverse=True)
    by_place = sorted(sources, key=lambda source: source["start"])
    assert " ".join(LONG[source["start"] : source["end"]] for source in by_place) == LONG
    for source in sources:
        passage = LONG[source["start"] : source["end"]]
        assert source["document"] == "mills"
        assert passage[source["span_start"] : source["span_end"]] == source["span"]
    best = json.loads(command(*flags, "--k", 1, "--passage_tokens", 60))
    (source,) = best["sources"]
    assert "number 17" in LONG[source["start"] : source["end"]]
    assert "--passage_tokens 257 is more than the 256 that" in command(
        *flags, "--passage_tokens", 257, code=2
    )
    library = ["--library", "x", "--question", "q", "--truncate"]
    assert "are for --context" in command(*library, code=2)


def test_the_command_answers_a_file_of_questions(command, model, tokenizer, library, tmp_path):
    rows = [
        {"id": 1, "question": "how long is the aston bridge"},
        {"id": 2, "question": "zeppelin", "kept": True},
        {"id": 3, "question": "who", "context_id": "ann"},
        {"id": 4, "question": "who", "context_id": ["ann", "mill"]},
    ]
    output = tmp_path / "made" / "answers.jsonl"
    said = command("--library", library.path, "--input", jsonl(tmp_path / "in", rows), "--output", output)
    assert said == ""
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    contexts = [[TEXTS[1]], [], [TEXTS[2]], [TEXTS[2], TEXTS[0]]]
    expected = model.answer([row["question"] for row in rows], contexts, tokenizer)
    assert [row["answer"] for row in answered] == expected
    assert [row["context_ids"] for row in answered] == [["bridge"], [], ["ann"], ["ann", "mill"]]
    assert [row["id"] for row in answered] == [1, 2, 3, 4]
    assert answered[1]["kept"]
    assert [list(row)[0] for row in answered] == ["id", "nothing_found", "id", "id"]
    assert [source["id"] for source in answered[0]["sources"]] == ["bridge"]
    assert {source["id"] for source in answered[3]["sources"]} == {"ann", "mill"}
    assert answered[1]["sources"] == []
    assert all("context_id" not in row for row in answered)
    two = command("--library", library.path, "--input", jsonl(tmp_path / "in", rows[:1]), "--k", 2)
    assert json.loads(two)["context_ids"] == ["bridge"]  # the others share no word with the question
    jsonl(tmp_path / "in", [{"question": "mill of the bridge"}])
    two = command("--library", library.path, "--input", tmp_path / "in", "--k", 2)
    assert sorted(json.loads(two)["context_ids"]) == ["bridge", "mill"]
    given = command("--library", library.path, "--input", tmp_path / "in", "--context_id", "ann")
    assert json.loads(given)["context_ids"] == ["ann"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--library", "LIBRARY", "--question", "x", "--input", "IN"], "got --question and --input"),
        (
            ["--library", "LIBRARY", "--question", "x", "--output", "out"],
            "--output is for the answers to --input",
        ),
        (
            ["--context", "IN", "--question", "x", "--context_id", "ann"],
            "--context_id names a context of a library",
        ),
        (["--context", "-"], "leaves no standard input"),
        (["--context", "none", "--question", "x"], "cannot read none"),
        (["--library", "LIBRARY", "--question", "a \udcff"], "half a surrogate pair at "),
        (["--library", "none", "--question", "x"], "no library of contexts at none"),
        (["--library", "LIBRARY", "--question", "x", "--context_id", "an"], "no context 'an'"),
        (["--library", "LIBRARY", "--input", "BAD"], 'bad:2: want {"question": text}'),
        (["--context", "IN", "--input", "NAMED"], "'who' names a context: pass --library"),
    ],
)
def test_mistakes_are_one_line(command, library, tmp_path, flags, message):
    files = {
        "LIBRARY": library.path,
        "IN": jsonl(tmp_path / "in", [{"question": "who"}]),
        "BAD": jsonl(tmp_path / "bad", [{"question": "who"}, {"question": 3}]),
        "NAMED": jsonl(tmp_path / "named", [{"question": "who", "context_id": "ann"}]),
    }
    (line,) = command(*[files.get(flag, flag) for flag in flags], code=2).splitlines()
    assert message in line


def test_contexts_of_another_model_are_refused(command, store_path, tmp_path):
    other = encode_rows(make_base(tmp_path / "other", seed=1), tmp_path, question_rows(8))
    assert "other weights" in command("--library", other, "--question", "x", code=2)
    assert command("--library", store_path, "--question", "who built mill 3", "--max_new_tokens", 4)


def test_a_checkpoint_whose_base_is_gone_is_one_line(model, tokenizer, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path, cross_attn_only=True)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        sys, "argv", ["answer", "--checkpoint", str(tmp_path), "--question", "x", "--context", __file__]
    )
    assert exit_code_of(answer.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the base of" in line
    assert "--base_model" in line


@pytest.mark.slow
def test_someone_at_a_terminal_is_asked_and_sees_the_answer_come(checkpoint, library, model, tokenizer):
    words = [
        sys.executable,
        "-m",
        "dssk",
        "answer",
        "--checkpoint",
        str(checkpoint),
        "--library",
        str(library.path),
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*words, "--max_new_tokens", "8"], cwd=REPOSITORY, stdin=theirs, stdout=subprocess.PIPE, text=True
    )
    os.write(ours, b"how long is the bridge\n\n/quit\nnever read\n")
    said, _ = process.communicate()
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    expected = model.answer("how long is the bridge", TEXTS[1], tokenizer, max_new_tokens=8)
    assert said.split("> ")[0] == "Ask; /quit ends.\n"
    assert said.split("> ")[1].partition("[bridge: 100% of")[0].rstrip() == expected
    assert said.split("> ")[2:] == ["", ""]


def test_questions_can_be_piped_in(command, library, monkeypatch):
    class Piped:
        def __iter__(self):
            return iter(["who is ann\n", "\n", "zeppelin"])

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdin", Piped())
    said = command("--library", library.path, "--max_new_tokens", 4)
    assert said.count("[ann: 100% of the attention, most to ") == 1
    assert said.splitlines()[-2] == NOTHING_FOUND
    assert "Ask" not in said


def test_an_answer_says_where_it_is_from_and_first_when_there_is_nothing(
    command, model, tokenizer, library, tmp_path
):
    asked = ["how long is the aston bridge", "zeppelin"]
    flags = [word for question in asked for word in ("--question", question)]
    said = command("--library", library.path, *flags, "--max_new_tokens", 8)
    bridge, alone = model.answer(asked, [TEXTS[1], None], tokenizer, max_new_tokens=8)
    lines = said.splitlines()
    assert [lines[0], *lines[2:]] == [bridge, NOTHING_FOUND, alone]
    assert lines[1].startswith("[bridge: 100% of the attention, most to '")
    rows = jsonl(tmp_path / "in", [{"question": question} for question in asked])
    note = command("--library", library.path, "--input", rows, "--max_new_tokens", 2, note=True)
    assert note.splitlines()[-1] == "dssk: no context found for 1 of 2 questions"


@pytest.mark.parametrize("pieces", [[" An", "n \nquestion:", " and\nmore"], ["\n", " Ann \n", "question"]])
def test_an_answer_that_comes_by_and_by_ends_with_its_line(tokenizer, capsys, pieces):
    stream = _Stream(tokenizer)
    for piece in pieces:
        stream.on_finalized_text(piece)
    stream.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out.strip() == "Ann"


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "\\ud800"}',
        "[" * 100_000,
        '{"question": "q", "context_id": [[1]]}',
        "null",
        '["question"]',
    ],
)
def test_a_line_that_is_no_question_is_named(command, library, tmp_path, line):
    (tmp_path / "in").write_text(line)
    (said,) = command("--library", library.path, "--input", tmp_path / "in", code=2).splitlines()
    assert f"{tmp_path / 'in'}:1: want" in said
