"""The two readers behind one interface: what is promised of a fused model that reads by merging."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import dssk
from dssk.models.merged import MergedContext, read_context
from dssk.models.weights import is_cross_attn
from tests.families import VOCAB_SIZE, tiny_base

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
MERGED = (
    "llama qwen3 gemma2 mistral gpt_neox gpt2 gpt_bigcode phi3 starcoder2 olmo2 bloom deepseek_v3".split()
)


@pytest.fixture(scope="module", params=MERGED)
def family(request, tmp_path_factory):
    return request.param, tiny_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def base(family):
    return AutoModelForCausalLM.from_pretrained(family[1]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(family):
    return fused(family[1])


def fused(folder, **fields):
    torch.manual_seed(1)
    model = dssk.from_base(folder, reader="merged", **{"encode_layer": 2} | fields).eval()
    reader = model.cross_attn_blocks[0]
    with torch.no_grad():  # maps that carry something, in place of fitted ones
        reader.up.weight.normal_(std=0.3)
        reader.up.bias.normal_(std=0.1)
    return model


def ids(*shape, seed: int = 0):
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def projected(model, rows: int = 2) -> MergedContext:
    tokens, mask = ids(rows, 5, seed=1), torch.ones(rows, 5, dtype=torch.long)
    mask[-1, 3:] = 0
    return model.project_context(*model.encode(tokens, mask))


def test_without_a_context_it_is_the_base_bit_for_bit(model, base):
    assert torch.equal(model(ids(2, 7)).logits, base(ids(2, 7)).logits)
    assert torch.equal(model.generate(ids(2, 7), **GREEDY), base.generate(ids(2, 7), **GREEDY))


def test_a_context_acts_and_a_cache_changes_nothing(model, base):
    context = projected(model)
    assert (model(ids(4, 7), context=context).logits - base(ids(4, 7)).logits).abs().max() > 1e-3
    question = ids(2, 7)
    steps = question
    for _ in range(4):
        steps = torch.cat([steps, model(steps, context=context).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(question, context=context, **GREEDY), steps)
    again = model.generate(
        question, context=context, **GREEDY
    )  # what is made once serves any number of times
    assert torch.equal(again, steps)


def test_beams_and_returned_sequences_read_it(model):
    context = projected(model)
    together = model.generate(ids(2, 7), context=context, num_beams=3, num_return_sequences=2, **GREEDY)
    alone = [
        model.generate(
            ids(2, 7)[row : row + 1],
            context=single(context, row),
            num_beams=3,
            num_return_sequences=2,
            **GREEDY,
        )
        for row in range(2)
    ]
    assert torch.equal(together, torch.cat(alone))


def single(context: MergedContext, row: int) -> MergedContext:
    return MergedContext(
        tuple(k[row : row + 1] for k in context.keys),
        tuple(v[row : row + 1] for v in context.values),
        context.mask[row : row + 1],
        context.lengths[row : row + 1],
    )


def test_left_padded_questions_equal_single_ones(model):
    context = projected(model)
    question, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    question[1, :3], mask[1, :3] = 0, 0
    batch = model.generate(question, attention_mask=mask, context=context, **GREEDY)[1, 7:]
    alone = model.generate(question[1:, 3:], context=single(context, 1), **GREEDY)[0, 4:]
    assert torch.equal(batch, alone)


def test_what_comes_out_is_an_ordinary_cache_for_the_plain_base(model, base):
    from dssk.models.merged import arguments

    context = projected(model)
    expected = model(ids(2, 7), context=context).logits
    found = base(ids(2, 7), **arguments(base, context, None, 2, 7)).logits
    assert torch.equal(found, expected)


def test_only_the_maps_train_and_the_loss_is_the_familys_own(model, base):
    model = copy.deepcopy(model).train()
    states, mask = model.encode(ids(2, 5, seed=1))
    question = ids(2, 7)
    loss = model(question, labels=question, encoder_hidden_states=states, encoder_attention_mask=mask).loss
    loss.backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {name for name, _ in model.named_parameters() if is_cross_attn(name)}
    model.eval()
    context = model.project_context(states, mask)
    output = model(question, labels=question, context=context)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), question[:, 1:])
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize(
    "fields", [{}, {"encode_layer": [1, "last"]}, {"reader_rank": 8}, {"reader_replay": 1}], ids=str
)
def test_what_is_saved_loads(family, fields, tmp_path):
    model = fused(family[1], **fields)
    with torch.no_grad():
        model.cross_attn_blocks[0].shift.normal_()
    context = projected(model)
    expected = model(ids(2, 7), context=context).logits
    for folder, options in ((tmp_path / "whole", {}), (tmp_path / "maps", {"cross_attn_only": True})):
        model.save_pretrained(folder, **options)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert loaded.config.encode_layers == model.config.encode_layers
        assert torch.equal(loaded(ids(2, 7), context=projected(loaded)).logits, expected)


def test_layers_that_are_run_again_make_what_the_prompt_has(family):
    """Mapped is the layer below, so their keys and values alone are compared."""
    model = fused(family[1], encode_layer=1, reader_replay=2)
    context = projected(model, 1)
    whole = model(ids(1, 5, seed=1)[:, :3], use_cache=True).past_key_values
    for layer in (1, 2):
        torch.testing.assert_close(
            context.keys[layer][:, :, -3:], whole.layers[layer].keys, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            context.values[layer][:, :, -3:], whole.layers[layer].values, atol=1e-4, rtol=1e-4
        )


def test_contexts_that_lie_in_one_row_are_not_run_again(family):
    model = fused(family[1], encode_layer=1, reader_replay=1)
    reader = model.cross_attn_blocks[0]
    with pytest.raises(ValueError, match="want a row for each"):
        read_context(
            reader, model.base_model, torch.randn(1, 5, 64), positions=torch.tensor([[0, 1, 0, 1, 2]])
        )


def test_encoding_stops_at_its_layer(family):
    model = fused(family[1], encode_layer=1)
    called = []
    for layer in model.base_model.decoder_layers():
        layer.register_forward_hook(lambda *args: called.append(1))
    states, _ = model.encode(ids(1, 5))
    assert len(called) == 1
    assert states.shape == (1, 5, 64)


def test_blocks_read_middle_layers_too_and_one_reader_refuses_the_others_context(family):
    blocks = dssk.from_base(
        family[1], encode_layer=0.67, num_cross_attn_layers=2, cross_attn_init="normal"
    ).eval()
    assert blocks.config.encode_layers == (2,)
    context = blocks.project_context(*blocks.encode(ids(2, 5, seed=1)))
    assert blocks(ids(2, 7), context=context).logits.shape == (2, 7, VOCAB_SIZE)
    with pytest.raises(ValueError, match="want what project_context of this model returns"):
        fused(family[1])(ids(2, 7), context=context)
    with pytest.raises(ValueError, match="blocks read one layer's states"):
        dssk.from_base(family[1], encode_layer=[1, 2])
