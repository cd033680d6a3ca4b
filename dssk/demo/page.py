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
from transformers.generation.streamers import BaseStreamer

from dssk import prompts
from dssk.errors import DsskError
from dssk.evaluation.attention import attend, token_texts
from dssk.inference.answering import encode_texts, tokenize_context
from dssk.inference.base import kv_cache_values
from dssk.inference.loading import load_model
from dssk.models.cross_attention import ProjectedContext
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM
from dssk.utils.files import size

VISIT_SECONDS = 3600  # that a context is kept for its visitor
WARM_UP = "What comes first is slow: it allocates, and picks kernels."


@dataclass(frozen=True)
class Encoded:
    """A context that was read, and what that took."""

    text: str
    pieces: list[str]  # what was encoded of it, cut at its tokens
    states: torch.Tensor  # (S, d)
    projected: ProjectedContext
    tokens: int  # of the whole text; more than S if it was cut
    seconds: float


@dataclass(frozen=True)
class Answered:
    """An answer, what it was found by, and what it took beside prompting the base."""

    text: str
    weights: list[
        float
    ]  # a context token's share of the attention, 0 to 1: the mean over heads and answer tokens
    first_token_seconds: float
    seconds: float
    prompted_seconds: tuple[float, float] | None  # the same two of the base with the context in its prompt


class Reader:
    """The model behind the page."""

    def __init__(self, model: CrossAttnGPTBigCodeForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.answer("?", self.encode(WARM_UP))

    def encode(self, text: str) -> Encoded:
        """Read a context, once for all questions. Raises `DsskError` if there is nothing in it."""
        text = text.strip()
        if not text:
            raise DsskError("there is no text: paste one")
        start = time.perf_counter()
        (states,) = encode_texts(self.model, self.tokenizer, [text])
        projected = self.model.project_context(states[None])
        self._wait()
        seconds = time.perf_counter() - start
        pieces = token_texts(self.tokenizer, prompts.context(text))[: len(states)]
        return Encoded(text, pieces, states, projected, len(tokenize_context(self.tokenizer, text)), seconds)

    def answer(self, question: str, context: Encoded) -> Answered:
        """Answer from a context, and prompt the base with the same to compare the time."""
        question = question.strip()
        if not question:
            raise DsskError("there is no question: type one")
        clock = _Clock(self._wait)
        text = self.model.answer(question, context.projected, self.tokenizer, streamer=clock)
        times = clock.first_token_seconds, clock.seconds
        weights = [0.0] * len(context.pieces)
        if text:
            attention = attend(self.model, self.tokenizer, question, text, context.states)
            weights = attention.of_answer().mean((0, 1)).tolist()
        return Answered(text, weights, *times, self._prompted(question, context, clock.tokens))

    def _prompted(self, question: str, context: Encoded, new_tokens: int) -> tuple[float, float] | None:
        """Seconds to the first and to the last of as many tokens of the base; None if the text does not fit into it."""
        text = "".join(context.pieces) + prompts.question_after_context(question)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if ids.shape[1] + new_tokens > self.model.config.max_position_embeddings:
            return None
        clock = _Clock(self._wait)
        self.model.generate(
            ids.to(self.model.device),
            attention_mask=torch.ones_like(ids).to(self.model.device),
            streamer=clock,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return clock.first_token_seconds, clock.seconds

    def _wait(self) -> None:
        """Until the device has done what it was told."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class _Clock(BaseStreamer):
    """Counts and times the tokens that are generated."""

    def __init__(self, wait):
        self._wait = wait
        self._start = time.perf_counter()
        self.tokens = -1  # the prompt comes first
        self.first_token_seconds = self.seconds = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        self._wait()
        self.seconds = time.perf_counter() - self._start
        if self.tokens == 1:
            self.first_token_seconds = self.seconds

    def end(self) -> None:
        pass


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


def describe(context: Encoded, model: CrossAttnGPTBigCodeForCausalLM) -> str:
    """One line: what was read, how long it took, and what keeping it takes."""
    config, tokens = model.config, len(context.states)
    read = (
        f"{tokens} tokens" if tokens == context.tokens else f"the first {tokens} of {context.tokens} tokens"
    )
    kept, cache = (
        tokens * values * torch.bfloat16.itemsize for values in (config.n_embd, kv_cache_values(config))
    )
    return (
        f"Encoded {read} in {context.seconds:.3f} s: {size(kept)} to keep in bfloat16; "
        f"the base's keys and values of them would be {size(cache)}."
    )


def seconds_table(answered: Answered) -> str:
    """What the answer took, in Markdown."""
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
    return f'<p>What the answer attended to:</p><p style="white-space: pre-wrap; line-height: 1.8">{"".join(spans)}</p>'


def launch(page: Any, host: str, port: int, block: bool = True) -> str:
    """Serve the page and say where; returns that address, when it ends if `block`."""
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise DsskError(f"cannot listen on {host}, port {port}: choose another --port") from error
    print(address, flush=True)
    if block:
        page.block_thread()
    return address


def serve(checkpoint: str, host: str, port: int) -> None:
    """Load a model and serve the page until someone ends it."""
    import_gradio()
    model, tokenizer = load_model(checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    launch(build_page(Reader(model, tokenizer)), host, port)
