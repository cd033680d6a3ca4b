import json
import shutil

import pytest

from dssk.errors import DamagedData, DsskError
from dssk.report.run_files import read_run
from dssk.run_folder import find_run
from tests.report.conftest import CONTROLS, write, write_lines

ANSWER = {"question": "q", "context": "c", "answers": ["a"], "with_context": {"prediction": "a"}}


def test_a_run_is_found_by_its_folder_and_the_one_above(run_folder):
    for path in (run_folder, run_folder.parent):
        assert find_run(path) == run_folder


def test_no_run_and_several_runs_are_said_so(run_folder, tmp_path):
    for path in (tmp_path, tmp_path / "absent", run_folder / "final"):
        with pytest.raises(DsskError, match="no run at"):
            find_run(path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "exp_dict.json", {})
    with pytest.raises(DsskError, match="holds 2 runs"):
        find_run(tmp_path)


def test_everything_is_read(run_folder):
    files = read_run(run_folder, run_folder / "compare")
    assert tuple(files.controls) == CONTROLS
    assert [m["step"] for m in files.metrics] == [1, 2, 4]
    assert (len(files.predictions), len(files.table), len(files.cost)) == (8, 6, 1)
    with pytest.raises(DsskError, match="no table.json"):
        read_run(run_folder, run_folder)


def test_a_comparisons_scores_stand_in_for_those_that_a_run_has_not(run_folder, tmp_path):
    write(tmp_path, "exp_dict.json", {})
    for data, em in (("one", 0.25), ("two", 0.5)):
        scores = {"with_context": {"n": 4, "em": em, "f1": em}}
        write(tmp_path, f"scores-{data}-cross_attention.json", {"scores": scores})
        write_lines(tmp_path, f"predictions-{data}-cross_attention.jsonl", [ANSWER | {"id": data}])
    write(tmp_path, "table.json", [{"system": "prompted", "data": data} for data in ("one", "two")])
    for asked, data, em in ((None, "one", 0.25), ("one", "one", 0.25), ("two", "two", 0.5)):
        files = read_run(tmp_path, tmp_path, asked)
        assert (files.data, files.controls["with_context"]["em"]) == (data, em)
        assert [row["id"] for row in files.predictions] == [data]
    scored = read_run(run_folder, tmp_path)
    assert (scored.data, len(scored.predictions)) == ("", 8)
    assert read_run(run_folder, tmp_path, "two").data == "two"
    with pytest.raises(
        DsskError, match="--data three is none of the comparison's sets of questions: one, two"
    ):
        read_run(run_folder, tmp_path, "three")
    with pytest.raises(DsskError, match="want --compare as well"):
        read_run(run_folder, data="two")


def test_rows_by_number_are_of_one_set_and_no_systems_of_their_own(tmp_path):
    own = {"contexts_2": {"em": 0.5, "em_low": 0.4, "em_high": 0.6}}
    write(tmp_path, "exp_dict.json", {})
    write(tmp_path, "scores.json", own)
    plain = [{"system": "prompted", "data": data} for data in ("one", "two")]
    scored = {"em": 0.5, "em_low": 0.4, "em_high": 0.6, "f1": 0.5}
    several = [{**row, "num_contexts": 2, "gold": True, **scored} for row in plain]
    write(tmp_path, "table.json", plain + several)
    for asked, expected in ((None, several[:1]), ("two", several[1:])):
        files = read_run(tmp_path, tmp_path, asked)
        assert files.table == plain
        assert files.numbers == expected
    write(tmp_path, "table.json", plain)
    assert [row["em"] for row in read_run(tmp_path, tmp_path).numbers] == [0.5]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("table.json", {"system": None}),
        ("cost.json", {"system": None}),
        ("cost.json", {"settings": []}),
        ("table.json", {"first_token_s": "soon"}),
        ("table.json", {"f1": "0.5"}),
        ("table.json", {"em_high": None}),
        ("table.json", {"em": 1e308}),
        ("table.json", {"em_low": float("nan")}),
        ("table.json", {"num_contexts": 2}),
        ("table.json", {"num_contexts": "2", "gold": True}),
    ],
)
def test_a_row_of_a_comparison_that_cannot_be_shown_is_damage(run_folder, tmp_path, file, change):
    compare = shutil.copytree(run_folder / "compare", tmp_path / "compare")
    rows = json.loads((compare / file).read_text())
    rows[-1] |= {"em_low": 0.1, "em_high": 0.9, **change}
    write(compare, file, rows)
    with pytest.raises(DamagedData, match=f"{file} is damaged: row {len(rows)}: "):
        read_run(run_folder, compare)


@pytest.mark.parametrize(
    "change",
    [
        {"n": None},
        {"em": None},
        {"f1": None},
        {"by_class": {"span": {"em": 0.5, "f1": 0.5}}},
        {"by_context_tokens": [{"low": 0, "high": 64, "n": 4}]},
    ],
)
def test_scores_that_cannot_be_shown_are_damage(run_folder, tmp_path, change):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    scores = json.loads((folder / "scores.json").read_text())
    for wrong in ({"no_context": scores["no_context"] | change}, {"right_beats_wrong": "often"}):
        write(folder, "scores.json", scores | wrong)
        with pytest.raises(DamagedData, match=f"scores.json is damaged: .*{next(iter(wrong))}"):
            read_run(folder)


@pytest.mark.parametrize(
    "change", [{"answers": None}, {"answers": [True]}, {"context": 3}, {"with_context": {"prediction": []}}]
)
def test_predictions_that_cannot_be_shown_are_damage(tmp_path, change):
    write(tmp_path, "exp_dict.json", {})
    write_lines(tmp_path, "predictions.jsonl", [ANSWER, ANSWER | change])
    with pytest.raises(DamagedData, match=f"predictions.jsonl is damaged: answer 2: {next(iter(change))}"):
        read_run(tmp_path)


def test_rows_by_number_alone_are_shown(run_folder, tmp_path):
    row = {"system": "prompted", "em": 0.5, "em_low": 0.4, "em_high": 0.6, "f1": 0.5}
    write(tmp_path, "table.json", [{**row, "num_contexts": 2, "gold": True}])
    assert [row["num_contexts"] for row in read_run(run_folder, tmp_path).together] == [2]


def test_what_is_absent_is_empty_and_a_log_may_be_torn(tmp_path):
    write(tmp_path, "exp_dict.json", {"a": 1})
    files = read_run(tmp_path)
    assert (files.metrics, files.scores, files.controls, files.predictions) == ([], {}, {}, [])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    write_lines(tmp_path, "predictions.jsonl", [{"no_context": {}}])
    files = read_run(tmp_path)
    assert files.metrics == [{"step": 1}]
    assert files.predictions == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("scores.json", "{"), ("scores.json", "[]"), ("predictions.jsonl", "{}\n{")],
)
def test_damaged_files_are_named(tmp_path, name, content):
    write(tmp_path, "exp_dict.json", {})
    (tmp_path / name).write_text(content)
    with pytest.raises(DamagedData, match=name):
        read_run(tmp_path)
