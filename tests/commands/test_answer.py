"""Answering: `model.answer` whatever its contexts are given as, and the command in its three ways."""

import json
import os
import pty
import subprocess
import sys

import pytest
import torch

from dssk import prompts
from dssk.commands import answer
from dssk.errors import DsskError, run
from dssk.inference.generate import generate_answers
from dssk.inference.tokenizer import load_tokenizer
from dssk.inference.auto import CrossAttnGPTBigCodeForCausalLM
from dssk.store.library import ContextLibrary
from tests.conftest import REPOSITORY, encode_rows, fused, make_base, question_rows

TEXTS = ["Mill 1 was built in 1701.", "The bridge of Aston is longer than the mill is high.", "Ann."]
QUESTIONS = ["when", "how long is the bridge", "who is it", "where does it lie"]


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(scope="module")
def model(base_path) -> CrossAttnGPTBigCodeForCausalLM:
    """Random blocks, but loud enough that every context changes the answer."""
    model = fused(base_path)
    with torch.no_grad():
        for block in model.transformer.cross_attn:
            block.attn.c_proj.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def states(model, tokenizer):
    """Encoder states (S, d) of a text, encoded alone."""

    def states(text: str) -> torch.Tensor:
        ids = tokenizer(prompts.context(text), return_tensors="pt")["input_ids"]
        return model.encode(ids)[0][0]

    return states


def one_by_one(model, tokenizer, questions, contexts: list) -> list[str]:
    """Reference: each question in a batch of its own, from states or None."""
    return [
        generate_answers(model, tokenizer, [question], lambda _, c=context: c, 1)[0]
        for question, context in zip(questions, contexts, strict=True)
    ]


def test_texts_states_and_a_projection_give_the_same_answers(model, tokenizer, states):
    contexts = [states(text) for text in (TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2])]
    texts = [TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2]]
    expected = one_by_one(model, tokenizer, QUESTIONS, contexts)
    assert len(set(expected)) == 4
    assert model.answer(QUESTIONS, texts, tokenizer) == expected
    assert model.answer(QUESTIONS, contexts, tokenizer) == expected
    assert model.answer(QUESTIONS, contexts, tokenizer, batch_size=3) == expected
    of_one = one_by_one(model, tokenizer, QUESTIONS, [contexts[1]] * 4)
    assert of_one != expected
    projected = model.project_context(contexts[1][None])
    for shared in (TEXTS[1], contexts[1], projected):
        assert model.answer(QUESTIONS, shared, tokenizer) == of_one
        assert model.answer(QUESTIONS[2], shared, tokenizer) == of_one[2]


def test_without_a_context_it_is_the_base_even_beside_questions_that_have_one(model, base, tokenizer, states):
    ids = tokenizer(prompts.question(QUESTIONS[0]), return_tensors="pt")["input_ids"]
    output = base.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=4)[0, ids.shape[1] :]
    expected = tokenizer.decode(output, skip_special_tokens=True).strip()
    assert model.answer(QUESTIONS[0], None, tokenizer) == expected
    mixed = model.answer(QUESTIONS, [[], TEXTS[0], TEXTS[1], None], tokenizer)
    assert mixed == one_by_one(model, tokenizer, QUESTIONS, [None, states(TEXTS[0]), states(TEXTS[1]), None])


def test_several_contexts_are_encoded_apart_and_attended_to_together(model, tokenizer, states):
    joined = torch.cat([states(TEXTS[0]), states(TEXTS[2])])
    expected = one_by_one(model, tokenizer, QUESTIONS[:1], [joined])
    assert expected != one_by_one(model, tokenizer, QUESTIONS[:1], [states(TEXTS[0])])
    assert model.answer(QUESTIONS[:1], [[TEXTS[0], states(TEXTS[2])]], tokenizer) == expected
    assert model.answer(QUESTIONS[0], [TEXTS[0], TEXTS[2]], tokenizer) == expected[0]


def test_a_text_is_encoded_once_and_projected_once_for_all_its_questions(model, tokenizer, monkeypatch):
    encoded, projected = [], []
    encode, project = model.encode, model.project_context
    monkeypatch.setattr(model, "encode", lambda ids, mask: encoded.append(ids.shape[0]) or encode(ids, mask))
    monkeypatch.setattr(
        model,
        "project_context",
        lambda states, mask: projected.append(states.shape[0]) or project(states, mask),
    )
    model.answer([f"question {i}" for i in range(40)], TEXTS[0], tokenizer, max_new_tokens=2)
    assert sum(encoded) == 1
    assert projected == [1, 1]  # batches of 32 and 8
    encoded.clear()
    model.answer(
        [f"question {i}" for i in range(40)], [TEXTS[i % 3] for i in range(40)], tokenizer, max_new_tokens=2
    )
    assert sum(encoded) == 3


def test_the_tokenizer_is_found_where_the_model_was_loaded_from(model, tokenizer, base_path, tmp_path):
    expected = model.answer(QUESTIONS, TEXTS[1], tokenizer)
    assert model.answer(QUESTIONS, TEXTS[1]) == expected
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert CrossAttnGPTBigCodeForCausalLM.from_pretrained(tmp_path).answer(QUESTIONS, TEXTS[1]) == expected


def test_what_cannot_be_answered_is_said(model, tokenizer):
    with pytest.raises(DsskError, match="has 244 tokens, with 32 new ones more than the model's 256"):
        model.answer("x" * 224, TEXTS[0], tokenizer)
    with pytest.raises(ValueError, match="got 2 questions and contexts for 3"):
        model.answer(QUESTIONS[:2], TEXTS, tokenizer)
    with pytest.raises(ValueError, match="one answer a question"):
        model.answer(QUESTIONS[0], TEXTS[0], tokenizer, num_return_sequences=2, num_beams=2)
    assert model.answer([], [], tokenizer) == []
    assert model.answer(QUESTIONS[0], TEXTS[0], tokenizer, num_beams=3)
    assert model.answer(QUESTIONS[0], "long " * 100, tokenizer)  # cut to the model's positions


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def library(base_path, tmp_path_factory) -> ContextLibrary:
    library = ContextLibrary(tmp_path_factory.mktemp("contexts") / "library", base_path, storage_dtype="fp32")
    library.add(TEXTS, ids=["mill", "bridge", "ann"])
    return library


@pytest.fixture
def command(checkpoint, monkeypatch, capsys):
    """The command in this process: what it says on standard output, or as an error or a note on the other."""

    def command(*argv: object, code: int = 0, note: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["answer", "--checkpoint", str(checkpoint), *map(str, argv)])
        assert run(answer.main) == code
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
    assert command("--context", paths[0], *asked) == "\n".join(expected) + "\n"
    expected = model.answer(QUESTIONS[:2], [TEXTS[:2]] * 2, tokenizer, max_new_tokens=8)
    assert command("--context", paths[0], "--context", paths[1], *asked) == "\n".join(expected) + "\n"
    paths[0].write_text("long " * 100)
    said = command("--context", paths[0], *asked, note=True)
    assert said == "dssk: a context has 508 tokens, the first 256 are read\n"


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
    assert run(answer.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "or the base it names" in line


@pytest.mark.slow
def test_someone_at_a_terminal_is_asked_and_sees_the_answer_come(checkpoint, library, model, tokenizer):
    words = [
        sys.executable,
        "-m",
        "dssk.answer",
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
    said, _ = process.communicate(timeout=100)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    expected = model.answer("how long is the bridge", TEXTS[1], tokenizer, max_new_tokens=8)
    assert said.split("> ")[0] == "Ask; /quit ends.\n"
    assert said.split("> ")[1].removesuffix("[bridge]\n").rstrip() == expected
    assert said.split("> ")[2:] == ["", ""]


def test_questions_can_be_piped_in(command, library, monkeypatch):
    class Piped:
        def __iter__(self):
            return iter(["who is ann\n", "\n", "zeppelin"])

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdin", Piped())
    said = command("--library", library.path, "--max_new_tokens", 4)
    assert said.count("[ann]\n") == 1
    assert "Ask" not in said
