"""The page to try a model on.

Paste a context and encode it, then ask: the page shows the answer, which tokens of the context it was found by, and
the seconds that it took beside those of prompting the same base with the context. It needs gradio (`dssk[demo]`).
"""

import html
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dssk.errors import DsskError
from dssk.inference.answering import encode_passages
from dssk.inference.attending import Seen, attend, context_texts, seen_in
from dssk.inference.generation import contexts_together, generate_batch
from dssk.inference.loading import FusedModel, device, load_model
from dssk.inference.passages import Passage
from dssk.inference.rounding import DEFAULT_STORAGE, encoding_bytes
from dssk.inference.timing import Clock, wait_for
from dssk.inference.tokenizer import tokenize_context, tokenize_question_after_context
from dssk.models.modeling import Context
from dssk.models.shapes import kv_cache_values, window
from dssk.utils.files import size

VISIT_SECONDS = 3600  # that a context is kept for its visitor
MAX_VISITS = 100  # whose contexts are kept
MAX_TEXT_CHARACTERS, MAX_QUESTION_CHARACTERS = 100_000, 2_000  # one visitor's text holds up all others
MAX_REQUEST_BYTES = 1_000_000
ACCEPTED = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")  # all that the page sends
WARM_UP = "What comes first is slow: it allocates, and picks kernels."


@dataclass(frozen=True)
class Encoded:
    """A context that was read, and what that took."""

    text: str
    passages: list[Passage]  # one, or those of a text that is longer than the model's window
    pieces: list[str]  # of the passages, one behind the other, cut at their tokens
    states: list[torch.Tensor]  # of each passage, (S, d)
    projected: Context
    seconds: float

    @property
    def tokens(self) -> int:
        """That were encoded."""
        return sum(map(len, self.states))


@dataclass(frozen=True)
class Answered:
    """An answer, what it was found by, and what it took beside prompting the base."""

    text: str
    # Of each context token, its share of the attention: the mean over heads and answer tokens.
    weights: list[float]
    seen: list[Seen]  # of each passage
    first_token_seconds: float
    seconds: float
    prompted_seconds: tuple[float, float] | None  # the same two of the base with the context in its prompt


class Reader:
    """The model behind the page."""

    def __init__(self, model: FusedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.answer("?", self.encode(WARM_UP))

    def encode(self, text: str) -> Encoded:
        """Read a context, once for all questions. Raises `DsskError` for none, and for one that takes too long."""
        text = _bounded(text, "text", MAX_TEXT_CHARACTERS)
        start = time.perf_counter()
        (encoded,) = encode_passages(self.model, self.tokenizer, [text])
        states, passages = [states for states, _ in encoded], [passage for _, passage in encoded]
        with torch.no_grad():
            projected = contexts_together(self.model, [states])["context"]
        wait_for(self.model.device)
        seconds = time.perf_counter() - start
        pieces = [piece for passage in passages for piece in context_texts(self.tokenizer, passage.text)]
        return Encoded(text, passages, pieces, states, projected, seconds)

    def answer(self, question: str, context: Encoded) -> Answered:
        """Answer from a context, and prompt the base with the same to compare the time."""
        question = _bounded(question, "question", MAX_QUESTION_CHARACTERS)
        clock = Clock(self.model.device)
        text = self.model.answer(question, context.projected, self.tokenizer, streamer=clock)
        times = clock.first_token, clock.last_token
        weights, parts = [0.0] * len(context.pieces), []
        if text:
            attention = attend(self.model, self.tokenizer, question, text, context.states)
            weights = attention.of_answer().mean((0, 1)).tolist()
            read = [
                (passage.text, states)
                for passage, states in zip(context.passages, context.states, strict=True)
            ]
            parts = seen_in(self.tokenizer, attention, read)
        return Answered(text, weights, parts, *times, self._prompted(question, context, clock.num_tokens))

    def _prompted(self, question: str, context: Encoded, new_tokens: int) -> tuple[float, float] | None:
        """Seconds to the first and to the last of as many tokens of the base; None if the text does not fit into it."""
        tokens = tokenize_context(self.tokenizer, context.text)
        tokens += tokenize_question_after_context(self.tokenizer, question)
        if len(tokens) + new_tokens > window(self.model.config):
            return None
        clock = Clock(self.model.device)
        generate_batch(
            self.model, self.tokenizer, [tokens], new_tokens, min_new_tokens=new_tokens, streamer=clock
        )
        return clock.first_token, clock.last_token


def _bounded(text: str, what: str, characters: int) -> str:
    text = text.strip()
    if not text:
        raise DsskError(f"there is no {what}: {'paste' if what == 'text' else 'type'} one")
    if len(text) > characters:
        raise DsskError(
            f"the {what} has {len(text):,} characters, this page takes {characters:,}: shorten it"
        )
    return text


class Gate:
    """Lets a browser do what the page needs, and nothing else that gradio serves: no file can be left here."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        length = headers.get(b"content-length", b"")
        if scope["path"].rstrip("/") not in ACCEPTED:
            status = 403
        elif not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
            status = 413
        else:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def build_page(reader: Reader) -> Any:
    """The page, as gradio's `Blocks`: nothing in it comes from the network."""
    gr = import_gradio()

    def shown(function, *args):
        try:
            return function(*args)
        except DsskError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def encode(text: str):
        context = shown(reader.encode, text)
        return context, describe(context, reader.model), "", "", ""

    def answer(question: str, context: Encoded | None, text: str):
        if context is None or context.text != text.strip():
            context = shown(reader.encode, text)
        answered = shown(reader.answer, question, context)
        size_line = describe(context, reader.model)
        return context, size_line, answered.text, seconds_table(answered), highlight(context, answered)

    with gr.Blocks(title="dssk", analytics_enabled=False) as page:
        context = gr.State(None, time_to_live=VISIT_SECONDS)
        gr.Markdown("# Ask a text\nIt is encoded once. Every question is answered from the encoding alone.")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Text", lines=13, max_lines=25, elem_id="text")
                encode_button = gr.Button("Encode", elem_id="encode")
                size_line = gr.Markdown(elem_id="size")
            with gr.Column():
                question = gr.Textbox(label="Question", elem_id="question")
                ask_button = gr.Button("Answer", variant="primary", elem_id="ask")
                answer_box = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
                seconds = gr.Markdown(elem_id="seconds")
        attended = gr.HTML(elem_id="attended")
        outputs = [context, size_line, answer_box, seconds, attended]
        encode_button.click(encode, text, outputs)
        for event in (ask_button.click, question.submit):
            event(answer, [question, context, text], outputs)
    return page.queue(default_concurrency_limit=1)  # `attend` switches the model's attention for a moment


def import_gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when gradio is imported
    try:
        import gradio
    except ImportError:
        raise DsskError('the page needs gradio: pip install -c constraints.txt "dssk[demo]"') from None
    return gradio


def describe(context: Encoded, model: FusedModel) -> str:
    """One line: what was read, how long it took, and what keeping it takes."""
    config, tokens, passages = model.config, context.tokens, len(context.passages)
    read = f"{tokens} tokens" if passages == 1 else f"{tokens} tokens in {passages} passages"
    kept = tokens * encoding_bytes(DEFAULT_STORAGE, config.states_width)
    cache = tokens * kv_cache_values(config) * torch.bfloat16.itemsize
    times = (
        f"{cache / kept:.1f} times as much" if cache > kept else "no more: a deeper base keeps more of them"
    )
    return (
        f"Encoded {read} in {context.seconds:.3f} s: {size(kept)} to keep in bfloat16; "
        f"the base's keys and values of them would be {size(cache)}, {times}."
    )


def seconds_table(answered: Answered) -> str:
    """The latency of an answer, in Markdown."""
    first, last = answered.first_token_seconds, answered.seconds
    lines = [
        "| seconds | first token | answer |",
        "|---|---|---|",
        f"| from encoding | {first:.3f} | {last:.3f} |",
    ]
    if answered.prompted_seconds is None:
        return "\n".join([*lines, "| base, prompted | the text does not fit | |"])
    first, last = answered.prompted_seconds
    return "\n".join([*lines, f"| base, prompted | {first:.3f} | {last:.3f} |"])


def highlight(context: Encoded, answered: Answered) -> str:
    """The text as HTML, the more attended to the darker."""
    most = max(answered.weights) or 1.0
    style = "background: rgba(249, 115, 22, {:.2f})"
    spans = (
        f'<span title="{weight:.1%}" style="{style.format(weight / most)}">{html.escape(piece)}</span>'
        for piece, weight in zip(context.pieces, answered.weights, strict=True)
    )
    shares = "".join(f"<li>{html.escape(line)}</li>" for line in sources(context, answered))
    text = f'<p style="white-space: pre-wrap; line-height: 1.8">{"".join(spans)}</p>'
    return f"<p>What the answer attended to:</p><ol>{shares}</ol>{text}"


def sources(context: Encoded, answered: Answered) -> list[str]:
    """A line for each passage of a text that was divided, the most attended to first."""
    if len(context.passages) == 1:
        return []
    read = sorted(zip(context.passages, answered.seen, strict=False), key=lambda pair: -pair[1].share)
    return [
        f"{part.share:.1%} characters {passage.start} to {passage.end}, most: "
        f"{' '.join(passage.text[part.start : part.end].split())}"
        for passage, part in read
    ]


def launch(page: Any, host: str, port: int, block: bool = True) -> str:
    """Serve the page and say where; returns that address, when it ends if `block`."""
    from starlette.middleware import Middleware

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(Gate)]},
            state_session_capacity=MAX_VISITS,
        )
    except OSError as error:
        raise DsskError(f"cannot listen on {host}, port {port}: choose another --port") from error
    print(address, flush=True)
    if block:
        page.block_thread()
    return address


def serve(checkpoint: str, host: str, port: int) -> None:
    """Run `dssk demo`; the arguments are its flags."""
    if not 1 <= port <= 65535:
        raise DsskError(f"--port is {port}, want 1 to 65535")
    import_gradio()
    model, tokenizer = load_model(checkpoint, device=device())
    launch(build_page(Reader(model, tokenizer)), host, port)
