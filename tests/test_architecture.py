"""Imports go one way, every room says what lives in it, and the tree drawn in docs/architecture.md is the tree."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "dssk"

# A module may import those of its own line and of the lines above it, wherever in its code the import stands.
LEVELS = [
    ["errors", "prompts", "utils"],
    ["config"],
    ["models"],
    ["run_folder", "checkpoint"],
    ["inference"],
    ["store"],
    ["data"],
    ["evaluation"],
    ["hub"],
    ["training"],
    ["jobs", "report", "demo"],
    ["research"],
    [
        "commands",
        "data.preproc_nq",
        "",
        "__main__",
    ],  # the last two are the package itself and the command `dssk`
]
MAX_LOOSE_MODULES = 6


def level(module: str) -> int:
    """The line of the longest name that a module goes by."""
    lines = {name: line for line, names in enumerate(LEVELS) for name in names}
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next(lines[name] for name in names if name in lines)


def modules(root: Path) -> dict[str, Path]:
    """Every module by its name below dssk, packages by the name of their folder; "" is dssk itself."""
    return {
        ".".join(file.relative_to(root).with_suffix("").parts)
        .removesuffix("__init__")
        .removesuffix("."): file
        for file in sorted(root.rglob("*.py"))
    }


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this package that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "dssk":
                inside = name.removeprefix("dssk").removeprefix(".")
                yield inside if inside in known else inside.rpartition(".")[0]


def wrong_imports(root: Path) -> list[str]:
    known = modules(root)
    return [
        f"{module} imports {imported}"
        for module, file in known.items()
        for imported in imports(file, known)
        if level(imported) > level(module)
    ]


def test_imports_go_one_way():
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("store/__init__.py", "from dssk.data import plan"),
        ("store/manifest.py", "def f():\n    import dssk.data.plan"),
        ("errors.py", "from dssk import config"),
        ("utils/files.py", "from dssk import __version__"),
        ("training/run.py", "from dssk.commands.train import main"),
        ("demo/page.py", "from dssk.research import toy"),
        ("data/preprocess.py", "from dssk.data.preproc_nq import main"),
    ],
)
def test_an_import_against_the_direction_is_found(tmp_path, file, code):
    for folder in ("store", "data", "utils", "training", "commands", "demo", "research"):
        (tmp_path / folder).mkdir()
    for name in (
        "__init__",
        "data/plan",
        "config",
        "commands/train",
        "research/toy",
        "data/preproc_nq",
        "research/__init__",
    ):
        (tmp_path / f"{name}.py").touch()
    assert wrong_imports(tmp_path) == []
    (tmp_path / file).write_text(code)
    assert len(wrong_imports(tmp_path)) == 1


def test_models_know_tensors_and_configurations_alone():
    known = modules(PACKAGE)
    for module, file in known.items():
        if module.startswith("models."):
            assert {imported.partition(".")[0] for imported in imports(file, known)} <= {"models"}, module
            names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
            assert not [name for name in names if "okenizer" in name], module


def test_no_modules_import_each_other():
    known = modules(PACKAGE)
    graph = {module: {i for i in imports(file, known) if i} - {module} for module, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {error.args[1]}")


def test_every_room_says_in_one_line_what_lives_there():
    for file in PACKAGE.rglob("*/__init__.py"):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert re.fullmatch(r"[A-Z][^\n]+\.", text), f"{file}: want a docstring of one line"


def test_few_modules_lie_outside_of_the_rooms():
    loose = {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert len(loose) <= MAX_LOOSE_MODULES, f"{sorted(loose)}: put new ones into a room"


def test_flags_are_parsed_in_the_commands_alone():
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "commands" and file != PACKAGE / "utils" / "flags.py":
            found = re.search(r"add_argument|ArgumentParser|\bParser\(", file.read_text())
            assert not found, f"{file} parses flags"


def test_the_documented_tree_is_the_tree():
    drawn = re.findall(r"^`?([\w./-]+)`? +", tree_lines(), re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    files = {f for f in tracked.splitlines() if not f.startswith("tests/") and not f.endswith("__init__.py")}
    assert set(drawn) == files


def tree_lines() -> str:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    return text.split("```tree\n")[1].split("```")[0]


def test_no_secret_and_no_pickle_can_enter_through_the_code():
    banned = re.compile(
        r"\b(pickle\.(load|dump)|import pickle|torch\.load\(|shell=True|os\.system\(|eval\(|yaml\.load\(|except:)"
    )
    for file in [*PACKAGE.rglob("*.py"), REPOSITORY / "trainval.py"]:
        found = [
            line for line in file.read_text().splitlines() if banned.search(line) and ".eval(" not in line
        ]
        assert not found, f"{file}: {found}"
