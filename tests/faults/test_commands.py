"""A few inputs, flips, kills and pairs of each command on this folder's page; `make test-faults` does thousands."""

import os

import pytest

from tests.faults import flip, fuzz, kill, mutants, processes, race
from tests.faults.campaign import Campaign, Case, broken_rule, run_campaign
from tests.faults.mutant_list import MUTANTS
from tests.faults.processes import Done


@pytest.fixture(autouse=True)
def _environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """One world for all; the processes that run commands are forked from one, which has imported all of dssk."""
    before = dict(os.environ)
    yield Campaign(tmp_path_factory.mktemp("faults"), seed=1)
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "count"), [(fuzz, 20), (flip, 12)])
def test_mutated_inputs_and_flipped_bytes_break_no_rule(campaign, command, count):
    assert run_campaign(command.make_case, "cases", count, campaign=campaign) == 0


@pytest.mark.slow
def test_a_killed_command_loses_nothing(campaign):
    assert kill.kill_all(1, 0, ["library add", "export"], campaign=campaign) == 0


@pytest.mark.slow
def test_of_two_commands_one_goes_on(campaign):
    assert race.race_all(1, 0, ["library add", "export"], campaign=campaign) == 0


def test_every_mutant_fits_the_package():
    assert mutants.misfits() == []
    assert len(MUTANTS) >= 80
    assert len(set(MUTANTS)) == len(MUTANTS)


@pytest.mark.parametrize(
    ("code", "err", "broken"),
    [
        (0, "", False),
        (2, "dssk: error: no\n", False),
        (4, "dssk: cut\ndssk: error: no\n", False),
        (1, "dssk: error: no\n", True),
        (-11, "", True),
        (None, "", True),
        (2, "", True),
        (2, "dssk: error: no\nmore\n", True),
        (2, "Warning\ndssk: error: no\n", True),
        (0, "Traceback (most recent call last):\n", True),
        (2, "dssk: error: " + "x" * 2000 + "\n", True),
        (2, "dssk: error: \x1b[31m\n", True),
    ],
)
def test_the_rules(code, err, broken):
    assert bool(broken_rule(Done(["x"], code, "", err, 1.0), Case(["x"], []))) == broken


def test_a_mutant_is_made_in_a_copy_alone(tmp_path, monkeypatch):
    mutant = next(mutant for mutant in MUTANTS if mutant.file == "dssk/errors.py")
    (tmp_path / "dssk").mkdir()
    file = tmp_path / mutant.file
    file.write_text((mutants.REPOSITORY / mutant.file).read_text())
    whole, seen = file.read_text(), []

    class Running:
        """A pytest that fails with the fault; and without it, too, if `flaky`."""

        flaky = False

        def __init__(self, call, folder, stdin, words, failed):
            seen.append(file.read_text())
            self.broken = seen[-1] != whole
            if self.broken:
                failed.write_text("tests/test_errors.py::test_one")
            else:
                assert words == ["tests/test_errors.py::test_one"]

        def done(self, limit_seconds):
            return Done([], mutants.NOTICED if self.broken or self.flaky else mutants.PASSED, "", "", 1.0)

    monkeypatch.setattr(mutants, "Running", Running)
    assert mutants.try_one(mutant, tmp_path) == ""
    assert seen == [whole.replace(mutant.before, mutant.after), whole]
    assert seen[0] != file.read_text() == whole
    Running.flaky = True
    assert "fails without it" in mutants.try_one(mutant, tmp_path)
    assert processes.LIMIT_SECONDS == 60
