"""The merged reader on tiny models of many families."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dssk.models.layers import encode_states, find_layers
from dssk.models.merged import MergedReader, arguments, find_projections, read_context
from dssk.models.packing import Packing, groups_of
from tests.families import tiny_config

FAMILIES: dict[str, dict] = {
    **dict.fromkeys(
        "llama qwen2 qwen3 phi phi3 olmo2 smollm3 granite glm4 gpt_neox gpt2 gpt_bigcode gptj opt falcon bloom "
        "stablelm nemotron".split(),
        {},
    ),
    **dict.fromkeys("mistral gemma2 gemma3_text starcoder2 cohere2".split(), {"sliding_window": 4}),
    "deepseek_v3": {"first_k_dense_replace": 3},  # its experts follow from rounding
}
LENGTHS = [7, 4]  # tokens of two contexts
S, T = 7, 5


def make_model(family: str, **more):
    torch.manual_seed(0)
    config = tiny_config(family, **{"initializer_range": 0.2, **FAMILIES.get(family, {}), **more})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def model(request):
    return make_model(request.param)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: list[int], left: bool = False) -> torch.Tensor:
    where = torch.arange(max(lengths))[None]
    counts = torch.tensor(lengths)[:, None]
    return where >= max(lengths) - counts if left else where < counts


def exact_reader(model, replayed: range = range(0)) -> MergedReader:
    """A reader of true projection outputs: what is stored for a token is what the maps are to give."""
    reader = MergedReader(model.base_model, replayed=replayed)
    reader.find_rows(model.base_model)
    outputs = sum(width for width, _ in reader.widths)
    reader.maps = lambda states: states[..., :outputs]  # type: ignore[method-assign]
    return reader


def true_outputs(model, reader: MergedReader, context: torch.Tensor) -> torch.Tensor:
    """What every projection gives in an ordinary run over one context (S,), only the rows that are mapped."""
    layers = find_layers(model.base_model, model.config.num_hidden_layers)[1]
    modules = [module for layer in reader.mapped_layers for _, module in find_projections(layers[layer])]
    outputs: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda *call: outputs.append(call[2])) for module in modules]
    model(context[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    first, parts = 0, []
    for output, (width, _) in zip(outputs, reader.widths, strict=True):
        parts.append(output[..., reader.rows[first : first + width]])
        first += width
    return torch.cat(parts, -1)[0]


def stored(model, reader, contexts: torch.Tensor, lengths: list[int], left: bool = False) -> torch.Tensor:
    states = torch.zeros(len(lengths), max(lengths), sum(width for width, _ in reader.widths))
    for row, context, length in zip(states, contexts, lengths, strict=True):
        where = slice(max(lengths) - length, None) if left else slice(length)
        row[where] = true_outputs(model, reader, context[:length])
    return states


def prompted_logits(model, context: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return model(torch.cat([context, text])[None]).logits[0, len(context) :]


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_exact_keys_and_values_are_the_prompt(model, left):
    reader = exact_reader(model)
    contexts, text = ids(2, S), ids(2, T, seed=1)
    states = stored(model, reader, contexts, LENGTHS, left)
    context = read_context(reader, model.base_model, states, mask_of(LENGTHS, left))
    logits = model(text, **arguments(model, context, None, len(text), T)).logits
    for row, length in enumerate(LENGTHS):
        want = prompted_logits(model, contexts[row, :length], text[row])
        torch.testing.assert_close(logits[row], want, atol=2e-4, rtol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("replayed", [range(1, 3), range(1, 2), range(2, 3)])
def test_replayed_layers_are_the_prompts(model, left, replayed):
    reader = exact_reader(model, replayed)
    contexts, text = ids(2, S), ids(2, T, seed=1)
    outputs = stored(model, reader, contexts, LENGTHS, left)
    mask = mask_of(LENGTHS, left)
    states, _ = encode_states(model.base_model, contexts, None, [replayed.start])
    given = torch.zeros_like(states)
    for row, length in enumerate(LENGTHS):
        given[row, mask[row]] = states[row, :length]
    context = read_context(reader, model.base_model, torch.cat([outputs, given], -1), mask)
    logits = model(text, **arguments(model, context, None, len(text), T)).logits
    for row, length in enumerate(LENGTHS):
        want = prompted_logits(model, contexts[row, :length], text[row])
        torch.testing.assert_close(logits[row], want, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_readers_of_one_base_may_replay_different_layers():
    model = make_model("llama")
    contexts, text = ids(1, S), ids(1, T, seed=1)
    reader = exact_reader(model)
    states = stored(model, reader, contexts, [S])
    exact_reader(model, range(1, 3))
    logits = model(
        text, **arguments(model, read_context(reader, model.base_model, states), None, 1, T)
    ).logits
    torch.testing.assert_close(logits[0], prompted_logits(model, contexts[0], text[0]), atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_left_padded_texts_continue_where_their_context_ends():
    for family in ("llama", "gpt2", "gpt_neox", "bloom", "opt", "gemma3_text"):
        model = make_model(family, sliding_window=64)
        reader = exact_reader(model)
        contexts, text = ids(2, S), ids(2, T, seed=1)
        context = read_context(
            reader, model.base_model, stored(model, reader, contexts, LENGTHS), mask_of(LENGTHS)
        )
        kept = [T, 3]
        padded = mask_of(kept, left=True)
        logits = model(text, **arguments(model, context, padded, 2, T)).logits
        for row, (length, tokens) in enumerate(zip(LENGTHS, kept, strict=True)):
            want = prompted_logits(model, contexts[row, :length], text[row, T - tokens :])
            torch.testing.assert_close(logits[row, T - tokens :], want, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_generation_from_a_cache_is_generation_from_the_prompt(model):
    reader = exact_reader(model)
    contexts, text = ids(2, S), ids(4, T, seed=1)
    context = read_context(reader, model.base_model, stored(model, reader, contexts, [S, S]), None)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = torch.cat([contexts.repeat_interleave(2, 0), text], 1)
    for beams in (1, 2):
        want = model.generate(whole, attention_mask=torch.ones_like(whole), num_beams=beams, **settings)
        given = arguments(model, context, None, 4, T) | {
            "past_key_values": context.cache(model.config, 4 * beams)
        }
        got = model.generate(text, num_beams=beams, **given, **settings)
        assert torch.equal(got[:, T:], want[:, S + T :])


@torch.no_grad()
def test_without_a_context_the_model_is_its_base_bit_for_bit(model):
    text = ids(2, T)
    before = model(text).logits
    MergedReader(model.base_model)
    assert torch.equal(model(text).logits, before)


def test_gradients_reach_the_maps_alone(model):
    reader = MergedReader(model.base_model)
    reader.find_rows(model.base_model)
    model.activation_checkpointing_enable()  # must not take the cache of a capture away
    model.train()
    context = read_context(reader, model.base_model, torch.randn(2, S, 64), mask_of(LENGTHS))
    model.eval()
    model(ids(2, T), **arguments(model, context, None, 2, T)).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reader.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert reader.up.weight.grad.abs().amax(1).gt(0).float().mean() > 0.9  # type: ignore[union-attr]


@torch.no_grad()
def test_hidden_tokens_are_not_read_and_keep_their_positions():
    model = make_model("llama")
    reader = MergedReader(model.base_model)
    states, text = torch.randn(1, S, 64), ids(1, T)
    hidden = torch.zeros(1, S, dtype=torch.bool)
    hidden[0, 2] = True
    other = states.clone()
    other[0, 2] = 5.0
    logits = [
        model(text, **arguments(model, read_context(reader, model.base_model, s, None, h), None, 1, T)).logits
        for s, h in ((states, hidden), (other, hidden), (states, None))
    ]
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


@torch.no_grad()
def test_contexts_that_are_read_together_keep_their_own_positions():
    model = make_model("llama")
    reader = MergedReader(model.base_model)
    lengths, text = [7, 4, 6], ids(2, T)
    states = torch.randn(1, 17, 64)

    def read(order: list[int]) -> torch.Tensor:
        packing = Packing(torch.tensor(lengths), groups_of([order, [2]]))
        whole = read_context(reader, model.base_model, states, positions=packing.positions()[None])
        joint = whole.gathered(*packing.tokens_of_rows(), packing.row_lengths().amax(1))
        assert joint.lengths.tolist() == [7, 6]
        return model(text, **arguments(model, joint, None, 2, T)).logits

    logits = read([0, 1])
    alone = read_context(reader, model.base_model, states[:, 11:])
    torch.testing.assert_close(logits[1:], model(text[1:], **arguments(model, alone, None, 1, T)).logits)
    # The order of the two makes no difference: each has its own positions.
    torch.testing.assert_close(logits, read([1, 0]), atol=1e-4, rtol=1e-4)


def test_weights_survive_saving_and_a_low_rank_is_smaller(model):
    reader = MergedReader(model.base_model, num_states=2, rank=5)
    reader.find_rows(model.base_model)
    other = MergedReader(model.base_model, num_states=2, rank=5)
    other.load_state_dict(reader.state_dict())
    states = torch.randn(2, S, 128)
    with torch.no_grad():
        one, two = (read_context(r, model.base_model, states, mask_of(LENGTHS)) for r in (reader, other))
    assert all(torch.equal(a, b) for a, b in zip(one.keys + one.values, two.keys + two.values, strict=True))
    assert sum(p.numel() for p in reader.parameters()) < sum(
        p.numel() for p in MergedReader(model.base_model).parameters()
    )


def test_a_family_without_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="layer 0 of a mamba model has no attention"):
        MergedReader(make_model("mamba").base_model)


def test_rows_that_do_not_fit_the_contexts_are_refused():
    model = make_model("llama")
    context = read_context(MergedReader(model.base_model), model.base_model, torch.randn(2, S, 64))
    with pytest.raises(ValueError, match="3 decoder rows cannot share 2 contexts"):
        context.cache(model.config, 3)


def test_encoding_stops_at_its_layer_and_knows_both_sides_of_padding(model):
    count, contexts = model.config.num_hidden_layers, ids(2, S)
    states = model(contexts[1:, :4], output_hidden_states=True, use_cache=False).hidden_states
    layers = find_layers(model.base_model, count)[1]
    calls: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    for left in (False, True):
        mask, row = mask_of(LENGTHS, left), torch.zeros_like(contexts)
        row[mask] = torch.cat([contexts[0], contexts[1, :4]])
        for layer in (1, 2, count):
            calls.clear()
            got, visible = encode_states(model.base_model, row, mask, [layer])
            assert max(calls) == layer - 1
            torch.testing.assert_close(got[1][visible[1]], states[layer][0], atol=2e-4, rtol=2e-4)
    both, _ = encode_states(model.base_model, contexts, None, [1, count])
    one, _ = encode_states(model.base_model, contexts, None, [1])
    last, _ = encode_states(model.base_model, contexts)
    torch.testing.assert_close(both, torch.cat([one, last], -1))
