"""Long contexts of data sets as passages, and the passage that answers a question."""

import json

import pytest

from dssk.data.plan import answering
from dssk.data.readers import RawRow
from dssk.data.schemas import to_qa
from dssk.errors import DsskError
from dssk.inference.passages import Passage
from dssk.research import toy
from dssk.store.dataset import load_contexts, load_rows
from dssk.store.opening import load_manifest

TEXT = " ".join(f"Mill number {i} was built by Ann {i}0." for i in range(12))
ROWS = [
    {
        "id": str(i),
        "title": "Mills",
        "context": TEXT,
        "question": f"who built mill number {i}",
        "answer": f"Ann {i}0",
    }
    for i in range(12)
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    short = {
        "id": "short",
        "title": "Gates",
        "context": "A gate.",
        "question": "what is there",
        "answer": "gate",
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, short]))
    return path


def test_a_question_about_a_long_context_is_about_the_passage_that_answers_it(tmp_path, source, preprocess):
    store = preprocess(tmp_path, source, maximum_input_length=120, val_fraction=0)
    rows, contexts = load_rows(store)["train"], load_contexts(store)
    assert len(rows) == 13
    for row in rows:
        assert row["answer"] in row["context"]
    assert len(contexts) == len({row["context"] for row in rows}) > 4
    columns = map(contexts.column, ("context", "document", "start", "end"))
    for text, *place in zip(*columns, strict=True):
        whole = text == "A gate."
        assert place == ["", 0, 7] if whole else (place[0], TEXT[place[1] : place[2]]) == ("Mills", text)
    assert set(contexts.column("title")) == {"Mills", "Gates"}
    assert load_manifest(store).counts.truncated == 0


def test_passages_may_overlap_and_begin_with_titles(tmp_path, source, preprocess):
    flags = {"passage_tokens": 100, "overlap": 40, "repeat_title": True, "val_fraction": 0}
    store = preprocess(tmp_path, source, **flags)
    contexts = load_contexts(store)
    whole = "Gates\nA gate."
    assert whole in contexts.column("context")
    assert all(text.startswith("Mills\nMill number") for text in contexts.column("context") if text != whole)
    with pytest.raises(
        DsskError, match="passages 100 tokens, overlap 40, repeat_title .now 100 tokens, overlap 20"
    ):
        preprocess(tmp_path, source, **flags | {"overlap": 20})


def test_cutting_off_is_asked_for_and_counted(tmp_path, source, preprocess, capsys):
    store = preprocess(tmp_path, source, maximum_input_length=120, val_fraction=0, truncate=True)
    assert len(load_contexts(store)) == 2
    lost = len(f"context: {TEXT}") - 120
    assert f"1 truncated ({lost} tokens lost)" in capsys.readouterr().out
    with pytest.raises(DsskError, match="leaves one passage of a context"):
        preprocess(tmp_path, source, truncate=True, overlap=3)
    with pytest.raises(DsskError, match="--passage_tokens 300 is more than --maximum_input_length 256"):
        preprocess(tmp_path, source, passage_tokens=300)


def test_a_finished_store_without_long_contexts_is_used_again_either_way(
    tmp_path, source, preprocess, capsys
):
    source.write_text(source.read_text().splitlines()[-1] + "\n")
    preprocess(tmp_path, source, truncate=True, val_fraction=0)
    capsys.readouterr()
    preprocess(tmp_path, source, val_fraction=0)
    assert "used again" in capsys.readouterr().out


def test_the_answering_passage_overlaps_the_long_answer_and_holds_the_answer():
    passages = [Passage("x 1842", 0, 6), Passage("amber 1842 a", 7, 19), Passage("amber 1842 falls", 20, 36)]
    row = {"context": "x" * 36, "question": "when amber falls", "answers": ["1842"], "start": 0, "end": None}
    assert answering(passages, row) == 2
    assert answering(passages, row | {"start": 8, "end": 15}) == 1
    assert answering(passages, row | {"answers": ["No"], "start": 0, "end": 10}) == 1
    assert answering(passages, row | {"answers": ["x"]}) == 0


def test_a_whole_page_knows_where_its_long_answer_stands():
    for row in toy.generate("train", 20, seed=0):
        part, page = to_qa(RawRow("", row)), to_qa(RawRow("", row), whole_pages=True)
        assert page.context[page.start : page.end] == part.context
        assert page.context.startswith(f"{row['document']['title']}\n")
        assert page.context.endswith("is a stub .")
        assert page.answers == part.answers


def test_pages_of_natural_questions_are_divided_and_all_passages_are_kept(tmp_path, preprocess):
    store = preprocess(
        tmp_path, "toy", max_examples=6, passage_tokens=100, whole_pages=True, seed=0, val_fraction=0.05
    )
    rows, contexts = load_rows(store)["train"], load_contexts(store)
    assert len(contexts) > len({row["context"] for row in rows}) + 6  # passages that answer nothing, too
    for row in rows:
        if row["answer"] not in ("Yes", "No", "Answer not in context."):
            assert row["answer"] in row["context"]
