"""The tokenizer: loading it, with the one decision about padding and end of text, and the prompts as its tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from dssk import prompts
from dssk.errors import DsskError, short
from dssk.inference.faults import loading
from dssk.utils.hub_names import is_on_hub

# Tokens for fill-in-the-middle as StarCoder, SantaCoder and Qwen spell them: prefix, middle, suffix, padding.
FIM_SPELLINGS = tuple(
    tuple(spelling.format(name) for name in ("prefix", "middle", "suffix", "pad"))
    for spelling in ("<fim_{}>", "<fim-{}>", "<|fim_{}|>")
)
*FIM_TOKENS, PAD_TOKEN = FIM_SPELLINGS[0]


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a decoder from a folder or from the Hub; it then has a padding token.

    That is its own, or the one for fill-in-the-middle, or end of text. All of them would do: padding is known by
    the lengths of the rows and never by its id, so that end of text stays in the loss and the model learns to stop.
    """
    is_on_hub(str(path), "tokenizer")  # refuses what is neither there nor here
    with loading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        # JSON can say half a character, which could not be saved again.
        json.dumps(tokenizer.init_kwargs, ensure_ascii=False, default=str).encode()
        tokenizer("a")  # a setting of another type shows when it is used
    if tokenizer.eos_token_id is None:
        raise DsskError(
            f"the tokenizer at {path} has no end-of-text token: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        known = tokenizer.get_vocab()
        spellings = [pad for *_, pad in FIM_SPELLINGS if pad in known]
        tokenizer.pad_token = spellings[0] if spellings else tokenizer.eos_token
    return tokenizer


def fim_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int] | None:
    """The ids of the prefix, middle and suffix tokens of fill-in-the-middle, or None for a tokenizer without."""
    known = tokenizer.get_vocab()
    for prefix, middle, suffix, _ in FIM_SPELLINGS:
        if {prefix, middle, suffix} <= known.keys():
            return known[prefix], known[middle], known[suffix]
    return None


# --- the prompts as tokens -------------------------------------------------------------------------------------


def encoded(tokenizer: PreTrainedTokenizerBase, texts: str | list[str], **how: Any) -> BatchEncoding:
    """A text, or each of several, as the tokenizer gives it, without special tokens.

    Raises `DsskError` for what no tokenizer takes: halves of surrogate pairs, such as stray bytes of a shell.
    """
    for text in [texts] if isinstance(texts, str) else texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = f"half a surrogate pair at {error.start}"
            raise DsskError(f"{short(text, 60)!r}: {place}, which is no text") from None
    return tokenizer(texts, add_special_tokens=False, verbose=False, **how)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text and nothing else."""
    return encoded(tokenizer, text)["input_ids"]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: BOS for Llama and Gemma, none for StarCoder.

    They stand before every text that is encoded and before all that the decoder reads, as in the base's training.
    """
    whole, text = tokenizer("a")["input_ids"], tokenize(tokenizer, "a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[: next(starts, 0)]


def template_version(tokenizer: PreTrainedTokenizerBase) -> int:
    """The version of the prompts as they are tokenized; encodings made with another one are refused."""
    return prompts.LEADING_TEMPLATE_VERSION if leading_ids(tokenizer) else prompts.TEMPLATE_VERSION


def tokenize_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a context, as they are encoded; all of them."""
    return tokenize_contexts(tokenizer, [text])[0]


def tokenize_contexts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The same for many contexts, which takes far less time than one by one."""
    leading = leading_ids(tokenizer)
    prompted = encoded(tokenizer, [prompts.context(text) for text in texts], return_attention_mask=False)
    return [leading + ids for ids in prompted["input_ids"]]


def tokenize_further_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of every context after the first in a prompt that holds several."""
    return tokenize(tokenizer, prompts.further_context(text))


def tokenize_question(
    tokenizer: PreTrainedTokenizerBase, text: str, reader: str = "cross_attention"
) -> list[int]:
    """The decoder's prompt for a question.

    With a merged reader the context precedes it in the same cache, so it is the continuation of a prompt.
    """
    if reader == "merged":
        return tokenize_question_after_context(tokenizer, text)
    return leading_ids(tokenizer) + tokenize(tokenizer, prompts.question(text))


def tokenize_question_after_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The continuation of `tokenize_context` in a prompt that holds its context; no special token between them."""
    return tokenize(tokenizer, prompts.question_after_context(text))


def tokenize_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The decoder's target: the answer and the end-of-text token."""
    return [*tokenize(tokenizer, prompts.answer(text)), tokenizer.eos_token_id]
