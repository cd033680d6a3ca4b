"""Long texts as passages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dssk.errors import DsskError
from dssk.inference.passages import Splitter
from dssk.inference.tokenizer import tokenize_context
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()  # one token a byte; "context: " takes nine
SENTENCES = [f"Mill number {i} stands by the river." for i in range(12)]
TEXT = " ".join(SENTENCES)


def test_a_short_text_is_one_passage_as_it_is():
    text = " a text. with two sentences \n"
    assert Splitter(64).split(TOKENIZER, text) == [(text, 0, len(text))]


def test_passages_end_with_sentences_and_hold_the_whole_text():
    passages = Splitter(128).split(TOKENIZER, TEXT)
    assert len(passages) > 2
    assert all(passage.text.endswith(".") for passage in passages)
    assert " ".join(passage.text for passage in passages) == TEXT
    assert all(TEXT[passage.start : passage.end] == passage.text for passage in passages)
    assert max(len(tokenize_context(TOKENIZER, passage.text)) for passage in passages) <= 128


def test_passages_overlap_by_whole_sentences():
    passages = Splitter(128, overlap=50).split(TOKENIZER, TEXT)
    for one, next_one in zip(passages, passages[1:], strict=False):
        shared = TEXT[next_one.start : one.end]
        assert shared in SENTENCES
    assert passages[-1].end == len(TEXT)


def test_each_passage_begins_with_the_title_cut_or_not():
    splitter = Splitter(128, repeat_title=True)
    passages = splitter.split(TOKENIZER, TEXT, "Mills of old")
    assert all(passage.text.startswith("Mills of old\nMill number") for passage in passages)
    assert all(passage.text == f"Mills of old\n{TEXT[passage.start : passage.end]}" for passage in passages)
    assert splitter.split(TOKENIZER, "short", "Mills of old") == [("Mills of old\nshort", 0, 5)]
    assert splitter.split(TOKENIZER, "short") == [("short", 0, 5)]
    with pytest.raises(DsskError, match="leaves no room in passages of 32 tokens"):
        Splitter(32, repeat_title=True).split(TOKENIZER, TEXT, "a title that is far too long")


def test_a_text_without_sentences_is_cut_between_tokens():
    passages = Splitter(40).split(TOKENIZER, "x" * 100)
    assert [len(passage.text) for passage in passages] == [31, 31, 31, 7]


def test_impossible_passages_are_refused():
    with pytest.raises(DsskError, match="want at least 16"):
        Splitter(15)
    with pytest.raises(DsskError, match="want 0 to 32"):
        Splitter(64, overlap=33)


@settings(max_examples=60, deadline=None)
@given(st.text("ab. \n?é", max_size=300), st.integers(20, 60), st.integers(0, 8))
def test_whatever_the_text_nothing_is_lost_and_nothing_too_long(text, tokens, overlap):
    passages = Splitter(tokens, overlap).split(TOKENIZER, text)
    assert max(len(tokenize_context(TOKENIZER, passage.text)) for passage in passages) <= tokens
    covered = set()
    for passage in passages:
        assert text[passage.start : passage.end] == passage.text
        covered |= set(range(passage.start, passage.end))
    assert all(text[i].isspace() for i in range(len(text)) if i not in covered)
