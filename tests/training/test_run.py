"""Training through the functions and commands that users call, on a model of a few thousand parameters."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeForCausalLM

from dssk.checkpoint import verify_checkpoint
from dssk.commands import export as export_command
from dssk.commands.train import parse_args
from dssk.config import parse_experiment
from dssk.errors import DamagedData, DsskError
from dssk.evaluation.questions import check_encodings
from dssk.inference.loading import load_model
from dssk.models.weights import is_cross_attn
from dssk.store.dataset import load_rows
from dssk.training.run import train
from dssk.training.trainer import CrossAttnTrainer
from tests.conftest import encode_rows, experiment, make_base, question_rows
from tests.hub import model_hub
from tests.training.conftest import command, logged, losses, runs_in, torchrun, weights


def test_a_run_leaves_checkpoints_of_the_blocks_alone_and_a_fused_model(run, base_path):
    folder = run("--steps", "4", "--log_every", "2")
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert all(map(is_cross_attn, weights(folder / "checkpoint-4")))
    assert {f.suffix for f in (folder / "checkpoint-4").iterdir()} == {".json", ".safetensors", ".py"}
    assert [e["step"] for e in logged(folder) if "eval_loss" in e] == [2, 4]
    assert json.loads((folder / "exp_dict.json").read_text())["model_path"] == str(base_path)
    fused = weights(folder / "final")
    for name, parameter in GPTBigCodeForCausalLM.from_pretrained(base_path).named_parameters():
        assert torch.equal(fused[name], parameter), name
    assert any(map(is_cross_attn, fused))


def test_a_checkpoint_and_the_fused_model_reload_to_bit_equal_logits(run, tokens):
    import dssk  # noqa: F401 - registers the class

    folder = run("--steps", "2", "--log_every", "2")
    ids, context = tokens(2, 7), tokens(2, 9)
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("checkpoint-2", "final")]
    models.append(load_model(folder)[0])
    outputs = [model(ids, context_input_ids=context).logits for model in models]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], models[0](ids).logits)


@pytest.mark.parametrize(
    ("when", "folders"),
    [
        ("never", set()),
        ("best", {"best"}),
        ("final,best", {"final", "best"}),
        ("every", {"checkpoint-2/fused"}),
    ],
)
def test_the_fused_model_is_written_when_it_is_asked_for(run, when, folders):
    folder = run("--steps", "2", "--log_every", "2", "--save_fused", when)
    fused = {str(f.parent.relative_to(folder)) for f in folder.rglob("model.safetensors")} - {"checkpoint-2"}
    assert fused == folders
    for name in folders:
        assert load_model(folder / name)[0].config.cross_attn_only is False
    assert verify_checkpoint(folder / "checkpoint-2")["step"] == 2


def test_the_best_checkpoint_is_the_one_of_the_highest_f1_among_equals_of_the_lowest_loss(run, monkeypatch):
    scores = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.1}

    def score(scorer, trainer):
        return {"f1": scores[trainer.state.global_step]}

    monkeypatch.setattr("dssk.training.answers.AnswerScorer.__call__", score)
    flags = ("--log_every", "1", "--generation_eval_samples", "4", "--save_fused", "best")
    folder = run("--steps", "4", *flags, "--save_total_limit", "1", learning_rate=1e-2)
    assert {f.name for f in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert equal_tensors_of_blocks(folder / "best", folder / "checkpoint-3")


def equal_tensors_of_blocks(fused, checkpoint) -> bool:
    saved = weights(fused)
    return all(torch.equal(saved[name], tensor) for name, tensor in weights(checkpoint).items())


def test_export_fuses_a_checkpoint_and_spares_what_is_no_export(
    run, tmp_path, base_path, monkeypatch, capsys
):
    folder = run("--steps", "1", "--log_every", "1", "--save_fused", "never")
    output = tmp_path / "exported"
    monkeypatch.setattr("sys.argv", ["export", "--checkpoint", str(folder), "--output", str(output)])
    for _ in range(2):  # an export may be replaced
        export_command.main()
    assert equal_tensors_of_blocks(output, folder / "checkpoint-1")
    for precious in (base_path, folder / "checkpoint-1"):
        monkeypatch.setattr("sys.argv", ["export", "--checkpoint", str(folder), "--output", str(precious)])
        with pytest.raises(DsskError, match="exists and is no export"):
            export_command.main()
    assert verify_checkpoint(folder / "checkpoint-1")


def test_data_without_val_train_without_evaluations(run, base_path, tmp_path_factory):
    store = encode_rows(base_path, tmp_path_factory.mktemp("data"), question_rows(12), "--val_fraction", "0")
    folder = run("--steps", "2", "--log_every", "1", "--generation_eval_samples", "4", data_path=store)
    assert (folder / "checkpoint-2").is_dir()
    assert not any("eval_loss" in entry for entry in logged(folder))
    with pytest.raises(
        DsskError, match="reduce_lr_on_plateau looks at the loss on val, and the data have no rows"
    ):
        run("--steps", "2", data_path=store, lr_scheduler_type="reduce_lr_on_plateau")
    with pytest.raises(DsskError, match="early_stopping_patience looks at the loss on val"):
        run("--steps", "2", data_path=store, early_stopping_patience=1)


def test_training_lowers_the_loss(run):
    seen = losses(run("--steps", "60", "--log_every", "20", learning_rate=1e-2))
    assert seen[60] < 0.7 * seen[20]


def test_accumulating_four_batches_of_one_equals_one_batch_of_four(run):
    one_by_one = {"train_batch_size": 1, "skip_steps": 4}
    at_once = losses(run("--steps", "3", "--log_every", "1", cross_attn_dropout_prob=0.0))
    in_turn = losses(run("--steps", "3", "--log_every", "1", cross_attn_dropout_prob=0.0, **one_by_one))
    assert in_turn == pytest.approx(at_once, abs=1e-5)


def test_encoding_in_the_training_step_equals_stored_encodings(run, store_path, base_path):
    flags = ("--steps", "3", "--log_every", "1")
    stored = losses(run(*flags, cross_attn_dropout_prob=0.0))
    online = losses(run(*flags, cross_attn_dropout_prob=0.0, encode_online=True))
    assert online == pytest.approx(stored, abs=0.02)  # what is stored is rounded to bfloat16


def test_a_store_of_texts_alone_is_refused_with_what_to_do(run, base_path, tmp_path):
    texts = encode_rows(base_path, tmp_path, question_rows(8), "--text_only")
    with pytest.raises(DsskError, match="holds texts and no encodings: --set encode_online=true"):
        run("--steps", "1", data_path=texts, encode_online=False)


def test_a_fused_model_of_mixed_precision_reads_what_its_base_encoded(run, base_path, store_path, tmp_path):
    """The base in it is rounded to bfloat16, and has another fingerprint."""
    final = run("--steps", "1", "--log_every", "1", bf16=True) / "final"
    assert weights(final)["transformer.wte.weight"].dtype == torch.bfloat16
    check_encodings(str(store_path), final)
    other = encode_rows(make_base(tmp_path / "other", seed=7), tmp_path, question_rows(8))
    with pytest.raises(DsskError, match="other weights"):
        check_encodings(str(other), final)


@pytest.mark.parametrize(("asked", "used"), [(None, "sdpa"), ("eager", "eager")])
def test_attention_is_computed_as_the_experiment_says(run, monkeypatch, asked, used):
    seen = set()
    step = CrossAttnTrainer.training_step

    def looked_at(self, model, *args, **kwargs):
        seen.add(model.config._attn_implementation)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(CrossAttnTrainer, "training_step", looked_at)
    folder = run("--steps", "1", "--log_every", "1", attn_implementation=asked)
    assert seen == {used}
    assert "attn_implementation" not in json.loads((folder / "final" / "config.json").read_text())


@pytest.mark.parametrize("units", ["amx_bf16", None])
def test_a_processor_without_bfloat16_is_said_to_be_one(run, monkeypatch, capsys, units):
    cpu = {
        "architecture": "x86_64",
        "avx512_bf16": False,
        "amx_bf16": False,
        **({units: True} if units else {}),
    }
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    run("--steps", "1", "--log_every", "1", bf16=True)
    assert ("this processor emulates it: --set bf16=false" in capsys.readouterr().out) == (units is None)


def test_bfloat16_trains_fp32_blocks(run):
    folder = run("--steps", "2", "--log_every", "2", bf16=True)
    assert {t.dtype for t in weights(folder / "checkpoint-2").values()} == {torch.float32}


def test_a_copying_start_trains_and_one_that_does_not_fit_is_refused(run):
    start = {"cross_attn_init": "copy", "cross_attn_final_layer": True, "cross_attn_layers_stride": 1}
    assert losses(run("--steps", "2", "--log_every", "1", **start))
    with pytest.raises(DsskError, match="does not fit cross_attn_final_layer"):
        run("--steps", "2", **{**start, "cross_attn_final_layer": False})


@pytest.mark.parametrize("schedule", ["cosine", "constant", "reduce_lr_on_plateau"])
def test_every_schedule_trains(run, schedule):
    assert losses(run("--steps", "2", "--log_every", "1", lr_scheduler_type=schedule))


def test_label_smoothing_is_applied_to_shifted_labels_in_training_only(run):
    plain = logged(run("--steps", "1", "--log_every", "1", learning_rate=1e-9))
    smooth = logged(run("--steps", "1", "--log_every", "1", learning_rate=1e-9, label_smoothing_factor=0.2))
    assert abs(smooth[0]["loss"] - plain[0]["loss"]) > 1e-3
    assert smooth[1]["eval_loss"] == pytest.approx(plain[1]["eval_loss"], abs=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attn_layers_stride": 4}, "need 5 decoder layers, the model has 4"),
        ({"context_size": 257}, "context_size is 257, .* reads at most 256 tokens"),
        ({"fp16": True}, "there is no GPU"),
        ({"model_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(run, monkeypatch, changes, message):
    monkeypatch.setattr("dssk.training.run.build_model", None)
    with pytest.raises(DsskError, match=message):
        run("--steps", "1", **changes)


def test_encodings_of_another_model_of_the_same_size_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dssk.training.run.build_model", None)
    other = make_base(tmp_path / "other", seed=9)
    with pytest.raises(DsskError, match="contexts were encoded by .*other weights"):
        run("--steps", "1", model_path=str(other))


def test_a_flipped_bit_of_an_encoding_is_found_before_anything_is_loaded(
    run, store_path, tmp_path, monkeypatch
):
    monkeypatch.setattr("dssk.training.run.build_model", None)
    damaged = shutil.copytree(store_path, tmp_path / "damaged")
    file = next((damaged / "contexts").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedData, match=f"{file.name} was altered"):
        run("--steps", "1", data_path=damaged)


def test_an_unknown_group_is_refused_naming_the_nearest(tmp_path, store_path):
    args = parse_args(["-e", "crossattn_tin", "-sb", str(tmp_path), "--data_path", str(store_path)])
    with pytest.raises(DsskError, match="did you mean crossattn_tiny?"):
        train(args, {"crossattn_tiny": [], "other": []})


def test_a_stored_experiment_is_trained_by_its_id_and_refused_when_changed(
    run, base_path, store_path, tmp_path
):
    folder = run("--steps", "1", "--log_every", "1", seed=5)
    argv = ["--exp_id", folder.name, "-sb", str(tmp_path), "--data_path", str(store_path), "--steps", "2"]
    train(parse_args(argv), {})
    assert (folder / "checkpoint-2").exists()
    (folder / "exp_dict.json").write_text(json.dumps(experiment(base_path, seed=6)))
    with pytest.raises(DamagedData, match="it was changed"):
        train(parse_args(argv), {})
    for hostile in ("../evil", "x" * 32, "0" * 31):
        with pytest.raises(DsskError, match="want 32 hexadecimal digits"):
            train(parse_args(["--exp_id", hostile, *argv[2:]]), {})


# The commands


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_what_one_process_trains(launch, run, base_path, tmp_path):
    # One process takes rows 0..3 where two ranks take 0, 1 and 2, 3: the same global batches.
    flags = ("--steps", "1_0", "--log_every", "5", "--generation_eval_samples", "5")
    launch("--set=train_batch_size=2", *flags, launcher=torchrun(2))
    (two,) = runs_in(tmp_path)
    one = run(*flags, cross_attn_dropout_prob=0.0)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert [e["eval_f1"] for e in logged(two) if "eval_f1" in e] == [
        e["eval_f1"] for e in logged(one) if "eval_f1" in e
    ]
    for name, tensor in weights(one / "final").items():
        torch.testing.assert_close(weights(two / "final")[name], tensor, atol=1e-5, rtol=1e-4)
    for name, parameter in GPTBigCodeForCausalLM.from_pretrained(base_path).named_parameters():
        assert torch.equal(weights(two / "final")[name], parameter), name


@pytest.mark.slow
def test_the_commands_train_resume_evaluate_and_answer(launch, store_path, tmp_path):
    assert "starting at step 0" in launch("--steps", "2", "--log_every", "2").stdout
    assert "resuming from step 2" in launch("--steps", "4", "--log_every", "2").stdout
    evaluated = command(
        *(
            "-m",
            "dssk.evaluation.evaluate",
            "--checkpoint",
            str(tmp_path),
            "--data_path",
            str(store_path),
        ),
        *("--output", str(tmp_path / "scores.json"), "--max_questions", "6", "--max_new_tokens", "5"),
    )
    assert "with_context" in evaluated.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {scores[c]["n"] for c in ("with_context", "no_context", "wrong_context")} == {6}
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    ids = set(load_rows(store_path)["val"]["id"])
    assert len(lines) == 6
    assert {json.loads(line)["id"] for line in lines} <= ids
    (tmp_path / "text").write_text("Mill 3 was built in 1703.")
    answered = command(
        *(
            "-m",
            "dssk.answer",
            "--checkpoint",
            str(tmp_path),
            "--context",
            str(tmp_path / "text"),
        ),
        *("--question", "when", "--question", "who", "--max_new_tokens", "4"),
    )
    answers = [
        line for line in answered.stdout.splitlines() if not line.startswith("[text: 100% of the attention")
    ]
    assert len(answers) <= 2
    assert answered.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stepps", "3"], "unknown flag --stepps, did you mean --steps?"),
        (["--set=learning_rat=1"], "unknown key learning_rat, did you mean learning_rate?"),
        (["--set=num_cross_attn_layers=9"], "need 17 decoder layers, the model has 4"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(launch, flags, message):
    result = launch(*flags, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert message in line


def test_an_experiment_of_the_tests_is_valid(base_path):
    parse_experiment(experiment(base_path))


def test_the_finished_model_is_pushed_to_the_hub(run, monkeypatch):
    with model_hub.serve("hf_token") as hub:
        hub.take_over(monkeypatch, "hf_token")
        run("--steps", "1", "--push_to_hub", "someone/mill")
        assert "model.safetensors" in hub.models["someone/mill"]
        assert b"36 questions in train" in hub.models["someone/mill"]["README.md"]
        assert not any("optimizer" in name for name in hub.models["someone/mill"])
        assert hub.private["someone/mill"]
        monkeypatch.setattr("dssk.hub.publish.get_token", lambda: None)
        monkeypatch.setattr("dssk.training.run.build_trainer", lambda *args: pytest.fail("it was trained"))
        with pytest.raises(DsskError, match="set HF_TOKEN"):
            run("--steps", "2", "--push_to_hub", "someone/mill")
