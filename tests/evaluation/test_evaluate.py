import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dssk.commands import evaluate as command
from dssk.errors import DsskError, EnvironmentFault, Locked
from dssk.evaluation import predictions
from dssk.evaluation.evaluate import (
    CONTROLS,
    CrossAttentionSystem,
    control_list,
    left_out,
    output_folder,
    trials,
)
from dssk.evaluation.predictions import answer_all, discard_partial
from dssk.evaluation.questions import load_questions
from dssk.inference.loading import load_model
from dssk.inference.tokenizer import load_tokenizer
from dssk.utils.files import only_writer
from dssk.utils.ranks import Ranks
from tests.conftest import REPOSITORY, fused, question_rows


@pytest.fixture(scope="module")
def checkpoint(base_path, tmp_path_factory):
    """A run's folder with a fused model of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fused(base_path).save_pretrained(folder / "final")
    load_tokenizer(base_path).save_pretrained(folder / "final")
    return folder


def run_evaluate(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
    command.main()


def test_every_control_is_answered_and_scored(checkpoint, store_path, monkeypatch, capsys):
    run_evaluate(monkeypatch, "--checkpoint", checkpoint, "--data_path", store_path, "--max_new_tokens", 6)
    scores = json.loads((checkpoint / "scores.json").read_text())
    lines = [json.loads(line) for line in (checkpoint / "predictions.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in checkpoint.iterdir()) == ["final", "predictions.jsonl", "scores.json"]
    assert list(lines[0]) == [
        *("id", "question", "context", "answers", "answer_class", "context_tokens"),
        *CONTROLS,
    ]
    assert set(lines[0]["with_context"]) == {"prediction", "em", "f1", "rouge_l", "answer_nll"}
    assert set(scores) == {*CONTROLS, "right_beats_wrong", "right_beats_wrong_low", "right_beats_wrong_high"}
    assert all(scores[control]["n"] == len(lines) for control in CONTROLS)
    printed = capsys.readouterr().out
    assert all(control in printed for control in CONTROLS)


def test_controls_change_what_they_say_and_nothing_else(checkpoint, store_path):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    system = CrossAttentionSystem(model, tokenizer, questions, max_new_tokens=6)
    answers = system(list(range(len(questions))))
    # Attention has no positions of its own: the order of the states alone is worth nothing.
    for answer in answers:
        assert answer["shuffled_tokens"][0] == answer["with_context"][0]
        assert answer["shuffled_tokens"][1] == pytest.approx(answer["with_context"][1], abs=1e-4)
        assert answer["no_context"][1] != pytest.approx(answer["with_context"][1], abs=1e-4)
        assert answer["wrong_context"][1] != pytest.approx(answer["with_context"][1], abs=1e-4)
    others = trials("other_question", questions)
    for row, trial in enumerate(others):
        assert trial.question != row == trial.context
        assert questions.rows[trial.question].context == questions.rows[row].context
        assert answers[row]["other_question"][0] == answers[trial.question]["with_context"][0]


def test_states_are_shuffled_each_in_its_own_way_and_always_the_same(checkpoint, store_path):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    system = CrossAttentionSystem(model, tokenizer, questions, ["shuffled_tokens"])
    chosen = [trial for trial in system.trials["shuffled_tokens"][:2] if trial]
    first, again = system._states([0, 1], chosen), system._states([0, 1], chosen)
    (plain,) = questions.states(model, [0])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], plain)
    assert torch.equal(first[0].sort(0).values, plain.sort(0).values)


def test_rows_that_a_control_does_not_fit_go_without_it(checkpoint, base_path, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"context": "c", "question": "q", "answer": "a"}))
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(file), tokenizer, model.config)
    (answers,) = CrossAttentionSystem(model, tokenizer, questions, max_new_tokens=2)([0])
    assert set(answers) == {"with_context", "no_context", "shuffled_tokens"}
    assert left_out({control: trials(control, questions) for control in CONTROLS}) == [
        "wrong_context leaves out 1 of 1 questions: there is no other context",
        "other_question leaves out 1 of 1 questions: their context has no second question",
    ]


def test_what_a_control_leaves_out_is_said(checkpoint, tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [*question_rows(4), {"context": "alone", "question": "q", "answer": "a"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", file, "--max_new_tokens", 2, "--output", tmp_path / "out" / "scores.json"]
    run_evaluate(monkeypatch, "--checkpoint", checkpoint, *flags)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dssk:")]
    assert said == ["dssk: other_question leaves out 1 of 5 questions: their context has no second question"]


def test_two_evaluations_into_the_same_files_do_not_meet(checkpoint, store_path, tmp_path, monkeypatch):
    """The second says who holds them."""
    predictions = tmp_path / "predictions-other.jsonl"
    flags = ["--checkpoint", checkpoint, "--data_path", store_path, "--output", tmp_path / "other.json"]
    with only_writer(predictions), pytest.raises(Locked, match="pid"):
        run_evaluate(monkeypatch, *flags)
    assert not list(tmp_path.iterdir())


def test_evaluations_into_one_folder_keep_each_its_predictions(checkpoint, store_path, tmp_path, monkeypatch):
    flags = ["--checkpoint", checkpoint, "--data_path", store_path, "--controls", "no_context"]
    flags += ["--max_questions", 2, "--max_new_tokens", 1]
    for name in ("scores", "xquad", "scores-nq"):
        run_evaluate(monkeypatch, *flags, "--output", tmp_path / f"{name}.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("predictions-nq.jsonl", "predictions-xquad.jsonl", "predictions.jsonl"),
        *("scores-nq.json", "scores.json", "xquad.json"),
    ]


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_in_the_same_files(checkpoint, store_path, tmp_path, capsys):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    system = CrossAttentionSystem(model, tokenizer, questions, ["with_context"], max_new_tokens=4)
    alone, calls = Ranks(0, 1, 0), []

    def dying(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise Killed
        return system(rows)

    def counting(rows):
        calls.append(rows)
        return system(rows)

    whole = answer_all(questions, system, tmp_path / "a" / "predictions.jsonl", {}, 2, alone)
    path = tmp_path / "b" / "predictions.jsonl"
    with pytest.raises(Killed):
        answer_all(questions, dying, path, {}, 2, alone)
    partial = path.with_name("predictions.partial.jsonl")
    assert len(partial.read_text().splitlines()) == 5
    partial.write_bytes(partial.read_bytes()[:-7])  # as a kill in the middle of a write leaves it
    for name in ("predictions.jsonl", "predictions.partial.jsonl"):
        path.with_name(f".tmp-0123abcd-{name}").touch()  # the same
    calls.clear()
    assert answer_all(questions, counting, path, {}, 2, alone) == whole
    assert len(calls) == len(questions) // 2 - 1
    assert f"dssk: 3 of {len(questions)} questions were answered before" in capsys.readouterr().err
    assert path.read_bytes() == (tmp_path / "a" / "predictions.jsonl").read_bytes()
    assert not list(path.parent.glob(".tmp-*"))


def test_long_contexts_make_smaller_batches(checkpoint, store_path, tmp_path, monkeypatch):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    longest, sizes = max(questions.context_tokens), []
    monkeypatch.setattr(predictions, "BATCH_TOKENS", 3 * longest)

    def system(rows):
        sizes.append(len(rows) * max(questions.context_tokens[row] for row in rows))
        return [{"with_context": ("", None)} for _ in rows]

    answer_all(questions, system, tmp_path / "predictions.jsonl", {}, 100, Ranks(0, 1, 0))
    assert max(sizes) <= 3 * longest
    assert len(sizes) > 1  # of 100 questions at a time


def test_answers_that_are_removed_while_others_are_made_are_one_line(checkpoint, store_path, tmp_path):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    path = tmp_path / "scores" / "predictions.jsonl"

    def system(rows):
        shutil.rmtree(path.parent, ignore_errors=True)
        return [{"with_context": ("answer", 0.0)} for _ in rows]

    with pytest.raises(
        EnvironmentFault, match=f"^{len(questions)} of {len(questions)} answers in .* are gone"
    ):
        answer_all(questions, system, path, {}, 4, Ranks(0, 1, 0))


def test_an_altered_byte_of_a_partial_file_changes_no_answer(checkpoint, store_path, tmp_path):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    path, alone = tmp_path / "predictions.jsonl", Ranks(0, 1, 0)

    def system(rows):
        return [{"with_context": (f"answer {row}", row / 7)} for row in rows]

    whole = answer_all(questions, system, path, {}, 2, alone)
    partial = path.with_name("predictions.partial.jsonl")
    content = partial.read_bytes()
    for place in range(0, len(content), 97):
        partial.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert answer_all(questions, system, path, {}, 2, alone) == whole


def test_partial_answers_of_other_settings_are_discarded(checkpoint, store_path, tmp_path):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    path, alone = tmp_path / "predictions.jsonl", Ranks(0, 1, 0)
    answer_all(questions, lambda rows: [{"c": ("old", 0.0)} for _ in rows], path, {"seed": 0}, 4, alone)
    new = answer_all(questions, lambda rows: [{"c": ("new", 0.0)} for _ in rows], path, {"seed": 1}, 4, alone)
    assert {prediction["c"]["prediction"] for prediction in new} == {"new"}


def test_a_run_killed_with_9_goes_on_and_ends_in_the_same_files(
    checkpoint, store_path, monkeypatch, tmp_path
):
    flags = ["--checkpoint", checkpoint, "--data_path", store_path, "--max_new_tokens", 8, "--batch_size", 1]
    run_evaluate(monkeypatch, *flags, "--output", tmp_path / "whole" / "scores.json")
    killed = tmp_path / "killed"
    command = ["-m", "dssk", "evaluate", *map(str, flags), "--output", str(killed / "scores.json")]
    process = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY)
    partial = killed / "predictions.partial.jsonl"
    while not (partial.exists() and partial.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (killed / "predictions.jsonl").exists()
    run_evaluate(monkeypatch, *flags, "--output", killed / "scores.json")
    assert sorted(path.name for path in killed.iterdir()) == ["predictions.jsonl", "scores.json"]
    for name in ("predictions.jsonl", "scores.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Threads(Ranks):
    """Two ranks as threads of this process."""

    barrier = threading.Barrier(2, timeout=60)
    shared: list = [None]

    def from_first(self, make):
        if self.rank == 0:
            self.shared[0] = make()
        self.wait()
        value = self.shared[0]
        self.wait()
        return value

    def wait(self):
        self.barrier.wait()


def test_ranks_share_the_work_and_write_the_files_of_one(checkpoint, store_path, tmp_path):
    model, tokenizer = load_model(checkpoint)
    questions = load_questions(str(store_path), tokenizer, model.config)
    path = tmp_path / "predictions.jsonl"
    shares: dict[int, list[int]] = {0: [], 1: []}

    def answer(rank):
        def system(rows):
            shares[rank] += rows
            return [{"with_context": (f"answer {row}", row / 7)} for row in rows]

        return answer_all(questions, system, path, {}, 2, Threads(rank, 2, rank))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(answer, (0, 1))
    assert first == second
    assert sorted(shares[0] + shares[1]) == list(range(len(questions)))
    assert shares[0]
    assert shares[1]
    together = path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3  # each rank's own partial file beside it
    discard_partial(path)
    assert list(tmp_path.iterdir()) == [path]

    answer_all(
        questions,
        lambda rows: [{"with_context": (f"answer {row}", row / 7)} for row in rows],
        path,
        {},
        2,
        Ranks(0, 1, 0),
    )
    assert path.read_bytes() == together


def test_scores_of_a_run_lie_in_its_folder_and_those_of_a_checkpoint_beside_it(checkpoint):
    assert output_folder(str(checkpoint)) == checkpoint
    assert output_folder(str(checkpoint / "final")) == checkpoint / "final"


def test_a_mistyped_control_is_named():
    assert control_list("no_context, with_context") == ["with_context", "no_context"]
    with pytest.raises(DsskError, match="'no_contxt', did you mean no_context"):
        control_list("no_contxt")


def test_a_missing_store_is_refused(checkpoint, monkeypatch):
    with pytest.raises(DsskError, match="/nowhere: no such folder"):
        run_evaluate(monkeypatch, "--checkpoint", checkpoint, "--data_path", "/nowhere")


def test_the_toy_is_made_on_the_spot_as_in_preprocessing(checkpoint, monkeypatch, tmp_path):
    output = tmp_path / "scores.json"
    flags = ("--max_questions", 2, "--max_new_tokens", 1, "--controls", "no_context", "--output", output)
    run_evaluate(monkeypatch, "--checkpoint", checkpoint, "--dataset", "toy", *flags)
    ids = [json.loads(line)["id"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert ids == ["toy-val-0-0", "toy-val-0-499"]
