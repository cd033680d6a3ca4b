"""Training the merged reader by the same road as the blocks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import dssk
from dssk.commands.train import parse_args
from dssk.config import experiment_id
from dssk.data.collate import Collator
from dssk.errors import DsskError
from dssk.inference.calibrate import fit_reader
from dssk.models.merged import MergedReader
from dssk.training.run import train
from tests.conftest import VOCAB_SIZE, byte_tokenizer, encode_rows, experiment, question_rows
from tests.families import tiny_base
from tests.training.conftest import losses, weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_base("llama", folder / "base", vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    byte_tokenizer().save_pretrained(folder / "base")
    store = encode_rows(folder / "base", folder, question_rows(48), "--encode_layer", "2")
    return folder / "base", store


@pytest.fixture
def run(llama, tmp_path):
    base, store = llama

    def run(*flags: str, **changes):
        exp_dict = experiment(base, **{"reader": "merged", "encode_layer": 2} | changes)
        argv = ["-e", "group", "-sb", str(tmp_path), "--data_path", str(store), "--log_every", "2"]
        train(parse_args([*argv, "--generation_eval_samples", "2", *flags]), {"group": [exp_dict]})
        return tmp_path / experiment_id(exp_dict)

    return run


def test_maps_start_fitted_learn_and_load_from_a_checkpoint_and_a_fused_folder(run):
    folder = run("--steps", "6", learning_rate=2e-3)
    seen = losses(folder)
    assert seen[6] < seen[2]
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("checkpoint-6", "final")
    ]
    reader = models[0].cross_attn_blocks[0]
    assert reader.shift.any()
    assert reader.up.weight.abs().sum() > 0
    ids = torch.arange(6, 18).view(2, 6)
    assert torch.equal(*(model(ids, context_input_ids=ids).logits for model in models))
    assert json.loads((folder / "checkpoint-6" / "config.json").read_text())["encode_layer"] == 2


@pytest.mark.parametrize(("kept", "online", "fitted"), [("int8", False, "int8"), ("int8", True, "bf16")])
def test_maps_are_fitted_on_states_as_they_will_be_read(llama, tmp_path, monkeypatch, kept, online, fitted):
    base, _ = llama
    flags = ("--encode_layer", "2", "--storage_dtype", kept)
    store = encode_rows(base, tmp_path, question_rows(8), *flags)
    asked: list[str] = []

    def fit(model, texts, storage_dtype):
        asked.append(storage_dtype)
        return fit_reader(model, texts, storage_dtype)

    monkeypatch.setattr("dssk.training.run.fit_reader", fit)
    exp_dict = experiment(base, reader="merged", encode_layer=2, encode_online=online)
    argv = ["-e", "group", "-sb", str(tmp_path), "--data_path", str(store), "--steps", "1"]
    train(parse_args([*argv, "--generation_eval_samples", "0"]), {"group": [exp_dict]})
    assert asked == [fitted]


@pytest.mark.parametrize("changes", [{}, {"decoder_lora": {"rank": 2}}, {"num_contexts": 3}], ids=str)
def test_layers_that_are_run_again_train_beside_the_maps(run, changes):
    folder = run("--steps", "6", learning_rate=2e-3, encode_layer=2, reader_replay=1, **changes)
    seen = losses(folder)
    assert seen[6] < seen[2]
    assert json.loads((folder / "checkpoint-6" / "config.json").read_text())["reader_replay"] == 1


def test_a_run_goes_on_from_its_checkpoint_maps_and_adapters(run, monkeypatch):
    settings = {"cross_attn_dropout_prob": 0.0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    settings["decoder_lora"] = {"rank": 2}
    folder = run("--steps", "4", "-r", "1", **settings)
    whole, trained = losses(folder), weights(folder / "checkpoint-4")
    run("--steps", "2", "-r", "1", **settings)
    monkeypatch.setattr("dssk.training.run.fit_reader", None)  # the maps that lie there are not fitted again
    resumed = losses(run("--steps", "4", **settings))
    assert resumed[4] == pytest.approx(whole[4], abs=1e-6)
    assert any(name.endswith("decoder_lora.0_mlp_down_proj.up") and t.any() for name, t in trained.items())
    again = weights(folder / "checkpoint-4")
    assert all(torch.equal(again[name], trained[name]) for name in trained | again)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    assert all(torch.equal(loaded.state_dict()[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode_layer": 1}, "encoded by layer 2, the model reads layer 1"),
        ({"encode_layer": "last"}, "encoded by layer 2, the model reads layer last"),
        ({"encode_layer": 7}, "want 'last', a layer from 1 to 3"),
        ({"gradient_checkpointing": True}, "set it to false"),
        ({"reader": "merge"}, "reader is 'merge'"),
        ({"decoder_lora": {"rank": 0}}, "decoder_lora.rank is 0, input should be greater than"),
        ({"decoder_lora": {"rank": 2, "targets": "all"}}, "unknown key decoder_lora.targets"),
        ({"decoder_lora": 16}, "decoder_lora is 16, input should be a valid dictionary"),
        (
            {"decoder_lora": {"rank": 2}, "reader": "cross_attention", "gradient_checkpointing": True},
            "where adapters do not act: set it to false",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(run, changes, message):
    with pytest.raises(DsskError, match=message):
        run("--steps", "2", **changes)


BLOCKS = {"reader": "cross_attention", "num_cross_attn_layers": 1, "cross_attn_layers_stride": 1}


def test_blocks_read_the_states_of_a_middle_layer(run):
    seen = losses(run("--steps", "6", **BLOCKS, learning_rate=5e-3))
    assert seen[6] < seen[2]


def test_blocks_start_as_the_self_attention_of_their_layers(run):
    as_base = {"cross_attn_norm": "base", "cross_attn_num_key_value_heads": "base", "cross_attn_init": "base"}
    folder = run("--steps", "1", **BLOCKS, **as_base, learning_rate=1e-9)
    block = AutoModelForCausalLM.from_pretrained(folder / "final")
    read, own = block.cross_attn_blocks[0].attn, block.base_model.layers[2].self_attn
    torch.testing.assert_close(read.q_attn.weight, own.q_proj.weight)
    assert read.k_attn.weight.any()
    assert read.shift.any()
    with pytest.raises(DsskError, match="cross_attn_init base does not fit cross_attn_norm: it needs blocks"):
        run("--steps", "1", **BLOCKS, **as_base | {"cross_attn_norm": "layer_norm"})


@pytest.mark.parametrize("reader", ["merged", "cross_attention"])
def test_questions_of_one_context_share_it_and_lose_nothing(llama, reader):
    base, _ = llama
    model = dssk.from_base(
        base, reader=reader, encode_layer=2, num_cross_attn_layers=1, cross_attn_init="normal"
    )
    fit_reader(model, [list(range(5, 40))]) if reader == "merged" else None
    contexts = {"one": [5, 6, 7, 8, 9], "two": [10, 11, 12]}
    examples = [
        {"input_ids": ids, "labels": ids, "context": name, "context_input_ids": contexts[name]}
        for name, ids in [("one", [20, 21]), ("one", [22, 23, 24]), ("two", [25, 26]), ("two", [27, 28])]
    ]
    apart, together = (Collator(0, share)(examples) for share in (False, True))
    assert (len(apart["context_input_ids"]), len(together["context_input_ids"])) == (4, 2)
    assert (
        len(Collator(0, True)(examples[:3])["context_input_ids"]) == 3
    )  # the model could not tell whose it is
    losses = [model(**batch).loss for batch in (apart, together)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    swapped = {**together, "context_input_ids": together["context_input_ids"].flip(0)}
    swapped["context_attention_mask"] = together["context_attention_mask"].flip(0)
    assert abs(model(**swapped).loss - losses[0]) > 1e-4


def test_training_reads_each_context_once_for_its_questions(run, monkeypatch):
    seen = []
    project = MergedReader.forward
    monkeypatch.setattr(
        MergedReader, "forward", lambda *args, **kw: seen.append(len(args[1])) or project(*args, **kw)
    )
    run(
        "--steps", "2", "--generation_eval_samples", "0", questions_per_context=2, cross_attn_dropout_prob=0.0
    )
    assert set(seen[:2]) <= {2, 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions_per_context": 3}, "want a divisor of train_batch_size, which is 4"),
        (
            {"questions_per_context": 4, "num_contexts": 2, "distractors": {"batch": 1.0}},
            "a train_batch_size of 4 with 4 questions a context has one context",
        ),
        ({"questions_per_context": 2, "include_context_ids": True}, "questions_per_context to 1"),
    ],
)
def test_questions_that_cannot_be_together_are_refused(run, changes, message):
    with pytest.raises(DsskError, match=message):
        run("--steps", "2", **changes)
