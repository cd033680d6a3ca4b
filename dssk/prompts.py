"""Every string the model reads or must produce. Training and inference call the same functions.

Tokenize a prompt and what follows it separately: then a prompt's tokens are exactly the first tokens of its
training text, whatever the tokenizer merges.
"""

# Raise both when any string below changes: encodings made with another version are refused.
TEMPLATE_VERSION = 1
LEADING_TEMPLATE_VERSION = 2  # the same strings, after the special tokens that a tokenizer puts first

YES = "Yes"
NO = "No"
NOT_IN_CONTEXT = "Answer not in context."


def context(text: str) -> str:
    """The text of a context, as it is encoded and as the decoder learns to repeat it."""
    return f"context: {text}"


def further_context(text: str) -> str:
    """What follows `context(...)` in a prompt that holds several."""
    return f" \n {context(text)}"


def question(text: str) -> str:
    """The decoder's prompt."""
    return f"question: {text} \n answer:"


def question_after_context(text: str) -> str:
    """What follows `context(...)` in a prompt that holds its context: for models without cross-attention."""
    return f" \n {question(text)}"


def answer(text: str) -> str:
    """What follows `question(...)`; the end-of-text token comes after it."""
    return f" {text}"


def worked_answer(text: str) -> str:
    """What follows `question_after_context(...)` in a few-shot example; the next one, or the prompt, comes after it."""
    return f"{answer(text)}\n\n"


def repeat_task(what: str) -> str:
    """The head of a repetition task: the model then repeats `what` (question, answer, both or context)."""
    return f"repeat {what}:"
