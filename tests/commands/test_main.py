"""The command `dssk`: at once there, helpful about what it takes, and known by the names of version 0.1."""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest

import dssk
from dssk.__main__ import VERBS, main
from dssk.errors import exit_code_of
from dssk.inference.rounding import TORCH_DTYPES
from dssk.utils.defaults import STORAGE_DTYPES
from dssk.utils.flags import Parser
from dssk.utils.old_names import OLD_NAMES
from tests.conftest import REPOSITORY

UNITS = {
    "TOKENS",
    "QUESTIONS",
    "CONTEXTS",
    "ROWS",
    "STEPS",
    "PROCESSES",
    "CHARACTERS",
    "CHECKPOINTS",
    "PROMPTS",
    "DOCUMENTS",
}
UNITS |= {"LAYERS", "HEADS", "VALUES", "SHARE", "RATE", "WEIGHT", "SEED", "RANK", "PORT", "SECONDS", "TEXTS"}
HEAVY = {"torch", "transformers", "datasets", "pydantic", "numpy", "pyarrow", "huggingface_hub", "tqdm"}
MAX_CPU_SECONDS = 0.3  # more than Python itself


def parsers(verb: str) -> Iterator[Parser]:
    """The parser of a command and those of its sub-commands."""
    parser = import_module(f"dssk.commands.{verb}").build_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.fixture(scope="module")
def nothing() -> float:
    """What Python itself takes, in CPU seconds."""
    return cpu_seconds("-c", "pass")


def cpu_seconds(*words: str) -> float:
    """User and system time of a Python process, the median of three."""
    times = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    return statistics.median(times)


@pytest.mark.parametrize(
    "words",
    [
        ("-c", "import dssk"),
        ("-m", "dssk", "--help"),
        ("-m", "dssk", "--version"),
        *(("-m", "dssk", verb, "--help") for verb in VERBS),
    ],
    ids=" ".join,
)
def test_help_answers_at_once(words, nothing):
    assert cpu_seconds(*words) < nothing + MAX_CPU_SECONDS


@pytest.mark.parametrize("verb", VERBS)
def test_no_help_imports_what_is_heavy(verb):
    code = (
        "import sys; from dssk.__main__ import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        f"except SystemExit: print(*({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "", done.stderr


def test_every_command_is_listed_and_every_listed_one_exists(capsys):
    files = {file.stem for file in (REPOSITORY / "dssk" / "commands").glob("*.py")} - {"__init__"}
    assert files == set(VERBS)
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_default_and_the_unit_of_every_flag(verb):
    for parser in parsers(verb):
        assert parser.prog.startswith(f"dssk {verb}")
        formatter = parser._get_formatter()
        for action in parser._actions:
            assert action.help, f"{action.option_strings} has no help"
            shown = formatter._expand_help(action)
            if action.option_strings and action.nargs != 0 and action.default not in (None, [], {}):
                value = " ".join(action.default) if isinstance(action.default, list) else str(action.default)
                assert (value.lower() if isinstance(action.default, bool) else value) in shown, action
            if action.option_strings and action.nargs != 0 and not action.required:
                assert shown.count("(default: ") == 1, action
            if isinstance(action.default, int | float) and not isinstance(action.default, bool):
                assert action.metavar in UNITS, f"{action.option_strings} shows no unit"
            if getattr(action.type, "__name__", "") in ("positive_int", "count", "int", "float"):
                assert action.metavar in UNITS, f"{action.option_strings} shows no unit"


def test_the_types_that_flags_offer_are_those_that_can_be_kept():
    assert set(STORAGE_DTYPES) == set(TORCH_DTYPES)


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["evalute"]) == 2
    said = capsys.readouterr().err
    assert said == "dssk: error: unknown command 'evalute', did you mean evaluate? (see dssk --help)\n"


def test_a_command_alone_shows_help_and_is_no_success(capsys):
    assert main([]) == 2
    assert "usage: dssk COMMAND" in capsys.readouterr().out


def test_a_mistyped_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--discrad", "x"])
    assert caught.value.code == 2
    line = "dssk: error: unknown flag --discrad, did you mean --discard? (see dssk verify --help)\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(unbuffered):
    code = "from dssk.errors import exit_code_of\nraise SystemExit(exit_code_of(lambda: print('line\\n' * 100_000)))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert (done.stdout, done.stderr, done.returncode) == ("line\n", "", 141)


def test_a_broken_pipe_of_another_kind_is_our_fault():
    def main() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        exit_code_of(main)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dssk {dssk.__version__}\n"


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_of_version_01_go_on_working(name):
    done = subprocess.run([sys.executable, "-m", name, "-h"], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: dssk {OLD_NAMES[name]} ")


def test_an_old_name_spawns_processes(tmp_path):
    """A spawned process imports the main module by its name: it must not be one that only `-m` finds."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[:1] == ['-m']:\n"
        "    import dssk.commands.jobs as jobs, multiprocessing\n"
        "    def main(argv):\n"
        "        with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.apply(abs, [-3]))\n"
        "    jobs.main = main\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "dssk.jobs.table"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize("words", [("dssk", "jobs"), ("dssk.jobs.table",)])
def test_a_command_finds_the_module_of_today_that_has_an_old_name(words):
    done = subprocess.run(
        [sys.executable, "-m", *words, "nowhere"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 2
    assert done.stderr.startswith("dssk: error: no experiment in nowhere")
