"""Imports go one way, and the tree drawn in docs/architecture.md is the tree."""

import ast
import re
import subprocess

from tests.conftest import REPOSITORY

# A module may import those of its own level and of the levels above its line.
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
    ["commands"],
]


def level(module: str) -> int:
    return next(
        i for i, names in enumerate(LEVELS) if any(module == n or module.startswith(f"{n}.") for n in names)
    )


def test_imports_go_one_way():
    for file in sorted((REPOSITORY / "dssk").rglob("*.py")):
        module = ".".join(file.relative_to(REPOSITORY / "dssk").with_suffix("").parts)
        if module.endswith("__init__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dssk"):
                names = [node.module] if node.module != "dssk" else [f"dssk.{a.name}" for a in node.names]
                for name in names:
                    imported = name.removeprefix("dssk").removeprefix(".")
                    assert level(imported) <= level(module), f"{module} imports {imported}"


def test_the_documented_tree_is_the_tree():
    drawn = set(re.findall(r"^`?([\w./-]+)`? +", tree_lines(), re.MULTILINE))
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    files = {f for f in tracked.splitlines() if not f.startswith("tests/") and not f.endswith("__init__.py")}
    assert drawn == files


def tree_lines() -> str:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    return text.split("```tree\n")[1].split("```")[0]


def test_no_secret_and_no_pickle_can_enter_through_the_code():
    banned = re.compile(
        r"\b(pickle\.(load|dump)|import pickle|torch\.load\(|shell=True|os\.system\(|eval\(|yaml\.load\(|except:)"
    )
    for file in [*(REPOSITORY / "dssk").rglob("*.py"), REPOSITORY / "trainval.py"]:
        found = [
            line for line in file.read_text().splitlines() if banned.search(line) and ".eval(" not in line
        ]
        assert not found, f"{file}: {found}"
