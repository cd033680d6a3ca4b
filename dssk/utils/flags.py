"""The argument parser that every command of dssk uses: strict, and helpful about a mistyped flag."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from dssk.utils.defaults import BATCH_SIZE, CONTROLS, LARGEST, MAX_NEW_TOKENS, SEEDS


def nearest(word: str, known: Iterable[str]) -> str:
    """`", did you mean X?"` for the known word that `word` most resembles, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it was written, and every optional flag with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "(default: " in text or action.required or action.nargs == 0 or not action.option_strings:
            return text
        if isinstance(default, list | tuple):
            default = " ".join(default)
        shown = str(default).lower() if isinstance(default, bool) else default
        return f"{text} (default: {'none' if shown in (None, '', {}) else shown})"


class Parser(argparse.ArgumentParser):
    """`argparse` without abbreviations; an error is one line that names the nearest known flag and exits 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if flags:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unknown flag {flags[0]}{nearest(flags[0], known)}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return namespace

    def error(self, message: str) -> NoReturn:
        print(f"dssk: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def bool_flag(text: str) -> bool:
    """Parse a flag's value as launchers re-send it: true/false, 1/0, yes/no in any case."""
    value = text.strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off", "none", ""):
        return False
    raise argparse.ArgumentTypeError(f"got {text!r}, want true or false")


def optional_str(text: str) -> str | None:
    """Parse a text flag; the empty text and the text `None`, which launchers re-send, mean "not given"."""
    return None if text in ("", "None") else text


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1, and no absurd one; `25_000` is accepted."""
    return _whole(text, 1, LARGEST)


def count(text: str) -> int:
    """Parse a whole number of at least 0."""
    return 0 if text.strip() == "0" else positive_int(text)


def seed(text: str) -> int:
    """Parse a seed, as an experiment has it: a whole number from 0 to 2^32 - 1."""
    return _whole(text, 0, SEEDS - 1)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number from {least} to {most}")
    return value


def minutes(text: str) -> float | None:
    """Parse CPU minutes, above 0; what launchers re-send for "not given" is None."""
    if optional_str(text) is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, want CPU minutes, such as 30")
    return value


# --- flags that several commands have -----------------------------------------------------------------------------


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="a checkpoint, a fused model, or the folder of a run"
    )


def add_generation(parser: argparse._ActionsContainer, batch_flag: str = "--batch_size") -> None:
    """How answers are generated."""
    parser.add_argument(
        batch_flag,
        type=positive_int,
        default=BATCH_SIZE,
        metavar="QUESTIONS",
        help="most questions in a batch",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=MAX_NEW_TOKENS,
        metavar="TOKENS",
        help="maximum length of an answer",
    )


def add_scoring(parser: argparse._ActionsContainer) -> None:
    """Which questions are scored, and under which controls."""
    add = parser.add_argument
    add("--controls", default=",".join(CONTROLS), metavar="NAME,...", help="controls of the fused model")
    add(
        "--num_contexts",
        metavar="N,N,...",
        help="score also with N contexts for each question, once with its own among them and once without",
    )
    add(
        "--distractors",
        default="random",
        metavar="SOURCE,...",
        help="where the other contexts are drawn from: document (the same one), neighbours (BM25), random",
    )
    add(
        "--max_questions",
        type=positive_int,
        metavar="QUESTIONS",
        help="score a sample of this size, spread evenly over the split (default: all)",
    )


def add_passages(parser: argparse._ActionsContainer, longest: str, **switch: Any) -> None:
    """How long texts become passages, of `longest` if nothing else is said; `switch` says how a switch is parsed."""
    add = parser.add_argument
    switch = switch or {"action": "store_true"}
    add(
        "--passage_tokens",
        type=positive_int,
        metavar="TOKENS",
        help=f"split longer texts into passages of at most this length, at sentence ends (default: {longest})",
    )
    add(
        "--overlap",
        type=count,
        default=0,
        metavar="TOKENS",
        help="approximate overlap of consecutive passages",
    )
    add(
        "--truncate",
        **switch,
        help="cut longer texts off instead of splitting them, and report the number of tokens lost",
    )


def add_title(parser: argparse._ActionsContainer, **switch: Any) -> None:
    switch = switch or {"action": "store_true"}
    parser.add_argument("--repeat_title", **switch, help="begin each passage with the title of its document")
