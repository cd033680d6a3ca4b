"""Publishing: what is written, what is refused, and the real client against a Hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import dssk  # noqa: F401 - lets the Auto classes load what is published
from dssk.checkpoint import finish_checkpoint, write_checkpoint
from dssk.commands import publish as publish_command
from dssk.config import experiment_id
from dssk.errors import DamagedData, Diverged, DsskError, Locked
from dssk.hub import publish
from dssk.hub.export import export
from dssk.hub.model_card import Origin, model_card
from dssk.models.weights import is_cross_attn
from dssk.utils import files
from tests.conftest import REPOSITORY, byte_tokenizer, experiment, fused
from tests.hub import model_hub

TOKEN = "hf_never_to_be_seen"
SCORES = {
    "with_context": {
        **{"n": 12, "em": 0.75, "em_low": 0.5, "em_high": 0.9167, "f1": 0.8, "f1_low": 0.6, "f1_high": 0.95},
        **{"rouge_l": 0.8, "span_em": 0.75, "answer_nll": 0.1, "by_class": {}, "by_context_tokens": []},
    },
    "no_context": {
        "n": 12,
        "em": 0.0,
        "em_low": 0.0,
        "em_high": 0.0,
        "f1": 0.0,
        "f1_low": 0.0,
        "f1_high": 0.0,
    },
    **{"right_beats_wrong": 0.9, "right_beats_wrong_low": 0.8, "right_beats_wrong_high": 1.0},
}


@pytest.fixture(scope="module")
def trained(base_path, tmp_path_factory):
    """The folder of a run: a checkpoint as training writes it, a fused model, and scores."""
    exp_dict = experiment(base_path)
    folder = tmp_path_factory.mktemp("runs") / experiment_id(exp_dict)
    folder.mkdir()
    model, tokenizer = fused(base_path), byte_tokenizer()
    tokenizer.pad_token = "<fim_pad>"
    facts = {"step": 20, "experiment": exp_dict}
    with write_checkpoint(folder / "checkpoint-20", facts, 1) as writer:
        weights = {name: p.detach() for name, p in model.named_parameters() if is_cross_attn(name)}
        writer.model(model, tokenizer, weights)
        writer.tensors("optimizer.safetensors", {"exp_avg": torch.zeros(3)})
    with write_checkpoint(folder / "final", facts, 1):
        model.save_pretrained(folder / "final")
        tokenizer.save_pretrained(folder / "final")
    (folder / "scores.json").write_text(json.dumps(SCORES))
    lines = [
        {"step": 10, "eval_em": 0.1, "eval_f1": 0.2},
        {"step": 20, "eval_em": 0.3, "eval_f1": 0.4},
        {"step": 20},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def command(run_command):
    return partial(run_command, publish_command)


def answers(path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(path)
    return model.answer(["when", "who"], "Mill 1 was built in 1701.", max_new_tokens=6)


def written(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


COMMON = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
COMMON |= {"modeling_dssk.py"}


@pytest.mark.parametrize("source", ["", "final", "checkpoint-20"])
@pytest.mark.parametrize("what", ["fused", "cross_attention"])
def test_what_is_published_loads_and_holds_nothing_else(command, trained, base_path, tmp_path, source, what):
    output = tmp_path / "made" / "out"
    flags = ["--base_model", base_path] if what == "cross_attention" else []
    said = command("--checkpoint", trained / source, "--output", output, "--what", what, *flags)
    assert "nothing was uploaded" in said
    assert written(output) == COMMON | {"tokenizer_config.json"}
    assert answers(output) == answers(trained / "final")
    size = (output / "model.safetensors").stat().st_size
    assert size < (trained / "final" / "model.safetensors").stat().st_size or what == "fused"
    if what == "fused":
        for path in output.iterdir():
            assert str(base_path).encode() not in path.read_bytes(), path
    else:
        config = json.loads((output / "config.json").read_text())
        assert config["base_model_name_or_path"] == str(base_path)


def test_the_card_tells_of_the_run(command, trained, base_path, store_path, tmp_path):
    output = tmp_path / "out"
    flags = ["--repo", "someone/mill", "--base_model", "bigcode/starcoder", "--data_path", store_path]
    command("--checkpoint", trained, "--output", output, "--what", "cross_attention", *flags)
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == "bigcode/starcoder"
    assert card.data.base_model_relation == "adapter"
    assert card.data.license is None
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("exact_match", 0.75),
        ("f1", 0.8),
    ]
    assert "| with context | 0.750 (0.500 to 0.917) | 0.800 (0.600 to 0.950) | 12 |" in card.text
    assert "0.900 (0.800 to 1.000)" in card.text
    assert 'from_pretrained("someone/mill")' in card.text
    assert "trained on rows.jsonl" in card.text
    assert "36 questions in train, 12 questions in val" in card.text
    assert "64 bytes a token in bfloat16, the base's keys and values would take 128 bytes" in card.text
    assert "| learning_rate | 0.0006 |" in card.text
    assert "| steps | 20 |" in card.text
    assert "| model_path | bigcode/starcoder |" in card.text
    assert "That of the base model, bigcode/starcoder." in card.text
    assert str(base_path.parent) not in card.content
    assert str(tmp_path) not in card.content


def test_the_card_of_a_merged_reader_tells_of_maps_and_of_no_folder(base_path, tmp_path):
    model = fused(base_path, reader="merged", encode_layer="1+3")
    teacher = experiment(base_path, reader="merged", distill=str(tmp_path / "teacher"))
    card = model_card("someone/mill", "cross_attention", model, Origin("base", experiment=teacher))
    assert "frozen, with maps from stored states to keys and values that were trained" in card.text
    assert "128 bytes a token in bfloat16" in card.text
    assert "It takes its places, as in a prompt, among" in card.text
    assert "blocks" not in card.text.partition("## Training")[0]
    assert "| distill | teacher |" in card.text
    assert str(tmp_path) not in card.content
    assert "merged" in card.data.tags


def test_scores_belong_to_what_was_scored(command, trained, tmp_path):
    for source, expected in (
        ("final", "0.750 (0.500"),
        ("checkpoint-20", "during training: EM 0.300, F1 0.400."),
    ):
        output = tmp_path / source
        if source == "checkpoint-20":  # the run's scores are of another step from now on
            (trained / "scores.json").write_text(json.dumps(SCORES | {"step": 10}))
        command("--checkpoint", trained / source, "--output", output)
        assert expected in (output / "README.md").read_text()


def test_what_cannot_be_published_is_refused(command, trained, tmp_path):
    output = tmp_path / "out"
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "final" / "dssk_manifest.json").unlink()
    said = command("--checkpoint", broken / "final", "--output", output, code=DamagedData.exit_code)
    assert "is unfinished" in said
    weights = broken / "checkpoint-20" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = command("--checkpoint", broken / "checkpoint-20", "--output", output, code=DamagedData.exit_code)
    assert "damaged" in said
    said = command("--checkpoint", trained, "--output", output, "--what", "cross_attention", code=2)
    assert "nobody else has it: pass --base_model" in said
    assert "want --repo USER/NAME" in command("--checkpoint", trained, code=2)
    assert not output.exists()
    assert written(tmp_path) == {"broken"}
    output.mkdir()
    assert "want a new folder" in command("--checkpoint", trained, "--output", output, code=2)


def test_a_base_is_called_what_it_is(command, base_path, tmp_path):
    said = command("--checkpoint", base_path, "--output", tmp_path / "out", code=2)
    assert "is a base model without cross-attention blocks" in said
    assert said.count("\n") == 1


def test_weights_that_are_not_finite_are_refused(command, trained, base_path, tmp_path):
    model = fused(base_path)
    with torch.no_grad():
        model.cross_attn_blocks[0].attn.c_proj.weight[0, 0] = torch.nan
    folder = tmp_path / "final"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    finish_checkpoint(folder, {"step": 1})
    said = command("--checkpoint", folder, "--output", tmp_path / "out", code=Diverged.exit_code)
    assert "attn.c_proj.weight is not finite" in said


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [("not a name", TOKEN, "want USER/NAME"), ("someone/mill", "", "run `hf auth login`, or set HF_TOKEN")],
)
def test_a_wrong_name_and_no_login_are_found_before_anything_is_loaded(
    trained, monkeypatch, repository, token, message
):
    monkeypatch.setattr(publish, "get_token", lambda: token or None)
    monkeypatch.setattr(publish, "load_model", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(DsskError, match=message):
        publish.publish(trained, repository)


def publish_to(hub, *argv: object, code: int = 0, **environment: str) -> str:
    """The command as a process of its own, with the real client; both its outputs."""
    words = [sys.executable, "-m", "dssk", "publish", *map(str, argv)]
    settings = {**os.environ, **hub.environment(), **environment}
    result = subprocess.run(words, cwd=REPOSITORY, env=settings, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return (
        result.stderr if code else result.stdout.splitlines(keepends=True)[-1]
    )  # libraries may speak before


@pytest.mark.slow
def test_the_hub_gets_the_model_and_gives_it_back(trained, base_path, tmp_path):
    base = {path.name: path.read_bytes() for path in base_path.iterdir()}
    with model_hub.serve(TOKEN, {"someone/base": base}) as hub:
        flags = ["--repo", "someone/mill", "--what", "cross_attention", "--base_model", "someone/base"]
        assert publish_to(hub, "--checkpoint", trained, *flags) == f"{hub.url}/someone/mill\n"
        assert hub.models["someone/mill"].keys() == COMMON | {"tokenizer_config.json"}
        assert hub.private["someone/mill"]
        assert len(hub.blobs) == 1
        assert written(trained) == {"checkpoint-20", "final", "scores.json", "metrics.jsonl"}
        load = (
            "import dssk, transformers\n"
            "model = transformers.AutoModelForCausalLM.from_pretrained('someone/mill')\n"
            "print(model.answer(['when', 'who'], 'Mill 1 was built in 1701.', max_new_tokens=6))"
        )
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "cache")}
        loaded = subprocess.run(
            [sys.executable, "-c", load], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert loaded.stdout == f"{answers(trained / 'final')}\n", loaded.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [("token", "Invalid username or password"), ("public", "everyone can read it"), ("closed", "onnect")],
)
def test_what_the_hub_refuses_is_one_line(trained, monkeypatch, fault, message):
    token = "hf_wrong" if fault == "token" else TOKEN
    with model_hub.serve(TOKEN, {"someone/mill": {}} if fault == "public" else {}) as hub:
        if fault == "closed":
            hub.server_close()
        hub.take_over(monkeypatch, token)
        with pytest.raises(DsskError, match=message) as error:
            publish.publish(trained, "someone/mill")
    assert token not in str(error.value)
    assert "\n" not in str(error.value)
    assert written(trained) == {"checkpoint-20", "final", "scores.json", "metrics.jsonl"}


def test_what_a_killed_writer_left_is_in_nobodys_way_and_two_never_meet(trained, base_path, tmp_path):
    def export_it():
        export(trained / "checkpoint-20", tmp_path / "out", str(base_path))

    def write_it():
        publish.write(trained / "final", tmp_path / "out")

    for write in (export_it, export_it, write_it):  # an export takes the place of an older one
        (tmp_path / ".tmp-01234567-out").mkdir()
        if write is write_it:
            shutil.rmtree(tmp_path / "out")
        with files.lock(tmp_path / ".out.lock"), pytest.raises(Locked, match='"pid"'):
            write()
        write()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
