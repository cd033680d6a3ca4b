"""The README's commands, pasted in order into one shell after `make demo`, work."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from dssk.config import expand_group
from exp_configs import EXP_GROUPS
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
DEMO = "runs/demo/seed-0"


def blocks() -> str:
    """Every block of shell in the README, as one script."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE))


@pytest.fixture
def shell(tmp_path):
    """Runs a script where a clone would be, in which nothing but bash's own words and dssk can be found."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    for name, words in (("python", f"{sys.executable}"), ("dssk", f"{sys.executable} -m dssk")):
        (binaries / name).write_text(f'#!/bin/bash\nexec {words} "$@"\n')
        (binaries / name).chmod(0o755)
    for name in ("exp_configs.py", "job_configs.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    environment = {
        **os.environ,
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
    }

    def shell(script: str) -> str:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return shell


def demo_commands() -> str:
    """What `make demo` runs, as small as it can be."""
    recipe = re.search(r"^demo: install\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    script = (
        recipe.replace("$(BIN)/", "").replace("$(TOY)", DEMO).replace("$(SEED)", "0").replace("\t@", "\t")
    )
    for flag, small in (("--steps 800 --log_every 200", "--steps 2 --log_every 2"), ("--dataset toy", "")):
        assert flag in script
        script = script.replace(flag, small) if small else script
    script = script.replace("dssk base ", "dssk base --steps 0 ")
    script = script.replace("dssk preproc ", "dssk preproc --max_examples 80 ")
    return script.replace("dssk evaluate ", "dssk evaluate --max_questions 20 ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_pasted_after_the_demo_works(shell, tmp_path):
    said = shell(f"source .venv/bin/activate\n{demo_commands()}")
    run = next((tmp_path / DEMO / "runs").glob("*/final")).parent
    assert (run / "scores.json").exists()
    assert "right_beats_wrong" in (run / "scores.json").read_text()
    following = [line.split("#")[0].split()[:2] for line in said.partition("Next:\n")[2].splitlines()]
    assert following == [
        ["source", ".venv/bin/activate"],
        ["dssk", "report"],
        ["dssk", "answer"],
        ["make", "compare"],
    ]

    said = shell(blocks())
    assert str(run / "report.html") in f"{tmp_path}/{said.split('report.html')[0].split()[-1]}report.html"
    assert "No scores yet" not in (run / "report.html").read_text()
    assert len(list((tmp_path / "runs" / "mine").glob("*/scores.json"))) == 1
    assert "amber-falls" in said


def test_every_command_that_the_readme_names_exists():
    from dssk.__main__ import VERBS

    texts = [README, *(file.read_text() for file in (REPOSITORY / "docs").glob("*.md")), MAKEFILE]
    named = {
        verb for text in texts for verb in re.findall(r"(?:^|`|/|-m |&& )dssk ([a-z_]+)", text, re.MULTILINE)
    }
    assert named <= set(VERBS)
    assert {"preproc", "train", "evaluate", "answer", "library", "report", "compare"} <= named


def test_every_file_that_the_documents_link_to_exists():
    for file in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name} links to {link}"


def recipe(target: str) -> str:
    return re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]


def test_the_demo_installs_no_test_tools_and_says_what_comes_on_top():
    assert re.search(r"^demo: install$", MAKEFILE, re.MULTILINE)
    assert re.search(r"^install: \.venv/\.installed$", MAKEFILE, re.MULTILINE)
    installs = recipe(".venv/.installed")
    assert re.findall(r"\$\(PIP\) (.*)", installs) == ["torch", "-e ."]
    assert "--quiet" not in installs  # pip's own bars are the progress
    assert re.search(r'@echo ".*into \.venv, once: \d to \d GB', installs)


def test_the_experiment_of_the_demo_names_the_base_that_the_demo_makes():
    assert "TOY = runs/demo/seed-$(SEED)" in MAKEFILE
    assert "SEED ?= 0" in MAKEFILE
    assert "dssk base --dataset toy --seed $(SEED) --output $(TOY)/base" in recipe("demo")
    assert {exp_dict["model_path"] for exp_dict in EXP_GROUPS["crossattn_tiny"]} == {f"{DEMO}/base"}


def real_commands(variables: str) -> str:
    """What `make real` would run."""
    command = ["make", "-n", "-o", "install", "real", *variables.split()]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True).stdout


def test_make_real_scores_states_of_the_layers_that_each_group_named_for_it_reads():
    """Each group is one experiment, too: `dssk train` would take the first of several."""
    texts = [README, (REPOSITORY / "docs" / "readers.md").read_text(), MAKEFILE]
    named = {group for text in texts for group in re.findall(r"\bGROUP=(\w\S+\w)", text)}
    assert named == {"merged_replay_smollm2-135m", "merged_replay_two_smollm2-135m"}
    for words in ("", *(f"GROUP={group}" for group in named)):
        shown = real_commands(words)
        (group,) = set(re.findall(r"train -e (\S+)", shown))
        (exp_dict,) = expand_group(EXP_GROUPS[group])
        assert set(re.findall(r"--encode_layer (\S+)", shown)) == {str(exp_dict["encode_layer"])}


def test_every_choice_of_make_real_but_its_minutes_has_a_folder_of_its_own():
    choices = ("MINUTES=30", "GROUP=merged_replay_smollm2-135m", "LONGEST=1600", "ALL=1", "SEED=1")
    folders = [re.search(r"dssk real --output (\S+)/sets ", real_commands(choice))[1] for choice in choices]
    assert folders[0] == "runs/real"
    assert len({*folders}) == len(choices)
