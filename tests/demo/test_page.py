"""The page to try a model on: what is behind it, and the page itself in a real Chromium."""

import re
import socket
import sys

import pytest

from dssk import prompts
from dssk.demo import page as demo
from dssk.demo.page import Answered, Reader
from dssk.errors import DsskError
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import fused
from tests.training.conftest import free_port

TEXT = "Mill 1 was built in 1701 by <b>Ann</b> & sons."
QUESTION = "when was the mill built"


@pytest.fixture(scope="module")
def reader(base_path) -> Reader:
    return Reader(fused(base_path), load_tokenizer(base_path))


def test_what_is_read_is_the_text_in_pieces(reader):
    context = reader.encode(f" {TEXT}\n")
    assert context.text == TEXT
    assert "".join(context.pieces) == prompts.context(TEXT)
    assert len(context.pieces) == len(context.states) == context.tokens
    assert context.seconds > 0
    line = demo.describe(context, reader.model)
    # 32 values a token of the base's output, 2 x 4 layers x 8 of its keys and values, in two bytes each
    assert line.startswith(f"Encoded {context.tokens} tokens in ")
    assert "3.5 kB to keep in bfloat16" in line
    assert "keys and values of them would be 7.0 kB" in line


def test_a_long_text_is_cut_and_said_to_be(reader):
    context = reader.encode("word " * 60)
    assert (len(context.states), context.tokens) == (256, 308)
    assert "the first 256 of 308 tokens" in demo.describe(context, reader.model)
    answered = reader.answer(QUESTION, context)
    assert answered.prompted_seconds is None
    assert "the text does not fit" in demo.seconds_table(answered)


def test_an_answer_comes_with_its_attention_and_its_times(reader):
    context = reader.encode(TEXT)
    answered = reader.answer(QUESTION, context)
    assert answered.text == reader.model.answer(QUESTION, TEXT, reader.tokenizer)
    assert sum(answered.weights) == pytest.approx(1, abs=1e-4)
    assert len(answered.weights) == len(context.pieces)
    assert 0 < answered.first_token_seconds <= answered.seconds
    first, last = answered.prompted_seconds
    assert 0 < first <= last


def test_both_ways_generate_as_many_tokens(reader, monkeypatch):
    generate, new_tokens = reader.model.generate, []

    def counted(ids, **kwargs):
        output = generate(ids, **kwargs)
        new_tokens.append(
            (output.shape[1] - ids.shape[1], kwargs.get("context"), kwargs.get("min_new_tokens"))
        )
        return output

    monkeypatch.setattr(reader.model, "generate", counted)
    reader.answer(QUESTION, reader.encode(TEXT))
    (cached, context, _), (prompted, none, at_least) = new_tokens
    assert cached == prompted == at_least
    assert context is not None
    assert none is None


def test_the_more_attended_to_is_darker_and_nothing_is_markup(reader):
    context = reader.encode(TEXT)
    weights = [0.0] * len(context.pieces)
    weights[3], weights[5] = 0.8, 0.2
    page = demo.highlight(context, Answered("x", weights, 1, 1, None))
    shades = re.findall(r"rgba\(249, 115, 22, ([\d.]+)\)", page)
    assert (shades[3], shades[5], shades[4]) == ("1.00", "0.25", "0.00")
    assert "<b>" not in page
    assert "".join(re.findall(r"<span[^>]*>(.*?)</span>", page)) == (
        "context: Mill 1 was built in 1701 by &lt;b&gt;Ann&lt;/b&gt; &amp; sons."
    )
    nothing = Answered("", [0.0] * len(context.pieces), 1, 1, None)
    assert demo.highlight(context, nothing).count("0.00)") == len(context.pieces)


def test_the_page_in_a_browser(reader, open_page):
    page = demo.build_page(reader)
    address = demo.launch(page, "127.0.0.1", free_port(), block=False)
    try:
        visit = open_page(address)
        visit.click("#ask")
        visit.wait_for_selector("text=there is no text: paste one")
        visit.fill("#text textarea", TEXT)
        visit.click("#encode")
        visit.wait_for_selector("#size >> text=Encoded 55 tokens")
        visit.fill("#question textarea", QUESTION)
        visit.click("#ask")
        expected = reader.model.answer(QUESTION, TEXT, reader.tokenizer)
        visit.wait_for_selector("#attended span")
        assert visit.input_value("#answer textarea") == expected
        assert visit.locator("#attended span").count() == 55
        assert prompts.context(TEXT) in visit.inner_text("#attended")
        assert visit.locator("#seconds td").count() == 6
        visit.fill("#text textarea", "Another text.")  # asked without encoding it first
        visit.press("#question textarea", "Enter")
        visit.wait_for_selector("#size >> text=Encoded 22 tokens")
        assert visit.input_value("#answer textarea") == reader.model.answer(
            QUESTION, "Another text.", reader.tokenizer
        )
        assert visit.errors == []
        hosts = {re.match(r"\w+://([^/:]*)", request)[1] for request in visit.requests}
        assert hosts == {"127.0.0.1"}
    finally:
        page.close()


def test_a_port_in_use_is_one_line(reader):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            DsskError, match=f"cannot listen on 127.0.0.1, port {port}: choose another --port"
        ):
            demo.launch(demo.build_page(reader), "127.0.0.1", port, block=False)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(DsskError, match=r"pip install .*dssk\[demo\]"):
        demo.import_gradio()
