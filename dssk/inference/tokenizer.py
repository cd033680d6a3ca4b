"""The tokenizer: loading it, with the one decision about padding and end of text, and the prompts as its tokens."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dssk import prompts
from dssk.errors import DsskError

PAD_TOKEN = "<fim_pad>"  # noqa: S105 - StarCoder's; distinct from EOS, so that EOS stays in the loss
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GPTBigCode model from a folder or from the Hub.

    StarCoder defines no padding token and BOS = EOS. Padding with EOS would hide EOS from the loss and the model
    would never learn to stop, so `<fim_pad>` pads.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DsskError(f"no tokenizer at {path}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise DsskError(
            f"the tokenizer at {path} has no end-of-text token: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if PAD_TOKEN not in tokenizer.get_vocab():
            raise DsskError(
                f"the tokenizer at {path} has neither a padding token of its own nor {PAD_TOKEN}: set pad_token in its "
                "tokenizer_config.json to a token other than end of text"
            )
        tokenizer.pad_token = PAD_TOKEN
    return tokenizer


# --- the prompts as tokens -------------------------------------------------------------------------------------


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text and nothing else."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a context, as they are encoded; all of them."""
    return tokenize(tokenizer, prompts.context(text))


def tokenize_question(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the decoder reads before it answers."""
    return tokenize(tokenizer, prompts.question(text))


def tokenize_question_after_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What follows `tokenize_context` where a prompt holds its context."""
    return tokenize(tokenizer, prompts.question_after_context(text))


def tokenize_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the decoder then writes: the answer and the end of text."""
    return [*tokenize(tokenizer, prompts.answer(text)), tokenizer.eos_token_id]
