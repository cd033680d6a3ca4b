"""What is checked and told before anything is spent: DeepSpeed's file, W&B, memory and disk."""

import contextlib
import http.server
import json
import os
import socket
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTBigCodeConfig

from dssk.checkpoint import latest_checkpoint
from dssk.commands.train import parse_args
from dssk.config import expand_group, parse_experiment
from dssk.errors import DsskError, EnvironmentFault
from dssk.inference.loading import load_base_config
from dssk.training.deepspeed_config import check_deepspeed_config, load_deepspeed_config
from dssk.training.estimate import estimate, meta_model
from dssk.training.published import published_config
from dssk.training.run import build_model, choose_experiment
from dssk.training.wandb_report import WandbReport, answers, check_wandb, wandb_mode
from exp_configs import BASE_CONFIG, EXP_GROUPS
from tests.conftest import REPOSITORY, byte_tokenizer, experiment, make_base

# DeepSpeed's file


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "resources").glob("ds_config_*.json")), ids=lambda f: f.name
)
def test_the_files_we_ship_suit_every_experiment(file):
    for experiments in EXP_GROUPS.values():
        assert check_deepspeed_config(str(file), parse_experiment(expand_group(experiments)[0]), 4)


def test_every_contradiction_is_named_at_once_with_both_values(tmp_path, base_path):
    file = tmp_path / "ds.json"
    contradictions = {
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "gradient_accumulation_steps": 9,
        "fp16": {"enabled": True},
        "bf16": {"enabled": "auto"},
        "scheduler": {"type": "WarmupLR"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto"}},
        "zero_optimization": {"stage": 5},
    }
    file.write_text(json.dumps(contradictions))
    with pytest.raises(DsskError) as caught:
        check_deepspeed_config(str(file), parse_experiment(experiment(base_path)), 2)
    for part in (
        "train_micro_batch_size_per_gpu is 8, train_batch_size is 4",
        "train_batch_size is 64, train_batch_size x skip_steps x 1 ranks is 8",
        "gradient_clipping is 0.5, max_grad_norm is 1.0",
        "fp16.enabled is True, fp16 is False",
        "optimizer.params.lr is 0.001, learning_rate is 0.0006",
        "scheduler is given, lr_scheduler_type is 'linear'",
        "zero_optimization.stage is 5, want 0 to 3",
    ):
        assert part in str(caught.value)
    for fine in ("gradient_accumulation_steps", "bf16", "betas", "eps"):
        assert f"{fine} is" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_skip_steps_overrides_the_files_accumulation_unless_that_is_auto(tmp_path, base_path):
    cfg = parse_experiment(experiment(base_path))
    file = tmp_path / "ds.json"
    for value, wanted in ((9, 2), ("auto", "auto")):
        file.write_text(json.dumps({"gradient_accumulation_steps": value, "zero_optimization": {"stage": 2}}))
        assert check_deepspeed_config(str(file), cfg, 2)["gradient_accumulation_steps"] == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "is not JSON: no JSON at line 1, column"),
        ("[1]", "holds a list, want a JSON object"),
        (None, "cannot read the DeepSpeed configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_where_it_is_wrong(tmp_path, base_path, text, message):
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DsskError, match=message):
        check_deepspeed_config(str(file), parse_experiment(experiment(base_path)), 1)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4))
def test_nonsense_in_the_file_is_a_sentence(value):
    cfg = parse_experiment({**BASE_CONFIG, "fp16": False})
    file = REPOSITORY / "resources" / "ds_config_zero.json"
    for key in json.loads(file.read_text()):
        config = json.loads(file.read_text()) | {key: value}
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DsskError):
            patch.setattr(
                "dssk.training.deepspeed_config.read_json_object", lambda path, content=config: content
            )
            check_deepspeed_config("x.json", cfg, 1)


def test_deepspeeds_log_goes_where_messages_go(tmp_path, base_path, monkeypatch, capsys):
    (tmp_path / "deepspeed.py").write_text(
        "import logging, sys\nprint('banner')\n"
        "logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({'msg': 'setting up'}))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    file = REPOSITORY / "resources" / "ds_config_zero.json"
    load_deepspeed_config(str(file), parse_experiment(experiment(base_path)), 1)
    del sys.modules["deepspeed"]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "banner\nsetting up\n")


# Weights & Biases


@pytest.fixture
def wandb_args():
    flags = ["--wandb_entity_name", "someone", "--wandb_project_name", "tests"]
    return lambda *more: parse_args(["-e", "g", "-sb", "s", "--data_path", "d", *flags, *more])


def test_gradients_are_refused_where_they_cannot_be_seen(wandb_args, monkeypatch):
    check_wandb(wandb_args("--wandb_log_gradients"))
    with pytest.raises(DsskError, match="does not work under DeepSpeed"):
        check_wandb(wandb_args("--wandb_log_gradients", "--deepspeed", "file"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(DsskError, match="does not work under FSDP"):
        check_wandb(wandb_args("--wandb_log_gradients"))


def test_a_server_that_is_closed_or_silent_means_offline_within_ten_seconds(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as silent:  # accepts and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (1, silent.getsockname()[1]):
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
            start = time.monotonic()
            assert wandb_mode() == "offline"
            assert time.monotonic() - start < 10
    assert "does not answer" in capsys.readouterr().err


def test_a_server_that_answers_anything_is_there():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert answers(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_without_wandb_training_goes_on(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("datasets.config.importlib.util.find_spec", lambda name: None, raising=False)
    folder = run("--steps", "1", "--log_every", "1", "--wandb_entity_name=a", "--wandb_project_name=b")
    assert "wandb is not installed" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").exists()


def test_one_wandb_run_is_continued_with_metrics_and_sample_answers(run, monkeypatch, tmp_path):
    calls: list = []

    class FakeRun:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

        def watch(self, *args, **kwargs):
            calls.append("watch")

    def init(**settings):
        calls.append(settings)
        return FakeRun()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("wandb.Table", lambda columns, data: (columns, data))
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = (
        "--log_every",
        "1",
        "--wandb_entity_name=a",
        "--wandb_project_name=b",
        "--generation_eval_samples=4",
    )
    run("--steps", "1", *flags, "--wandb_log_gradients")
    run("--steps", "2", *flags)
    first, second = (call for call in calls if isinstance(call, dict))
    assert first["id"] == second["id"]
    assert calls.count("finish") == 2
    assert calls.count("watch") == 1
    logged = [call for call in calls if isinstance(call, tuple)]
    assert [step for step, values in logged if "train/loss" in values] == [1, 2]
    assert any("eval/f1" in values for _, values in logged)
    columns, rows = next(values["answers"] for _, values in logged if "answers" in values)
    assert columns == ["question", "answers", "prediction", "prediction_from_wrong_context"]
    assert len(rows) == 4


# Memory and disk


def test_the_estimate_equals_what_a_real_run_of_the_3b_layout_takes(tmp_path, store_path):
    (published,) = EXP_GROUPS["crossattn_starcoderbase-3b"]
    base = make_base(tmp_path / "base", n_layer=36, n_embd=32, n_head=4)
    toy = {
        "model_path": str(base),
        "fp16": False,
        "cross_attn_hidden_size": 16,
        "cross_attn_num_attention_heads": 4,
    }
    cfg = parse_experiment({**published, **toy})
    from dssk.inference.tokenizer import load_tokenizer

    model = build_model(cfg, load_tokenizer(base))
    need = estimate(cfg, meta_model(cfg, load_base_config(cfg.model_path)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.ones(1, 4, dtype=torch.long)
    model.train()(ids, encoder_hidden_states=torch.rand(1, 3, 32), labels=ids).loss.backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    measured = {
        "frozen": [p for p in model.parameters() if not p.requires_grad],
        "trained": trained,
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "optimizer": moments,
    }
    for name, tensors in measured.items():
        assert getattr(need, name) == pytest.approx(sum(t.nbytes for t in tensors), rel=0.1), name
    assert need.per_rank("zero3", 4) < need.per_rank("zero2", 4) < need.per_rank("ddp", 4)


def test_a_dry_run_of_the_largest_model_takes_seconds_and_trains_nothing(run, monkeypatch, tmp_path, capsys):
    config = GPTBigCodeConfig(
        vocab_size=49152, n_positions=8192, n_embd=6144, n_layer=40, n_head=48, multi_query=True
    )
    monkeypatch.setattr("dssk.training.run.load_base_config", lambda path: config)
    monkeypatch.setattr("dssk.training.estimate.load_base_config", lambda path: config)
    monkeypatch.setattr("dssk.training.run.check_model", lambda *identity: None)
    monkeypatch.setattr("dssk.training.run.load_tokenizer", lambda path: byte_tokenizer())
    start = time.monotonic()
    folder = run("--dry_run", **EXP_GROUPS["crossattn_starcoder"][0])
    assert time.monotonic() - start < 10
    said = capsys.readouterr().out
    assert "base         40 layers x 6144, 48 heads, 15,517,456,384 parameters, frozen" in said
    assert "before decoder layers 39, 35, 31, 27, 23, 19, 15, 11" in said
    assert '"num_cross_attn_layers": 8' in said
    assert "a token      64 bytes stored, 24,576 projected; 20,480 in the base's KV cache" in said
    assert not folder.exists()


def test_a_dry_run_knows_another_family(run, monkeypatch, capsys):
    base = published_config("meta-llama/Llama-3.1-8B")
    monkeypatch.setattr("dssk.training.run.load_base_config", lambda path: base)
    monkeypatch.setattr("dssk.training.estimate.load_base_config", lambda path: base)
    monkeypatch.setattr("dssk.training.run.check_model", lambda *identity: None)
    folder = run("--dry_run", **EXP_GROUPS["crossattn_llama-3.1-8b"][0])
    said = capsys.readouterr().out
    assert "base         32 layers x 4096, 32 heads, 8,030,261,248 parameters, frozen" in said
    assert "after decoder layers 31, 26, 21, 16, 11, 6" in said
    assert "6,144 projected; 131,072 in the base's KV cache" in said
    assert not folder.exists()


def test_the_bytes_of_a_checkpoint_are_estimated_within_ten_percent(run, base_path):
    folder = latest_checkpoint(run("--steps", "1", "--log_every", "1"))
    cfg = parse_experiment(experiment(base_path))
    tensors = [folder / "model.safetensors", folder / "optimizer.safetensors"]
    assert sum(f.stat().st_size for f in tensors) == pytest.approx(
        estimate(cfg, meta_model(cfg, load_base_config(cfg.model_path))).checkpoint, rel=0.1
    )


def test_the_report_is_made_on_one_rank_only(tmp_path, wandb_args):
    report = WandbReport(wandb_args(), {}, tmp_path, None)
    report.on_train_begin(None, type("State", (), {"is_world_process_zero": False}), None)
    assert report.run is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "bogus"], "--report_to bogus: no such logger"),
        (["--report_to", "tensorbord"], "did you mean tensorboard?"),
        (["--report_to", "clearml"], "--report_to clearml needs its package: pip install clearml"),
    ],
)
def test_a_logger_that_cannot_work_is_refused_before_anything_is_made(run, tmp_path, flags, message):
    with pytest.raises(DsskError, match=message):
        run("--steps", "1", *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(run, monkeypatch):
    monkeypatch.setattr("dssk.training.run.build_model", None)
    for folder in ("/proc/nope", "/proc/nope/deeper", f"/tmp/{'x' * 300}"):
        with pytest.raises(EnvironmentFault, match="cannot write"):
            run("--steps", "1", "-sb", folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("two", "WORLD_SIZE is 'two'"),
        ("0", "WORLD_SIZE is '0'"),
        ("2", "WORLD_SIZE is 2 and RANK is not set"),
    ],
)
def test_an_environment_that_is_no_launchers_is_refused(run, monkeypatch, value, message):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(DsskError, match=message):
        run("--steps", "1")


def test_a_grid_says_how_many_experiments_there_are_and_which_is_trained(
    store_path, base_path, tmp_path, capsys
):
    group = {"grid": [experiment(base_path, learning_rate=[1e-3, 2e-3], seed=[0, 1])]}
    argv = ["-e", "grid", "-sb", str(tmp_path), "--data_path", str(store_path)]
    chosen = choose_experiment(parse_args(argv), group)
    assert (chosen["learning_rate"], chosen["seed"]) == (1e-3, 0)
    assert (
        "grid has 4 experiments: this trains the first (learning_rate=0.001, seed=0); --set KEY=VALUE chooses "
        "another, -j submits them all"
    ) in capsys.readouterr().out
    chosen = choose_experiment(parse_args([*argv, "--set", "learning_rate=2e-3", "--set", "seed=1"]), group)
    assert (chosen["learning_rate"], chosen["seed"]) == (2e-3, 1)
    assert capsys.readouterr().out == ""


def test_what_a_run_writes_has_the_mode_of_the_umask(run):
    before = os.umask(0o022)
    try:
        folder = run("--steps", "1", "--log_every", "1", "--save_fused", "final,best")
    finally:
        os.umask(before)
    modes = {f.relative_to(folder): f.stat().st_mode & 0o777 for f in folder.rglob("*") if f.is_file()}
    assert set(modes.values()) == {0o644}, modes
