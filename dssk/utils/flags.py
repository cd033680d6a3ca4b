"""The argument parser that every command of dssk uses: strict, and helpful about a mistyped flag."""

import argparse
import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn


def nearest(word: str, known: Iterable[str]) -> str:
    """`", did you mean X?"` for the known word that `word` most resembles, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]}?" if match else ""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it was written, and every flag with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        unsaid = action.default in (None, argparse.SUPPRESS, [], {}) or action.nargs == 0
        if unsaid or "%(default)" in text or not action.option_strings:
            return text
        return f"{text} (default: {str(action.default).lower() if action.default in (True, False) else '%(default)s'})"


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
    """Parse a whole number of at least 1; `25_000` is accepted."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 1")
    return value


def count(text: str) -> int:
    """Parse a whole number of at least 0."""
    return 0 if text.strip() == "0" else positive_int(text)


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
