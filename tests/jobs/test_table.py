import csv
import json
import os
import runpy

import pytest

from dssk.checkpoint import finish_checkpoint
from dssk.commands import jobs as command
from dssk.config import experiment_id
from dssk.errors import DsskError
from dssk.jobs.table import find_experiments, write_table
from tests.conftest import experiment


def make_run(savedir_base, metrics=(), **changes):
    exp_dict = experiment("base", **changes)
    savedir = savedir_base / experiment_id(exp_dict)
    savedir.mkdir(parents=True)
    (savedir / "exp_dict.json").write_text(json.dumps(exp_dict))
    if metrics:
        (savedir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return savedir


def table_of(savedir_base) -> list[dict]:
    write_table(savedir_base)
    return list(csv.DictReader((savedir_base / "results.csv").open()))


def test_a_row_has_what_differs_how_far_it_got_and_the_newest_values(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 1, "eval_loss": 2.5, "eval_f1": 0.1},
        {"step": 2, "loss": 2.0},
    ]
    first = make_run(tmp_path, lines, learning_rate=1e-3)
    second = make_run(tmp_path, learning_rate=2e-3, seed=7)
    (first / "status.json").write_text('{"state": "done", "code": 0}')
    (second / "status.json").write_text('{"state": "preempted", "code": 75}')
    (first / "final").mkdir()
    finish_checkpoint(first / "final", {"step": 2})
    (first / "final" / "scores.json").write_text(
        '{"with_context": {"em": 0.25, "f1": 0.5}, "no_context": {"em": 0}}'
    )
    rows = {row["exp_id"]: row for row in table_of(tmp_path)}
    assert rows[first.name[:8]] == {
        **{
            "exp_id": first.name[:8],
            "learning_rate": "0.001",
            "seed": "0",
            "state": "COMPLETED",
            "step": "2",
        },
        **{"loss": "2.0", "eval_loss": "2.5", "EM": "0.25", "F1": "0.5"},
    }
    assert rows[second.name[:8]] == {
        **{
            "exp_id": second.name[:8],
            "learning_rate": "0.002",
            "seed": "7",
            "state": "PREEMPTED",
            "step": "",
        },
        **{"loss": "", "eval_loss": "", "EM": "", "F1": ""},
    }


def test_f1_of_evaluations_in_training_stands_in_until_there_are_scores(tmp_path):
    make_run(tmp_path, [{"step": 1, "eval_em": 0.1, "eval_f1": 0.2}])
    (row,) = table_of(tmp_path)
    assert (row["EM"], row["F1"]) == ("0.1", "0.2")


def test_what_is_no_experiment_and_a_line_cut_by_a_crash_are_left_out(tmp_path):
    savedir = make_run(tmp_path, [{"step": 5, "loss": 1.0}])
    with (savedir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    changed = make_run(tmp_path, seed=3)
    (changed / "exp_dict.json").write_text("{}")
    (tmp_path / "deleted" / "x").mkdir(parents=True)
    assert list(find_experiments(tmp_path)) == [savedir]
    assert table_of(tmp_path)[0]["step"] == "5"


def test_markdown_lines_up_and_survives_a_bar_in_a_value(tmp_path):
    make_run(tmp_path, model_path="a|b")
    make_run(tmp_path, model_path="c")
    lines = write_table(tmp_path).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "a\\|b" in (tmp_path / "results.md").read_text()


def test_the_command_prints_the_table_and_writes_csv_markdown_and_a_plot(tmp_path, capsys):
    make_run(tmp_path, [{"step": s, "loss": 3.0 - s, "eval_loss": 2.0, "eval_f1": 0.1 * s} for s in (1, 2)])
    command.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith("| exp_id")
    assert [
        name for name in ("results.csv", "results.md", "results.png") if f"{tmp_path / name}\n" not in printed
    ] == []
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_experiments_is_one_line(tmp_path):
    with pytest.raises(DsskError, match="no experiment in .*want the --savedir_base"):
        write_table(tmp_path)


def test_the_state_comes_from_slurm_where_it_knows_the_job(tmp_path, monkeypatch):
    savedir = make_run(tmp_path)
    (savedir / "job_dict.json").write_text('{"job_id": "5", "job_scheduler": "slurm"}')
    (savedir / "status.json").write_text('{"state": "running"}')
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "squeue").write_text("#!/bin/sh\necho 5 OUT_OF_MEMORY\n")
    (commands / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    assert table_of(tmp_path)[0]["state"] == "FAILED"
    (commands / "squeue").unlink()
    monkeypatch.setenv("PATH", str(commands))
    assert table_of(tmp_path)[0]["state"] == "RUNNING"


def test_the_notebook_opens_on_the_runs_of_a_savedir(tmp_path, monkeypatch, capsys):
    pytest.importorskip("haven", reason='haven-ai is not installed: pip install "dssk[haven]"')
    from dssk.jobs.notebook import NOTEBOOK, create_notebook

    savedir_base = tmp_path / 'o\'er "there"'
    for seed in (1, 2):
        make_run(savedir_base, [{"step": 1, "loss": 1.0}], seed=seed)
    create_notebook(savedir_base, "slurm")
    cells = json.loads((savedir_base / NOTEBOOK).read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 4
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join(code[:3]))  # the last one asks the scheduler
    namespace = runpy.run_path(str(script))
    assert len(namespace["rm"].exp_list) == 2
    assert "Image object" in capsys.readouterr().out
    (savedir_base / NOTEBOOK).write_text("mine")
    create_notebook(savedir_base, "slurm")
    assert (savedir_base / NOTEBOOK).read_text() == "mine"


def test_scores_of_an_older_checkpoint_are_not_shown(tmp_path):
    savedir = make_run(tmp_path, [{"step": 9, "eval_em": 0.9, "eval_f1": 0.95}])
    for step in (8, 9):
        (savedir / f"checkpoint-{step}").mkdir()
        finish_checkpoint(savedir / f"checkpoint-{step}", {"step": step})
    (savedir / "checkpoint-8" / "scores.json").write_text('{"with_context": {"em": 0.5, "f1": 0.6}}')
    (row,) = table_of(tmp_path)
    assert (row["EM"], row["F1"]) == ("0.9", "0.95")
    (savedir / "scores.json").write_text('{"with_context": {"em": 0.97, "f1": 0.98}, "step": 9}')
    (row,) = table_of(tmp_path)
    assert (row["EM"], row["F1"]) == ("0.97", "0.98")


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"[" * 100_000, b'{"with_context": 5}'])
def test_damaged_files_of_a_run_leave_cells_empty(tmp_path, content):
    savedir = make_run(tmp_path, [{"step": 5, "loss": 1.0}])
    (savedir / "final").mkdir()
    for name in (
        "status.json",
        "job_dict.json",
        "scores.json",
        "final/scores.json",
        "final/dssk_manifest.json",
    ):
        (savedir / name).write_bytes(content)
    with (savedir / "metrics.jsonl").open("ab") as file:
        file.write(content + b'\n{"step": 6, "loss": "x"}\n{"step": 7, "loss": [1]}\n')
    (row,) = table_of(tmp_path)
    assert (row["state"], row["step"], row["EM"]) == ("UNKNOWN", "7", "")
