"""The page to try a model on: what is behind it, and the page itself in a real Chromium."""

import html
import re
import socket
import sys

import httpx
import pytest

from dssk import prompts
from dssk.commands import demo as command
from dssk.demo import page as demo
from dssk.demo.page import Answered, Reader
from dssk.errors import DsskError
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import fused, make_base
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
    assert len(context.pieces) == len(context.states[0]) == context.tokens
    assert context.seconds > 0
    line = demo.describe(context, reader.model)
    # 32 values a token of the base's output, 2 x 4 layers x 8 of its keys and values, in two bytes each
    assert line.startswith(f"Encoded {context.tokens} tokens in ")
    assert "3.5 kB to keep in bfloat16" in line
    assert line.endswith("keys and values of them would be 7.0 kB, 2.0 times as much.")


def test_equal_numbers_of_bytes_are_not_left_without_a_word(tmp_path):
    shallow = Reader(
        fused(make_base(tmp_path, n_layer=2), cross_attn_layers_stride=1), load_tokenizer(tmp_path)
    )
    line = demo.describe(shallow.encode(TEXT), shallow.model)
    assert line.endswith("would be 3.5 kB, no more: a deeper base keeps more of them.")


def test_texts_and_questions_are_bounded(reader):
    with pytest.raises(DsskError, match="the text has 100,001 characters, this page takes 100,000"):
        reader.encode("x" * 100_001)
    context = reader.encode("x" * 100_000)
    with pytest.raises(DsskError, match="the question has 2,001 characters"):
        reader.answer("x" * 2001, context)
    with pytest.raises(DsskError, match="there is no text: paste one"):
        reader.encode(" ")
    with pytest.raises(DsskError, match="there is no question: type one"):
        reader.answer(" ", context)


def test_a_long_text_is_read_in_passages_and_said_to_be(reader):
    context = reader.encode("word " * 60)
    assert (len(context.states), context.tokens) == (2, 317)  # each passage has the prompt's tokens
    assert "317 tokens in 2 passages" in demo.describe(context, reader.model)
    answered = reader.answer(QUESTION, context)
    assert len(answered.weights) == len(context.pieces) == 317
    assert sum(part.share for part in answered.seen) == pytest.approx(1, abs=1e-2)
    lines = demo.sources(context, answered)
    assert len(lines) == 2
    assert all(line in html.unescape(demo.highlight(context, answered)) for line in lines)
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
            (
                output.shape[1] - ids.shape[1],
                kwargs.get("context"),
                kwargs["generation_config"].min_new_tokens,
            )
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
    page = demo.highlight(context, Answered("x", weights, [], 1, 1, None))
    shades = re.findall(r"rgba\(249, 115, 22, ([\d.]+)\)", page)
    assert (shades[3], shades[5], shades[4]) == ("1.00", "0.25", "0.00")
    assert "<b>" not in page
    assert "".join(re.findall(r"<span[^>]*>(.*?)</span>", page)) == (
        "context: Mill 1 was built in 1701 by &lt;b&gt;Ann&lt;/b&gt; &amp; sons."
    )
    nothing = Answered("", [0.0] * len(context.pieces), [], 1, 1, None)
    assert demo.highlight(context, nothing).count("0.00)") == len(context.pieces)


def shown(text: str) -> str:
    """As a browser shows a text of random bytes."""
    return text.replace("\r", "\n")


def test_the_page_in_a_browser(reader, open_page):
    # Asked here before the page asks: it answers one question at a time.
    expected, again = (
        reader.model.answer(QUESTION, text, reader.tokenizer) for text in (TEXT, "Another text.")
    )
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
        visit.wait_for_selector("#attended span")
        assert shown(visit.input_value("#answer textarea")) == shown(expected)
        assert visit.locator("#attended span").count() == 55
        assert prompts.context(TEXT) in visit.inner_text("#attended")
        assert visit.locator("#seconds td").count() == 6
        visit.fill("#text textarea", "Another text.")  # asked without encoding it first
        visit.press("#question textarea", "Enter")
        visit.wait_for_selector("#size >> text=Encoded 22 tokens")
        assert shown(visit.input_value("#answer textarea")) == shown(again)
        assert visit.errors == []
        hosts = {re.match(r"\w+://([^/:]*)", request)[1] for request in visit.requests}
        assert hosts == {"127.0.0.1"}
    finally:
        page.close()


def test_nothing_can_be_left_at_the_page(reader):
    page = demo.build_page(reader)
    address = demo.launch(page, "127.0.0.1", free_port(), block=False)
    try:
        file = {"files": ("x.txt", b"x" * 1000)}
        for path in ("upload", "component_server", "process_recording", "run/encode", "vibe-edit/"):
            for prefix in ("", "gradio_api/"):
                assert httpx.post(f"{address}{prefix}{path}", files=file).status_code == 403
        join = f"{address}gradio_api/queue/join"
        assert httpx.post(join, content=b"x" * 1_000_001).status_code == 413
        assert httpx.post(join, content=iter([b"x" * 100])).status_code == 413  # of unknown length
        assert httpx.put(join, json={}).status_code == 405
        asked = {"data": ["x" * 100_001], "fn_index": 0, "session_hash": "a"}
        assert httpx.post(join, json=asked).status_code == 200
    finally:
        page.close()


@pytest.mark.parametrize("port", [99_999, 65_536])
def test_a_port_that_cannot_be_is_one_line_before_anything_is_loaded(run_command, port):
    said = run_command(command, "--checkpoint", "none", "--port", port, code=2)
    assert re.fullmatch(rf"dssk: error: .*--port.*{port}.*\n", said)


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
