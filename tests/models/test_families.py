"""What is promised of a fused model, for every family of decoders."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import dssk
from dssk.inference import auto
from dssk.models.configuration import base_norm, norm_eps
from dssk.models.cross_attention import CrossAttnGatedMLP
from dssk.models.weights import is_cross_attn
from tests.families import FAMILIES, VOCAB_SIZE, tiny_base, tiny_config

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LAYOUTS = {"before": {}, "after": {"cross_attn_final_layer": True}}
# A right padding is not masked in a recurrence, and neither is a left one: rows of unequal length are for attention.
RECURRENT = {"mamba"}
NO_LEFT_PADDING = RECURRENT | {"mpt"}  # its biases are counted from the first position, padding or not
NO_STATIC_CACHE = RECURRENT | {"lfm2"}  # their state is no table of keys and values


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    """(name, folder of a tiny base)."""
    return request.param, tiny_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def base(family):
    return AutoModelForCausalLM.from_pretrained(family[1]).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def model(request, family):
    return fused(family[1], **LAYOUTS[request.param])


def fused(folder, **fields):
    torch.manual_seed(1)
    settings = {
        "num_cross_attn_layers": 2,
        "cross_attn_init": "normal",
        "cross_attn_num_key_value_heads": "base",
    }
    return dssk.from_base(folder, **settings | fields).eval()


def ids(*shape, seed: int = 0):
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def projected(model, rows: int = 2):
    """Contexts, of unequal length where the family can mask."""
    tokens, mask = ids(rows, 5, seed=1), torch.ones(rows, 5, dtype=torch.long)
    if model.config.model_type not in RECURRENT:
        mask[-1, 3:] = 0
    return model.project_context(*model.encode(tokens, mask))


def test_without_a_context_it_is_the_base_bit_for_bit(model, base):
    assert torch.equal(model(ids(2, 7)).logits, base(ids(2, 7)).logits)
    assert torch.equal(model.generate(ids(2, 7), **GREEDY), base.generate(ids(2, 7), **GREEDY))
    for name, parameter in base.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_context_changes_the_logits_and_zero_blocks_do_not(model, base, family):
    change = model(ids(2, 7), context=projected(model)).logits - base(ids(2, 7)).logits
    assert change.abs().max() > 1e-3
    identity = fused(family[1], cross_attn_init="zero")
    assert torch.equal(identity(ids(2, 7), context=projected(identity)).logits, base(ids(2, 7)).logits)


def test_the_loss_is_the_familys_own(model, base):
    tokens = ids(2, 7)
    assert model(tokens, labels=tokens).loss == pytest.approx(
        base(tokens, labels=tokens).loss.item(), abs=1e-5
    )
    context = projected(model)
    output = model(tokens, labels=tokens, context=context)
    torch.testing.assert_close(output.logits, model(tokens, context=context).logits)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(output.loss, expected)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(tokens, shift_labels=shifted, context=context).loss, expected)
    third = model(tokens, labels=tokens, context=context, num_items_in_batch=36).loss
    torch.testing.assert_close(third, expected / 3)


def test_beams_and_samples_with_a_cache_equal_those_without(model):
    context = projected(model)
    for how in ({"num_beams": 2, "num_return_sequences": 2}, {"num_beams": 1}):
        found = [
            model.generate(ids(2, 7), context=context, use_cache=u, **GREEDY | how) for u in (True, False)
        ]
        assert torch.equal(*found)


def test_left_padded_questions_equal_single_ones(model, family):
    if family[0] in NO_LEFT_PADDING:
        pytest.skip("nothing to get: this base itself does not pad on the left")
    context = projected(model)
    question, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    question[1, :3], mask[1, :3] = 0, 0
    batch = model.generate(question, attention_mask=mask, context=context, **GREEDY)[1, 7:]
    states = model.encode(ids(2, 5, seed=1)[1:, :3])
    alone = model.generate(question[1:, 3:], context=model.project_context(*states), **GREEDY)[0, 4:]
    assert torch.equal(batch, alone)


def test_padding_on_either_side_encodes_alike(model, family):
    tokens = ids(1, 4, seed=2)
    whole, _ = model.encode(tokens)
    padding = torch.zeros(1, 2, dtype=torch.long)
    seen = torch.ones_like(tokens)
    for left in (True, False):
        sides = [(padding, tokens), (padding, seen)] if left else [(tokens, padding), (seen, padding)]
        padded, mask = (torch.cat(side, 1) for side in sides)
        states, found = model.encode(padded, mask)
        assert torch.equal(found, mask.bool())
        torch.testing.assert_close(states[found], whole[0], atol=1e-5, rtol=1e-4)


def test_a_static_cache_answers_alike(model, family):
    if family[0] in NO_STATIC_CACHE:
        pytest.skip("nothing to get: this family has no static cache")
    context = projected(model)
    how = GREEDY | {"disable_compile": True}
    found = model.generate(ids(2, 7), context=context, cache_implementation="static", **how)
    assert torch.equal(found, model.generate(ids(2, 7), context=context, **how))


def test_only_the_blocks_train_and_checkpointing_changes_no_gradient(model, base):
    model = copy.deepcopy(model).train()
    tokens, mask = ids(2, 7), torch.ones(2, 5, dtype=torch.long)
    states = model.encode(ids(2, 5, seed=1), mask)[0]

    def gradients():
        model.zero_grad()
        model(
            tokens, labels=tokens, encoder_hidden_states=states, encoder_attention_mask=mask
        ).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected.keys() == {name for name, _ in model.named_parameters() if is_cross_attn(name)}
    assert all(g.abs().sum() > 0 for name, g in expected.items() if not name.endswith("k_attn.bias"))
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients()
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], msg=f"{name}, reentrant {reentrant}")


def test_what_is_saved_loads_by_the_auto_classes(model, base, tmp_path):
    context = projected(model)
    for folder, options in ((tmp_path / "whole", {}), (tmp_path / "blocks", {"cross_attn_only": True})):
        model.save_pretrained(folder, **options)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(model)
        assert torch.equal(
            loaded(ids(2, 7), context=context).logits, model(ids(2, 7), context=context).logits
        )
        assert not any(p.requires_grad for n, p in loaded.named_parameters() if not is_cross_attn(n))
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    assert type(config) is type(model.config)
    backbone = AutoModel.from_pretrained(tmp_path / "whole")
    found = backbone(ids(2, 7), context=context).last_hidden_state
    torch.testing.assert_close(found, model.base_model(ids(2, 7), context=context).last_hidden_state)
    assert (found - base.base_model(ids(2, 7)).last_hidden_state).abs().max() > 1e-3


def test_bfloat16_answers_and_trains(family):
    model = fused(family[1], dtype=torch.bfloat16)
    model.cross_attn_blocks.float()
    context = projected(model)
    assert model.generate(ids(2, 7), context=context, **GREEDY).shape == (2, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(ids(2, 7), labels=ids(2, 7), context=projected(model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_blocks_take_after_their_base(model, base):
    """The table of the configuration against the modules of the family itself."""
    norms = {
        type(m).__name__ for m in base.modules() if type(m).__name__.lower().endswith(("norm", "norm1p"))
    }
    assert (base_norm(base.config) == "rms_norm") == all("rms" in name.lower() for name in norms), norms
    layer = [name for name, _ in base.named_parameters() if ".0." in name or ".1." in name]
    gated = any(part in name for name in layer for part in ("gate_proj", "gate_up_proj", "feed_forward.w3"))
    assert isinstance(model.cross_attn_blocks[0].mlp, CrossAttnGatedMLP) == gated
    known = {getattr(m, n) for m in base.modules() for n in ("eps", "variance_epsilon") if hasattr(m, n)}
    assert norm_eps(base.config) in known or not known  # OLMo's norm keeps its own to itself


def test_signatures_keep_the_bases_parameters(model, base):
    import inspect

    ours = list(inspect.signature(model.forward).parameters)
    theirs = [name for name in inspect.signature(base.forward).parameters if name != "kwargs"]
    assert ours[: len(theirs)] == theirs
    assert {"context", "encoder_hidden_states", "context_input_ids"} <= set(ours)
    assert [name for name in ours if "label" in name] == [name for name in theirs if "label" in name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rwkv", "recurrent state"),
        ("t5", "decoder-only"),
        ("gemma3", "decoder-only"),
        ("clip", "decoder-only"),
    ],
)
def test_a_family_that_cannot_work_is_refused_in_one_line(tmp_path, name, message):
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        dssk.from_base(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_folder_says_what_it_needs(tmp_path):
    model = fused(tiny_base("llama", tmp_path / "base"))
    model.save_pretrained(tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["model_type"] == "dssk"
    assert config["base_model_type"] == "llama"
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_dssk.")
    assert "pip install dssk" in (tmp_path / "fused" / "modeling_dssk.py").read_text()


def test_classes_are_found_by_name():
    assert auto.CrossAttnLlamaForCausalLM is auto.family("llama").causal_lm
    with pytest.raises(AttributeError):
        _ = auto.CrossAttnNothing


def test_a_configuration_survives_json(tmp_path):
    config = auto.fused_config(tiny_config("qwen3"), num_cross_attn_layers=2, cross_attn_dropout_prob=0.5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    ignored = {"_name_or_path", "auto_map"}
    found, expected = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (loaded, config))
    assert found == expected
