"""What a user reads when something goes wrong: one short line that a terminal can show, and an exit code."""

import errno

import pytest

from dssk import errors
from dssk.errors import DamagedData, DsskError, exit_code_of, short


def failing(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines",
        "\x1b[2J escape codes",
        "half a pair \ud800",
        "\u202e from the right",
        "k" * 100_000 + ": mend it",
    ],
)
def test_a_message_is_one_printable_line_of_some_hundred_characters(capsys, text):
    assert exit_code_of(failing(DamagedData(text))) == DamagedData.exit_code
    said = capsys.readouterr().err.removesuffix("\n")
    assert said.isprintable()
    assert said.isascii()
    assert said.startswith("dssk: error: ")
    assert len(said) < 4 * errors.MAX_MESSAGE_CHARACTERS


def test_a_long_message_keeps_its_beginning_and_what_to_do():
    said = short("begin" + "x" * 1000 + ": mend it", 50)
    assert len(said) == 50
    assert said.startswith("begin")
    assert said.endswith(": mend it")


def test_a_short_message_stays_as_it_is():
    assert short("é 日本 fits") == "é 日本 fits"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "a name is too long: xxx"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), 3, "Permission denied: /a/b"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), 3, "No space left on device: /a"),
        (MemoryError(), 3, "out of memory: lower what is done"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, code, line, capsys):
    assert exit_code_of(failing(error)) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"dssk: error: {line}")


def test_what_is_no_mistake_of_a_user_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(failing(ZeroDivisionError()))
    with pytest.raises(OSError, match="odd"):
        exit_code_of(failing(OSError(errno.ECHILD, "odd", "/a")))
    assert exit_code_of(failing(KeyboardInterrupt())) == 130
    assert exit_code_of(lambda: None) == 0
    assert exit_code_of(failing(DsskError("x"))) == 2
