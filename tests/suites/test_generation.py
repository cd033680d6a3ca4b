"""What transformers' own generation tests promise (they are in its repository alone), for fused classes.

Without a context every way to generate gives what the plain model gives, to the bit; with one it works, and gives
with a cache what it gives without.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from dssk.inference.auto import from_base
from tests.families import VOCAB_SIZE, tiny_base

FAMILIES = ["gpt_bigcode", "llama", "qwen3", "gemma2"]
COMMON = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
MODES = {
    "greedy": {"do_sample": False},
    "everything returned": {
        "do_sample": False, "output_scores": True, "output_logits": True, "output_hidden_states": True,
    },
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "output_scores": True},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
}  # fmt: skip
ONE_ROW = {"prompt lookup"}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A plain model, and a fused one whose blocks act."""
    folder = tiny_base(request.param, tmp_path_factory.mktemp(request.param))
    torch.manual_seed(1)
    layout = {"num_cross_attn_layers": 2, "cross_attn_final_layer": True, "cross_attn_init": "normal"}
    # Frozen as the fused one's base is: PyTorch multiplies matrices in another order for one that wants gradients.
    plain = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    return plain, from_base(folder, **layout).eval()


@pytest.fixture
def prompt():
    """Left-padded questions (2, 7) and their mask."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def context_of(model, rows=2):
    states = torch.randn(rows, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    return model.project_context(states)


def generate(model, prompt, mode, **more):
    rows = slice(1, 2) if mode in ONE_ROW else slice(None)  # those take one row, without padding
    set_seed(4)
    return model.generate(
        **{name: tensor[rows] for name, tensor in prompt.items()}, **COMMON, **MODES[mode], **more
    )


def tensors(value):
    """All tensors of an output, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_context_it_generates_as_the_plain_model(pair, prompt, mode):
    plain, fused = pair
    want, got = generate(plain, prompt, mode), generate(fused, prompt, mode)
    assert type(got) is type(want)
    assert got.keys() == want.keys()
    for name in want.keys() - {"past_key_values"}:
        for a, b in zip(tensors(want[name]), tensors(got[name]), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("mode", MODES)
def test_with_a_context_a_cache_changes_nothing(pair, prompt, mode):
    fused = pair[1]
    context = context_of(fused, 1 if mode in ONE_ROW else 2)
    cached = generate(fused, prompt, mode, context=context)
    if mode not in ("static cache", "prompt lookup"):  # those are a cache
        uncached = generate(fused, prompt, mode, context=context, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
    if mode == "greedy":
        assert not torch.equal(cached.sequences, generate(fused, prompt, mode).sequences)


def test_generation_goes_on_from_a_cache(pair, prompt):
    fused = pair[1]
    how = {**COMMON, "do_sample": False, "context": context_of(fused)}
    whole = fused.generate(**prompt, **how).sequences
    first = fused.generate(**prompt, **{**how, "max_new_tokens": 3})
    grown = torch.cat([prompt["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    second = fused.generate(
        first.sequences,
        attention_mask=grown,
        past_key_values=first.past_key_values,
        **{**how, "max_new_tokens": 3},
    )
    assert torch.equal(second.sequences, whole)


def test_embedded_prompts_generate_as_tokens_do(pair, prompt):
    fused = pair[1]
    how = {**COMMON, "do_sample": False, "context": context_of(fused)}
    embedded = fused.get_input_embeddings()(prompt["input_ids"])
    found = fused.generate(inputs_embeds=embedded, attention_mask=prompt["attention_mask"], **how).sequences
    assert torch.equal(found, fused.generate(**prompt, **how).sequences[:, 7:])


def test_processors_and_criteria_are_asked_and_a_stream_is_fed(pair, prompt):
    fused = pair[1]
    asked = []

    class Only7(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, 7] = 0.0
            return scores

    class After3(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            asked.append(input_ids.shape[1])
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    class Kept(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Kept()
    row = {name: tensor[1:] for name, tensor in prompt.items()}
    how = {**COMMON, "do_sample": False, "context": context_of(fused, 1), "streamer": streamer}
    found = fused.generate(**row, logits_processor=[Only7()], stopping_criteria=[After3()], **how).sequences
    assert found[0, 7:].tolist() == [7, 7, 7]
    assert asked == [8, 9, 10]
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended
