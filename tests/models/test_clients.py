"""What other libraries do with a model of transformers, done with a fused one of a family that is not StarCoder's."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

import dssk
from dssk.models.weights import is_cross_attn
from tests.families import tiny_base

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny_base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(base_folder):
    return fused(base_folder)


def fused(folder, **fields):
    torch.manual_seed(1)
    return dssk.from_base(folder, num_cross_attn_layers=2, cross_attn_init="normal", **fields).eval()


@pytest.fixture
def given(model):
    """Question tokens, encoder states of contexts, and the logits that a plain call gives."""
    generator = torch.Generator().manual_seed(0)
    ids, contexts = (torch.randint(3, 60, (2, n), generator=generator) for n in (7, 5))
    states, _ = model.encode(contexts)
    return ids, states, model(ids, encoder_hidden_states=states).logits.detach()


# accelerate and peft


def test_offloaded_blocks_are_brought_in(model, given, tmp_path):
    from accelerate import cpu_offload

    ids, states, expected = given
    model.save_pretrained(tmp_path / "whole")
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(ids, encoder_hidden_states=states).logits, expected)
    where = dict.fromkeys(
        ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole",
        device_map={**where, "model.cross_attn": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    torch.testing.assert_close(loaded(ids, encoder_hidden_states=states).logits, expected)


def test_lora_in_the_decoder_and_on_the_head_gets_gradients(model, given):
    from peft import LoraConfig, get_peft_model

    ids, states, _ = given
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=4)).train()
    wrapped(input_ids=ids, labels=ids, encoder_hidden_states=states).loss.backward()
    second = {n: p.grad for n, p in wrapped.named_parameters() if "lora_B" in n}
    assert any("lm_head" in name for name in second)
    assert all(gradient is not None and gradient.any() for gradient in second.values())


def test_modules_that_peft_trains_and_saves_are_those_that_are_called(model, given):
    from peft import LoraConfig, get_peft_model

    ids, states, _ = given
    settings = LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["v_attn", "c_fc"])
    wrapped = get_peft_model(model, settings).train()
    wrapped(input_ids=ids, labels=ids, encoder_hidden_states=states).loss.backward()
    copies = [p for n, p in wrapped.named_parameters() if "modules_to_save" in n and p.requires_grad]
    assert len(copies) == 2 * 3  # of each block, v_attn with a bias and c_fc without
    assert all(p.grad is not None for p in copies)


def test_an_int8_base_answers(base_folder, given):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    ids, states, expected = given
    model = fused(base_folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    kinds = {type(p).__name__ for n, p in model.named_parameters() if is_cross_attn(n)}
    assert kinds == {"Parameter"}
    assert any(type(p.data).__name__ != "Tensor" for n, p in model.named_parameters() if not is_cross_attn(n))
    found = model(ids, encoder_hidden_states=states).logits
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    model.train()(ids, labels=ids, encoder_hidden_states=states).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# torch


@pytest.mark.slow
def test_a_model_that_reads_is_one_graph(model, given):
    ids, states, expected = given
    context = model.project_context(states)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, context=context, use_cache=False).logits, expected)
        compiled(ids, use_cache=False)


@pytest.mark.slow
def test_a_model_that_reads_is_exported(model, given):
    ids, states, expected = given
    with torch.no_grad():
        program = torch.export.export(
            model, (ids,), {"encoder_hidden_states": states, "use_cache": False}, strict=False
        )
    found = program.module()(ids, encoder_hidden_states=states, use_cache=False).logits
    torch.testing.assert_close(found, expected)


def test_dynamic_quantization_and_copies_compute(model, given):
    ids, states, expected = given
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert torch.isfinite(quantized(ids, labels=ids, encoder_hidden_states=states).loss)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids, encoder_hidden_states=states).logits, expected)


# transformers


def test_a_plain_trainer_trains_and_reports_an_evaluation_loss(model, given, tmp_path):
    ids, states, _ = given
    rows = [{"input_ids": ids[0], "labels": ids[0], "encoder_hidden_states": states[0]}] * 4
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, max_steps=2, disable_tqdm=True)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert find_labels(type(model)) == ["labels"]
    for name, parameter in model.named_parameters():
        if not is_cross_attn(name):
            assert torch.equal(parameter, before[name]), name


def test_an_assistant_drafts_for_a_model_that_reads(model, given, base_folder):
    ids, states, _ = given
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    context = model.project_context(states[:1].requires_grad_())  # with a graph, which no copy survives
    expected = model.generate(ids[:1], context=context, **GREEDY)
    for assistant in (plain, model):
        found = model.generate(ids[:1], context=context, assistant_model=assistant, **GREEDY)
        assert torch.equal(found, expected)


def test_the_backbone_reads_a_context(model, given):
    ids, states, expected = given
    for how in ({"encoder_hidden_states": states}, {"context": model.project_context(states)}):
        torch.testing.assert_close(model.lm_head(model.model(ids, **how).last_hidden_state), expected)


def test_arguments_of_from_pretrained_reach_where_they_belong(model, given, tmp_path):
    ids, states, expected = given
    model.save_pretrained(tmp_path / "sub")
    loaded = type(model).from_pretrained(
        pretrained_model_name_or_path=tmp_path,
        subfolder="sub",
        use_cache=False,
        output_attentions=True,
        cross_attn_dropout_prob=0.25,
        attn_implementation="eager",
    )
    assert not loaded.config.use_cache
    assert loaded.config.cross_attn_dropout_prob == 0.25
    output = loaded.eval()(ids, encoder_hidden_states=states)
    assert [tuple(w.shape) for w in output.cross_attentions] == [(2, 4, 7, 5)] * 2
    assert len(output.attentions) == 3
    for name, how in (("variant", {"variant": "v"}), ("shards", {"max_shard_size": "20kB"})):
        model.save_pretrained(tmp_path / name, cross_attn_only=True, **how)
        how.pop("max_shard_size", None)
        blocks, info = type(model).from_pretrained(
            tmp_path / name, output_loading_info=True, local_files_only=True, **how
        )
        assert not info["missing_keys"]
        assert torch.equal(blocks(ids, encoder_hidden_states=states).logits, expected)


def test_outputs_are_tuples_on_request(model, given):
    ids, states, expected = given
    loss, logits, *_ = model(ids, labels=ids, encoder_hidden_states=states, return_dict=False)
    assert loss.ndim == 0
    torch.testing.assert_close(logits, expected)


def test_a_flag_of_the_configuration_turns_on_checkpointing(model):
    model.config.gradient_checkpointing = True
    assert type(model)(model.config).is_gradient_checkpointing


def test_resized_embeddings_cannot_be_saved_as_blocks_alone(model, tmp_path):
    model.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="save it whole"):
        model.save_pretrained(tmp_path, cross_attn_only=True)


def test_contexts_that_do_not_fit_are_refused(model, given, base_folder):
    ids, states, _ = given
    context = model.project_context(states)
    other = fused(base_folder, cross_attn_shared_weights=True)
    refused = [
        (lambda: other(ids, context=context), "projected for 2 blocks, this model has 1"),
        (lambda: model(ids, context=context, encoder_hidden_states=states), "want one of them"),
        (lambda: model.generate(ids, context=context, context_input_ids=ids), "want one of them"),
        (lambda: model.project_context("text"), "want .contexts, tokens, hidden size."),
        (lambda: model.project_context(states, torch.ones(2, 4)), r"encoder_attention_mask is \(2, 4\)"),
        (lambda: model(ids, context="text"), "want what project_context of this model returns"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_folder_loads_with_remote_code_and_without_importing_dssk(model, tmp_path):
    model.save_pretrained(tmp_path)
    load = f"from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained({str(tmp_path)!r}, "
    done = subprocess.run(
        [sys.executable, "-c", f"{load}trust_remote_code=True)).__name__)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "CrossAttnLlamaForCausalLM", done.stderr


def test_the_plain_base_comes_out_bit_for_bit(model, base_folder, tmp_path):
    plain, ids = model.plain_base(), torch.arange(3, 12)[None]
    assert torch.equal(plain(ids).logits, model(ids).logits)
    plain.save_pretrained(tmp_path)
    out, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path, base_folder))
    assert type(out) is type(base)
    assert out.config.to_diff_dict() == base.config.to_diff_dict()
    found = dict(out.named_parameters())
    assert found.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(found[name], p) for name, p in base.named_parameters())
