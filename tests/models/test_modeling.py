import copy
import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GPTBigCodeForCausalLM

from dssk.inference.auto import CrossAttnGPTBigCodeForCausalLM
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.cross_attention import CrossAttnOutput
from dssk.models.reading import hide_tokens
from dssk.models.weights import is_cross_attn
from tests.conftest import fused, make_base

LAYOUTS = [
    {
        "cross_attn_shared_weights": shared,
        "cross_attn_shared_projections": projections,
        "cross_attn_final_layer": final,
    }
    for shared, projections, final in itertools.product([False, True], repeat=3)
]
LAYOUTS += [
    {"cross_attn_num_key_value_heads": 1},
    {"cross_attn_hidden_size": 16, "cross_attn_num_attention_heads": 2},
]


def context(model, tokens, rows: int = 2, length: int = 9):
    """Encoded contexts of unequal length: the last has two tokens of padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -2:] = 0
    states, _ = model.encode(tokens(rows, length), mask)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


# The base stays the base


@pytest.mark.parametrize("fields", LAYOUTS)
def test_without_a_context_the_logits_are_the_bases_bit_for_bit(base_path, base, tokens, fields):
    ids = tokens(3, 11)
    assert torch.equal(fused(base_path, **fields)(ids).logits, base(ids).logits)


def test_a_context_changes_the_logits(base_path, base, tokens):
    model, ids = fused(base_path), tokens(2, 11)
    assert not torch.allclose(model(ids, **context(model, tokens)).logits, base(ids).logits, atol=1e-3)


@pytest.mark.parametrize("fields", LAYOUTS)
def test_zero_init_makes_the_fused_model_its_base_even_with_a_context(base_path, base, tokens, fields):
    model, ids = fused(base_path, cross_attn_init="zero", **fields), tokens(2, 11)
    assert torch.equal(model(ids, **context(model, tokens)).logits, base(ids).logits)


@pytest.mark.parametrize("fields", LAYOUTS)
def test_only_cross_attention_weights_are_new(base_path, base, fields):
    model = fused(base_path, **fields)
    new = {name for name, _ in model.named_parameters()} - {name for name, _ in base.named_parameters()}
    assert new
    assert all(is_cross_attn(name) for name in new)
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_new_weights_have_the_initial_spread_of_the_configuration(tmp_path):
    make_base(tmp_path, n_embd=128, n_head=4, initializer_range=0.02)
    blocks = fused(tmp_path).transformer.cross_attn
    linear = [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 2 * 6
    for module in linear:
        assert module.weight.std().item() == pytest.approx(
            0.0176, abs=0.001
        )  # normal cut off at two deviations
        assert module.weight.abs().max() <= 0.04
        assert not module.bias.any()
    zeros = fused(tmp_path, cross_attn_init="zero").transformer.cross_attn
    assert {not m.weight.any() for m in zeros.modules() if isinstance(m, CrossAttnOutput)} == {True}
    assert zeros[0].attn.v_attn.weight.any()


def test_a_base_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    with pytest.raises(ValueError, match="want gpt_bigcode"):
        CrossAttnGPTBigCodeForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_base_with_other_weights_than_its_configuration_says_is_refused(base_path, tmp_path, change):
    file = shutil.copytree(base_path, tmp_path / "base") / "model.safetensors"
    weights = load_file(file)
    last = weights.pop("transformer.h.3.ln_1.weight")
    if change == "left over":
        weights |= {f"transformer.h.{layer}.ln_1.weight": last.clone() for layer in (3, 4)}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match="is not a plain .* checkpoint: 1 keys"):
        fused(file.parent)


@pytest.mark.parametrize("final", [False, True])
def test_a_block_stands_before_its_layer_or_after_it(base_path, tokens, final):
    model = fused(base_path, num_cross_attn_layers=1, cross_attn_final_layer=final)
    (number,) = model.config.cross_attn_layers
    seen = []
    for name, module in (("layer", model.transformer.h[number].attn), ("block", model.cross_attn_blocks[0])):
        module.register_forward_hook(lambda *args, name=name: seen.append(name))
    model(tokens(2, 5), **context(model, tokens))
    assert seen[-2:] == (["layer", "block"] if final else ["block", "layer"])


# Training


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("fields", LAYOUTS)
def test_every_new_parameter_gets_a_gradient_and_no_frozen_one_does(base_path, tokens, fields, checkpointing):
    model, ids = fused(base_path, **fields), tokens(2, 11)
    inputs = context(model, tokens)
    model.eval()(ids, **inputs)  # a forward pass without training must not disturb
    model.train()
    expected = gradients(model, ids, inputs)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    found = gradients(model, ids, inputs)
    trainable = {name for name, _ in model.named_parameters() if is_cross_attn(name)}
    assert found.keys() == trainable
    for name, gradient in found.items():
        assert gradient.abs().sum() > 0 or name.endswith("k_attn.bias"), (
            name
        )  # softmax ignores a shift of all keys
        torch.testing.assert_close(gradient, expected[name], msg=name)


def gradients(model, ids, inputs):
    model.zero_grad()
    model(ids, labels=ids, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fields", LAYOUTS)
def test_leaving_out_positions_without_a_label_changes_neither_loss_nor_gradients(base_path, tokens, fields):
    model, ids = fused(base_path, **fields).train(), tokens(3, 11)
    labels = ids.clone()
    labels[0, :8] = -100
    labels[1, 5:9] = -100
    labels[2] = -100  # such a row exists where every label was cut off
    inputs = context(model, tokens, rows=3)
    found = {}
    for skip_logits in (True, False):
        model.zero_grad()
        loss = model(ids, labels=labels, skip_logits=skip_logits, **inputs).loss
        loss.backward()
        found[skip_logits] = [loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    torch.testing.assert_close(found[True], found[False])


def test_nothing_below_the_lowest_block_is_kept_for_the_backward_pass(base_path, tokens):
    model, ids = fused(base_path, num_cross_attn_layers=1).train(), tokens(2, 11)
    seen = {}
    for i, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out.requires_grad))
    model(ids, labels=ids, **context(model, tokens))
    assert seen == {0: False, 1: False, 2: False, 3: True}


def test_only_the_blocks_are_in_train_mode(base_path):
    model = fused(base_path).train()
    dropouts = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert not any(m.training for m in dropouts)
    assert all(m.training for m in model.transformer.cross_attn.modules())
    assert not any(m.training for m in model.eval().modules())


def test_a_training_step_changes_every_new_parameter_and_no_frozen_bit(base_path, base, tokens):
    model, ids = fused(base_path).train(), tokens(2, 11)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    model(ids, labels=ids, **context(model, tokens)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_cross_attn(name), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_cross_entropy_of_labelled_next_tokens(base_path, tokens, smoothing):
    model, ids = fused(base_path), tokens(3, 11)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[2, 8:] = -100
    inputs = context(model, tokens, rows=3)
    output = model(ids, labels=labels, smoothing=smoothing, **inputs)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), labels[:, 1:], label_smoothing=smoothing
    )
    torch.testing.assert_close(output.loss, expected)
    divided = model(ids, labels=labels, num_items_in_batch=7, smoothing=smoothing, **inputs).loss
    torch.testing.assert_close(divided, expected * (labels[:, 1:] != -100).sum() / 7)


def test_logits_are_left_out_in_training_and_returned_in_evaluation(base_path, tokens):
    model, ids = fused(base_path), tokens(2, 11)
    assert model(ids, labels=ids).logits.shape == (2, 11, model.config.vocab_size)
    assert model.train()(ids, labels=ids, **context(model, tokens)).logits is None
    assert model(ids, labels=ids, skip_logits=False, **context(model, tokens)).logits is not None


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 12), prob=st.floats(0, 0.99))
def test_hiding_tokens_only_ever_hides_visible_ones_and_never_all_of_a_row(seed, length, prob):
    torch.manual_seed(seed)
    mask = torch.rand(4, length) < 0.7
    hidden = hide_tokens(mask, prob)
    assert not (hidden & ~mask).any()
    assert torch.equal(hidden.any(-1), mask.any(-1))


def test_the_share_of_hidden_tokens_is_the_probability_asked_for():
    torch.manual_seed(0)
    assert (~hide_tokens(torch.ones(50, 1000, dtype=torch.bool), 0.3)).float().mean() == pytest.approx(
        0.3, abs=0.01
    )


def test_context_dropout_acts_in_training_only(base_path, tokens):
    model, ids = fused(base_path, cross_attn_dropout_prob=0.5), tokens(2, 11)
    inputs = context(model, tokens)
    assert torch.equal(model(ids, **inputs).logits, model(ids, **inputs).logits)
    model.train()
    assert not torch.equal(model(ids, **inputs).logits, model(ids, **inputs).logits)


def test_contexts_given_as_tokens_are_encoded_by_the_base(base_path, tokens):
    model, ids = fused(base_path), tokens(2, 11)
    context_ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    states, states_mask = model.encode(context_ids, mask)
    stored = model(ids, encoder_hidden_states=states, encoder_attention_mask=states_mask)
    online = model.train()(
        ids, labels=ids, context_input_ids=context_ids, context_attention_mask=mask, skip_logits=False
    )
    assert torch.equal(online.logits, stored.logits)
    with pytest.raises(ValueError, match="want one of them"):
        model(ids, encoder_hidden_states=states, context_input_ids=context_ids)


# Generation


def argmax_loop(model, ids, new_tokens, **inputs):
    """Greedy decoding without any cache."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False, **inputs).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("fields", LAYOUTS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_greedy_generation_equals_an_uncached_loop(base_path, tokens, fields, implementation):
    model = fused(base_path, attn_implementation=implementation, **fields)
    ids, inputs = tokens(2, 6), context(model, tokens)
    generated = model.generate(
        ids, **inputs, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=4
    )
    assert torch.equal(generated, argmax_loop(model, ids, 10, **inputs))


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 4, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_beams_and_samples_with_caches_equal_those_without(base_path, tokens, how):
    model = fused(base_path)
    ids, inputs = tokens(2, 6), context(model, tokens)
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sequences.append(
            model.generate(ids, **inputs, max_new_tokens=8, use_cache=use_cache, pad_token_id=4, **how)
        )
    assert torch.equal(*sequences)


def test_beams_of_two_contexts_equal_beams_one_by_one(base_path, tokens):
    model = fused(base_path)
    ids, inputs = tokens(2, 6), context(model, tokens)
    how = {
        "num_beams": 4,
        "num_return_sequences": 2,
        "max_new_tokens": 8,
        "eos_token_id": None,
        "pad_token_id": 4,
    }
    together = model.generate(ids, **inputs, **how)
    alone = [
        model.generate(ids[i : i + 1], **{k: v[i : i + 1] for k, v in inputs.items()}, **how) for i in (0, 1)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_left_padded_questions_on_unequal_contexts_equal_single_ones(base_path, tokens):
    model = fused(base_path)
    inputs = context(model, tokens, rows=3)
    questions = [tokens(length) for length in (3, 8, 5)]
    ids = torch.full((3, 8), 4)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, question in enumerate(questions):
        ids[row, 8 - len(question) :] = question
        mask[row, 8 - len(question) :] = 1
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 4}
    batch = model.generate(ids, attention_mask=mask, **inputs, **how)[:, 8:]
    for row, question in enumerate(questions):
        lengths = int(inputs["encoder_attention_mask"][row].sum())
        states = inputs["encoder_hidden_states"][row : row + 1, :lengths]
        single = model.generate(question[None], encoder_hidden_states=states, **how)[0, len(question) :]
        assert torch.equal(batch[row], single)


def test_a_context_is_projected_once_for_all_tokens_beams_and_questions(base_path, tokens, monkeypatch):
    model = fused(base_path)
    calls = []
    for block in model.transformer.cross_attn:
        block.attn.v_attn.register_forward_hook(lambda *args: calls.append(1))
    states, mask = model.encode(tokens(1, 9))
    projected = model.project_context(states, mask)
    assert len(calls) == 2  # one for each of the two blocks
    for _ in range(2):
        model.generate(tokens(3, 6), context=projected, num_beams=2, max_new_tokens=5, pad_token_id=4)
    assert len(calls) == 2
    assert len(projected) == 1
    assert projected.nbytes == 2 * 2 * 9 * 32 * 4  # blocks x (keys, values) x tokens x width x fp32


def test_a_context_without_padding_is_read_without_a_mask_which_takes_faster_kernels(base_path, tokens):
    model = fused(base_path)
    states, mask = model.encode(tokens(2, 9))
    assert mask.all()
    assert model.project_context(states, mask).mask is None
    mask[1, -2:] = False
    assert torch.equal(model.project_context(states, mask).mask, mask)


def test_context_tokens_given_to_generate_are_encoded_once(base_path, tokens, monkeypatch):
    model, calls = fused(base_path), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *args: calls.append(1) or encode(*args))
    context_ids = tokens(2, 9)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 4}
    ids = tokens(2, 6)
    generated = model.generate(ids, context_input_ids=context_ids, **how)
    assert len(calls) == 1
    assert torch.equal(generated, model.generate(ids, encoder_hidden_states=encode(context_ids)[0], **how))


def test_questions_that_share_a_context_are_answered_as_if_each_had_its_own(base_path, tokens):
    model = fused(base_path)
    states, mask = model.encode(tokens(2, 9))
    ids = tokens(6, 6)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 4}
    shared = model.generate(ids, encoder_hidden_states=states, encoder_attention_mask=mask, **how)
    copies = model.generate(ids, encoder_hidden_states=states.repeat_interleave(3, 0), **how)
    assert torch.equal(shared, copies)


def test_stepping_by_hand_with_a_cache_equals_one_pass(base_path, tokens):
    model, ids = fused(base_path), tokens(2, 8)
    projected = model.project_context(*model.encode(tokens(2, 9)))
    whole = model(ids, context=projected).logits
    cache = DynamicCache(config=model.config)
    steps = [
        model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, context=projected).logits
        for i in range(8)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_attention_over_the_context_is_returned_on_request(base_path, tokens):
    model = fused(base_path, attn_implementation="eager")
    inputs = context(model, tokens)
    output = model(tokens(4, 6), **inputs, output_attentions=True)
    assert [tuple(w.shape) for w in output.cross_attentions] == [(4, 4, 6, 9)] * 2
    for weights in output.cross_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 4, 6))
        assert weights[2:, :, :, -2:].max() == 0


# Saving and loading


@pytest.mark.parametrize("fields", LAYOUTS)
@pytest.mark.parametrize("cross_attn_only", [False, True])
def test_a_saved_model_reloads_to_bit_equal_logits(base_path, tokens, tmp_path, fields, cross_attn_only):
    model, ids = fused(base_path, **fields), tokens(2, 11)
    inputs = context(model, tokens)
    model.save_pretrained(tmp_path, cross_attn_only=cross_attn_only)
    import dssk  # noqa: F401 - registers the class

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CrossAttnGPTBigCodeForCausalLM
    assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)
    assert len(loaded.transformer.cross_attn) == len(model.transformer.cross_attn)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(
        filter(is_cross_attn, model.state_dict())
    )


def test_cross_attention_weights_are_saved_alone_and_once(base_path, tmp_path):
    model = fused(base_path, cross_attn_shared_weights=True)
    model.save_pretrained(tmp_path, cross_attn_only=True)
    assert not model.config.cross_attn_only
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(filter(is_cross_attn, model.state_dict()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_path)
    assert (config["model_type"], config["base_model_type"]) == ("dssk", "gpt_bigcode")


def test_cross_attention_weights_load_on_a_base_that_moved(base_path, tokens, tmp_path):
    model, ids = fused(base_path), tokens(2, 5)
    model.config.base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "blocks", cross_attn_only=True)
    loaded = CrossAttnGPTBigCodeForCausalLM.from_pretrained(tmp_path / "blocks", base_model=base_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_weights_of_another_architecture_are_refused(base_path):
    weights = {n: p for n, p in fused(base_path).state_dict().items() if is_cross_attn(n)}
    with pytest.raises(ValueError, match="another architecture"):
        fused(base_path, num_cross_attn_layers=1).load_cross_attention(weights)
    with pytest.raises(ValueError, match="another architecture"):
        fused(base_path, cross_attn_hidden_size=16).load_cross_attention(weights)


def test_a_fused_model_without_its_new_weights_is_refused(base_path, base, tmp_path):
    model = fused(base_path)
    model.save_pretrained(tmp_path, state_dict=base.state_dict())
    with pytest.raises(ValueError, match="has no weights for"):
        CrossAttnGPTBigCodeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_a_round_trip_and_generates(base_path, tokens, tmp_path, dtype):
    model = fused(base_path, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = CrossAttnGPTBigCodeForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    ids, inputs = tokens(2, 6), context(model, tokens)
    assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)
    assert loaded.generate(ids, **inputs, max_new_tokens=3, pad_token_id=4).shape[1] <= 9


def test_fp32_blocks_train_inside_a_half_precision_base(base_path, tokens):
    model, ids = fused(base_path, dtype=torch.bfloat16), tokens(2, 6)
    model.transformer.cross_attn.float()
    inputs = context(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(ids, labels=ids, **inputs).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.isfinite(model.eval()(ids, **inputs).logits).all()


def test_device_map_loads_the_model(base_path, tokens, tmp_path):
    model, ids = fused(base_path), tokens(2, 6)
    model.save_pretrained(tmp_path)
    loaded = CrossAttnGPTBigCodeForCausalLM.from_pretrained(tmp_path, device_map="auto")
    inputs = context(model, tokens)
    assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)


def test_resized_embeddings_stay_frozen(base_path, tokens):
    model = fused(base_path)
    model.resize_token_embeddings(300)
    assert model(tokens(1, 4)).logits.shape[-1] == 300
    assert not any(p.requires_grad for n, p in model.named_parameters() if not is_cross_attn(n))


def test_parameters_are_counted_as_peft_does(base_path, base):
    model = fused(base_path)
    trainable = sum(p.numel() for n, p in model.named_parameters() if is_cross_attn(n))
    assert model.num_parameters(only_trainable=True) == trainable
    assert model.num_parameters() == trainable + base.num_parameters()
    assert model.trainable_parameters() == (trainable, trainable + base.num_parameters())


def test_a_deep_copy_keeps_shared_blocks_shared(base_path):
    model = copy.deepcopy(fused(base_path, cross_attn_shared_weights=True))
    assert len(model.transformer.cross_attn) == 1
    assert [layer.cross_attn_index for layer in model.transformer.h] == [None, 0, None, 0]


def test_base_class_still_loads_the_fused_models_base_weights(base_path, base, tmp_path):
    fused(base_path).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    plain = GPTBigCodeForCausalLM.from_pretrained(base_path)
    assert {n for n, _ in plain.named_parameters()} <= names | {"lm_head.weight"}


# What else a user of transformers expects


@pytest.mark.slow
def test_a_compiled_training_step_equals_an_eager_one(base_path, tokens):
    model, ids = fused(base_path).train(), tokens(2, 11)
    inputs = context(model, tokens)
    expected = gradients(model, ids, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(ids, labels=ids, **inputs).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


def test_a_text_generation_pipeline_answers_a_batch(base_path, tmp_path):
    from transformers import pipeline

    model, tokenizer = fused(base_path), load_tokenizer(base_path)
    tokenizer.padding_side = "left"
    states, _ = model.encode(tokenizer("context: a mill", return_tensors="pt")["input_ids"])
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    how = {"max_new_tokens": 4, "do_sample": False, "context": model.project_context(states)}
    together = answer(["question: who \n answer:", "question: when was it built \n answer:"], **how)
    assert together[0] == answer("question: who \n answer:", **how)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_that_was_saved_is_found(base_path, tmp_path, name):
    model = fused(base_path).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, **{name: "auto"}).dtype == torch.bfloat16
