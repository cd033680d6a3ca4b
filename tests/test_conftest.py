"""What the tests say of themselves, and what of a user's environment never reaches them."""

import os
from types import SimpleNamespace

from tests import conftest


def last_line(*skipped: str) -> str:
    """The last line of a run in which tests were skipped for these reasons."""
    lines: list[str] = []
    reports = [SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}")) for reason in skipped]
    reporter = SimpleNamespace(stats={"skipped": reports}, write_line=lines.append)
    plugins = SimpleNamespace(get_plugin={"terminalreporter": reporter}.get)
    conftest.pytest_unconfigure(
        SimpleNamespace(pluginmanager=plugins, option=SimpleNamespace(collectonly=False))
    )
    return lines[-1]


def test_the_last_line_says_what_was_skipped_and_how_to_get_it():
    browser = "no Chromium on this machine: apt-get install chromium"
    said = last_line(browser, "no real data beside the checkout", browser)
    assert said.startswith(
        f"skipped: 2 ({browser}); 1 (no real data beside the checkout). Not part of this: "
    )
    assert last_line().startswith("skipped: none. ")
    for target in ("test-slurm", "test-launchers", "test-faults"):
        assert f"make {target}" in said
        assert f"\n{target}:" in (conftest.REPOSITORY / "Makefile").read_text()


def test_no_setting_of_the_users_wandb_reaches_a_test():
    assert not {"WANDB_MODE", "WANDB_API_KEY"} & set(os.environ)
