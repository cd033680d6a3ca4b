"""The messages that docs/troubleshooting.md explains are those that the package gives."""

import ast
import re
from collections.abc import Iterator

import dssk
from tests.conftest import REPOSITORY

OTHERS = {  # of the shell, of the system, of torch; and of what says nothing
    "dssk: command not found",
    "Every command takes half a minute to start",
    "Killed, exit code 137",
    "CUDA out of memory",
    "DeepSpeed starts and nothing more happens",
}
MIN_MESSAGES = 20


def messages() -> list[str]:
    headings = re.findall(
        r"^### (.+)$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
    )
    return [heading.split("`, `")[0].removeprefix("`").removesuffix("`") for heading in headings]


def texts() -> Iterator[str]:
    """Every text in the code, what is filled in as an ellipsis."""
    for file in (REPOSITORY / "dssk").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield re.sub("…+", "…", "".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_is_one_of_the_package():
    known = list(texts())
    told = [message for message in messages() if message not in OTHERS]
    assert len(told) >= MIN_MESSAGES
    for message in told:
        assert any(message in text for text in known), f"the package never says: {message}"


def test_the_citation_is_of_this_version():

    assert f"version: {dssk.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"## {dssk.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
