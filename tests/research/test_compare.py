import json

import pytest

from dssk.errors import DamagedData, DsskError
from dssk.inference.tokenizer import load_tokenizer
from dssk.report.run_files import read_run
from dssk.research import compare, paired
from dssk.research.compare import system_list
from dssk.research.systems import Systems
from dssk.utils import files
from tests.conftest import fused, question_rows

SYSTEMS = ["cross_attention", *compare.SYSTEMS]  # with the checkpoint's reader

COLUMNS = {
    *("system", "data", "n", "em", "em_low", "em_high", "f1", "f1_low", "f1_high", "rouge_l", "span_em"),
    *("answer_nll", "trained_parameters", "bytes_per_context_token", "first_token_s", "tokens_per_s"),
}


def test_every_system_is_scored_on_every_set_and_costed(run_compare, tmp_path, capsys):
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in question_rows(4)))
    table = run_compare("--eval", f"other={file}")
    rows = {(row["data"], row["system"]): row for row in table}
    assert len(rows) == len(table)
    for data, count in (("val", 6), ("other", 4)):
        for system in SYSTEMS:
            row = rows[data, system]
            assert row["n"] == count
            assert set(row) >= COLUMNS
            assert None not in {row[column] for column in COLUMNS}
            lines = (tmp_path / "out" / f"predictions-{data}-{system}.jsonl").read_text().splitlines()
            assert len(lines) == count
        for other in ("no_context", "wrong_context", "shuffled_tokens"):
            assert rows[data, f"cross_attention/{other}"]["first_token_s"] is None
        assert set(rows[data, "heuristic/overlap"]) >= COLUMNS
        assert rows["other", "cross_attention/other_question"]["n"] == 4
        cold, cached = rows[data, "prompted"], rows[data, "prompted_prefix_cache"]
        assert all(cold[column] == cached[column] for column in ("em", "f1", "answer_nll"))

    val = {system: rows["val", system] for system in SYSTEMS}
    bytes_per_token = {system: row["bytes_per_context_token"] for system, row in val.items()}
    assert bytes_per_token == dict.fromkeys(SYSTEMS, 0) | {
        "cross_attention": 64,
        "prompted_prefix_cache": 256,
    }
    trained = [val[system]["trained_parameters"] for system in SYSTEMS]
    assert trained[1] == trained[2] == 0
    assert 0 < trained[3] < trained[0] < trained[4]
    printed = capsys.readouterr().out
    assert all(f"  {system} " in printed for system in SYSTEMS)
    assert "val, 6 questions" in printed
    assert "other, 4 questions" in printed


def test_what_is_finished_is_kept_and_what_settings_change_is_not(run_compare, tmp_path, monkeypatch, capsys):
    systems = ("--systems", "cross_attention,lora_prompted")
    first = run_compare(*systems)
    answered: list[str] = []
    original = compare.answer_all

    def counting(questions, system, path, *args):
        answered.append(path.name)
        return original(questions, system, path, *args)

    monkeypatch.setattr(compare, "answer_all", counting)
    capsys.readouterr()
    again = run_compare(*systems)
    assert answered == []
    assert "step 2/2" not in capsys.readouterr().out
    scores = [[row["em"], row["f1"], row["answer_nll"]] for row in again]
    assert scores == [[row["em"], row["f1"], row["answer_nll"]] for row in first]
    run_compare(*systems, "--seed", 1)
    assert answered == ["predictions-val-lora_prompted.jsonl"]


def test_contexts_that_are_cut_are_counted(run_compare, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"context": "x" * 500, "question": "q", "answer": "a"}))
    run_compare("--systems", "prompted", "--eval", f"long={file}")
    assert "prompted: 1 of 1 contexts were cut to fit 256 positions" in capsys.readouterr().out


def test_rows_of_a_step_that_questions_of_a_context_do_not_fill_are_refused(run_compare, monkeypatch):
    monkeypatch.setattr(Systems, "_experiment", {"questions_per_context": 4})
    with pytest.raises(
        DsskError, match="--batch_size 6 is no multiple of the checkpoint's questions_per_context 4"
    ):
        run_compare("--systems", "lora_prompted", "--batch_size", "6")


def test_mistakes_are_named(run_compare):
    with pytest.raises(DsskError, match="'lora_promted', did you mean lora_prompted"):
        system_list("lora_promted", "merged")
    with pytest.raises(DsskError, match="'cross_attention': want some of merged,prompted,"):
        system_list("cross_attention", "merged")
    for entry in ("nothing", "val=x", "a/b=x"):
        with pytest.raises(DsskError, match="want name=STORE_OR_FILE"):
            run_compare("--eval", entry)


def test_systems_are_set_beside_the_checkpoint_question_by_question(run_compare, tmp_path, capsys):
    table = run_compare("--systems", "cross_attention,prompted", "--controls", "with_context")
    rows = {row["system"]: row for row in table}
    own = rows["cross_attention"]
    assert "f1_difference" not in own
    for name in ("prompted", "heuristic/overlap"):
        row = rows[name]
        assert row["f1_difference"] == pytest.approx(row["f1"] - own["f1"], abs=2e-4)
        assert row["f1_difference_low"] <= row["f1_difference"] <= row["f1_difference_high"]
    said = f"val, F1 beside the checkpoint's on the same questions: prompted {rows['prompted']['f1_difference']:+.3f} ("
    assert said in capsys.readouterr().out
    file = tmp_path / "out" / "predictions-val-prompted.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace('"f1": ', '"f1": 7'))
    with pytest.raises(
        DamagedData, match="predictions-val-prompted.jsonl is damaged: answer 1: with_context.f1"
    ):
        run_compare("--systems", "cross_attention,prompted", "--controls", "with_context")
    file.write_text(whole)
    # What the checkpoint answered before may be another one's.
    assert not [row for row in run_compare("--systems", "prompted") if "f1_difference" in row]


def test_a_difference_is_of_the_questions_that_stand_in_both_files(tmp_path):
    def write(name, f1s):
        rows = [
            {"id": str(number), "context": f"c{number // 2}", "with_context": {"f1": f1}}
            for number, f1 in f1s.items()
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return paired.read(tmp_path / name)

    one, two = write("one", {0: 0.5, 1: 1.0, 2: 0.0, 3: 0.25}), write("two", {3: 0.0, 1: 0.5, 9: 1.0})
    found = paired.f1_difference(one, two)
    assert found["f1_difference"] == pytest.approx((0.25 + 0.5) / 2)
    assert (found["f1_difference_low"], found["f1_difference_high"]) == (0.25, 0.5)
    assert paired.f1_difference(two, one)["f1_difference"] == -found["f1_difference"]
    assert paired.f1_difference(one, write("other", {7: 1.0})) == {}
    assert paired.f1_difference(one, paired.read(tmp_path / "none")) == {}


def test_a_checkpoint_goes_by_the_name_of_its_reader(run_compare, base_path, tmp_path):
    folder = tmp_path / "merged"
    fused(base_path, reader="merged", encode_layer="last").save_pretrained(folder)
    load_tokenizer(base_path).save_pretrained(folder)
    table = run_compare("--checkpoint", folder, "--systems", "prompted,merged", "--num_contexts", "2")
    assert [row["system"] for row in table if "num_contexts" not in row][:3] == [
        *("merged", "merged/no_context", "merged/wrong_context")
    ]
    assert [row["system"] for row in table if row.get("gold")] == ["merged", "prompted", "prompted_shuffled"]
    assert table[0]["bytes_per_context_token"] == 64
    files.write_json(tmp_path / "exp_dict.json", {})
    assert read_run(tmp_path, tmp_path / "out").controls["with_context"]["f1"] == table[0]["f1"]


def test_worked_examples_and_some_controls(run_compare, tmp_path):
    table = run_compare(
        "--systems", "cross_attention,prompted_examples", "--controls", "no_context,with_context"
    )
    assert [row["system"] for row in table][:3] == [
        "cross_attention",
        "cross_attention/no_context",
        "prompted_examples",
    ]
    kept = json.loads((tmp_path / "out" / "scores-val-prompted_examples.json").read_text())["settings"]
    assert len(kept["examples"]) == 2
    kept = json.loads((tmp_path / "out" / "scores-val-cross_attention.json").read_text())["settings"]
    assert kept["controls"] == ["with_context", "no_context"]
