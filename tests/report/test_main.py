import json
import re

import pytest

from dssk.commands import report as command
from dssk.errors import DsskError
from dssk.evaluation.attention import evidence
from dssk.inference.loading import load_model
from dssk.report.run_files import read_run
from dssk.report.write import write_report
from tests.report.conftest import experiment, write, write_lines


def test_the_page_lies_beside_its_figures_and_the_measured_attention(report, run_folder):
    made = {file.name for file in run_folder.iterdir() if file.name.startswith("report")}
    names = ("loss", "f1", "scores", "lengths", "classes", "attention", "systems-1", "systems-2")
    assert made == {"report.html", *(f"report-{name}.png" for name in names)}
    found = json.loads((run_folder / "attention.json").read_text())
    expected = evidence(*load_model(run_folder), read_run(run_folder).predictions)
    assert found == expected.__dict__
    assert f"{100 * found['share']:.1f}" in report.read_text()


def test_what_is_missing_is_left_out_with_the_command_that_makes_it(base_path, tmp_path, capsys):
    write(tmp_path, "exp_dict.json", experiment(base_path))
    command.main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    for name in ("evaluate", "compare"):
        assert f"dssk {name} --checkpoint {tmp_path}" in page
    assert "dssk train" in page
    assert {file.name for file in tmp_path.iterdir()} == {"exp_dict.json", "report.html"}
    assert "no attention in this report: no model at" in capsys.readouterr().err


def test_what_a_killed_report_left_is_removed(base_path, tmp_path):
    write(tmp_path, "exp_dict.json", experiment(base_path))
    write_lines(tmp_path, "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    left = [
        tmp_path / f".tmp-0123abcd-{name}" for name in ("report.html", "report-loss.png", "attention.json")
    ]
    training = tmp_path / ".tmp-0123abcd-status.json"
    for path in (*left, training):
        path.touch()
    write_report(str(tmp_path), None, None, 1, None, ["dssk", "report"])
    assert not any(path.exists() for path in left)
    assert training.exists()


def test_the_page_forbids_all_but_its_own_script(report):
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', report.read_text(), re.DOTALL)
    allowed = dict(directive.split(maxsplit=1) for directive in policy.split(";"))
    assert re.fullmatch(r"'sha256-[\w+/=]+'", allowed.pop("script-src"))
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert allowed == {**nothing, "img-src": "data:", "style-src": "'unsafe-inline'"}


def test_samples_are_shown_without_a_model_too(run_folder, tmp_path):
    write(tmp_path, "exp_dict.json", {"model_path": "base"})
    write_lines(tmp_path, "predictions.jsonl", read_run(run_folder).predictions)
    output = tmp_path / "pages" / "page.html"
    command.main([str(tmp_path), "--output", str(output), "--samples", "3"])
    page = output.read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [sample["question"] for sample in data["samples"]]
    assert len(data["samples"]) == 3
    assert "samples are shown without attention" in page


def test_a_page_without_samples_is_fine(run_folder, tmp_path):
    write(tmp_path, "exp_dict.json", {"model_path": "base"})
    write_lines(tmp_path, "predictions.jsonl", read_run(run_folder).predictions)
    command.main([str(tmp_path), "--samples", "0"])
    page = (tmp_path / "report.html").read_text()
    assert "No predictions yet" not in page
    assert 'id="browser"' not in page


def test_the_report_is_added_to_the_wandb_run(run_folder, tmp_path, monkeypatch):
    calls: list = []

    class FakeRun:
        def log(self, values):
            calls.append(values)

        def finish(self):
            calls.append("finish")

    def init(**settings):
        calls.append(settings)
        return FakeRun()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("wandb.Html", lambda text, inject: text)
    monkeypatch.setattr("wandb.Image", lambda path: path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "exp_dict.json", {"model_path": "base"})
    write_lines(tmp_path, "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    command.main([str(tmp_path)])
    write(tmp_path, "wandb.json", {"id": "abc"})  # of a run older than reports
    command.main([str(tmp_path)])
    assert calls == []
    write(tmp_path, "wandb.json", {"id": "abc", "entity": "e", "project": "p", "name": None})
    command.main([str(tmp_path)])
    settings, logged, end = calls
    assert [settings[key] for key in ("id", "entity", "project")] == ["abc", "e", "p"]
    page = (tmp_path / "report.html").read_text()
    assert logged == {"report": page, "report/report-loss": str(tmp_path / "report-loss.png")}
    assert end == "finish"
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == "abc"


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "exp_dict.json", {"model_path": "base"})
    write_lines(tmp_path, "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    write(tmp_path, "wandb.json", {"id": "abc", "entity": "e", "project": "p" * 200, "name": None})
    with pytest.raises(DsskError, match=r"W&B refuses what .*wandb.json says: .*128 characters"):
        command.main([str(tmp_path)])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DsskError, match="no run at"):
        command.main([str(tmp_path)])
