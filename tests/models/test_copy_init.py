import math

import pytest
import torch

from dssk.models.copy_init import copy_init_, rarity, words_before
from dssk.research.make_base import structured_init_
from tests.conftest import SPECIAL_TOKENS, VOCAB_SIZE, fused, make_base

LAYOUT = {
    "num_cross_attn_layers": 2,
    "cross_attn_layers_stride": 1,
    "cross_attn_shared_weights": False,
    "cross_attn_final_layer": True,
    "cross_attn_init": "copy",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose states tell the tokens before each."""
    from transformers import GPTBigCodeForCausalLM

    folder = make_base(tmp_path_factory.mktemp("base"), n_embd=128, n_layer=2, initializer_range=0.02)
    model = GPTBigCodeForCausalLM.from_pretrained(folder)
    structured_init_(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return folder


def contexts(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (count, 40), generator=generator)


def repeating_loss(model, ids, given):
    """The loss of repeating `ids` after their first tokens, with the context `given`."""
    labels = ids.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        return model(ids, labels=labels, context_input_ids=given).loss.item()


def test_the_block_copies_from_contexts_it_has_not_seen_before_any_training(base):
    model = fused(base, **LAYOUT)
    ids = contexts(8, seed=1)
    before = repeating_loss(model, ids, ids)
    copy_init_(model, contexts(300, seed=0).tolist())
    right, wrong = repeating_loss(model, ids, ids), repeating_loss(model, ids, ids.roll(1, 0))
    assert right < before - 0.5
    assert right < wrong - 0.5


def test_only_the_attention_of_the_last_block_is_set(base):
    model = fused(base, **LAYOUT)
    before = {name: p.clone() for name, p in model.named_parameters()}
    copy_init_(model, contexts(50, seed=0).tolist())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    attention = "transformer.cross_attn.0.attn"
    assert changed >= {f"{attention}.{part}.weight" for part in ("q_attn", "k_attn", "v_attn", "c_proj")}
    assert all(name.startswith(attention) for name in changed)


def test_the_same_seed_gives_the_same_start(base):
    weights = []
    for seed in (0, 0, 1):
        model = fused(base, **LAYOUT)
        copy_init_(model, contexts(50, seed=0).tolist(), seed)
        weights.append(model.transformer.cross_attn[0].attn.q_attn.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_words_before_are_counted_once_and_rare_ones_more():
    codes = torch.eye(5)
    assert words_before(torch.tensor([3, 1, 3, 0]), codes).tolist() == [
        [0, 0, 0, 1, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 0, 1, 0],
        [1, 1, 0, 1, 0],
    ]
    weights = rarity([torch.tensor([0, 1, 1]), torch.tensor([0, 2])], 4).flatten()
    assert weights.tolist() == pytest.approx([0, math.log(2), math.log(2), math.log(2)])


def test_overlap_prefers_of_two_such_places_the_one_with_more_of_the_words_before(base):
    """Both contexts go on after the same two words; one of them had the decoder's earlier words, too."""
    gained = {}
    own, other = contexts(16, seed=1), contexts(16, seed=2)
    other[:, 9:11] = own[:, 9:11]  # the next word is another
    ids = own[:, :12]
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    for init in ("copy", "overlap"):
        model = fused(base, **LAYOUT | {"cross_attn_init": init})
        copy_init_(model, contexts(300, seed=0).tolist())
        both = torch.cat([other, own], dim=1)
        with torch.no_grad():
            alone = model(ids, labels=labels, context_input_ids=own).loss.item()
            gained[init] = alone - model(ids, labels=labels, context_input_ids=both).loss.item()
    assert gained["overlap"] > gained["copy"] + 0.05


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cross_attn_shared_weights", True),
        ("cross_attn_final_layer", False),
        ("cross_attn_hidden_size", 64),
        ("cross_attn_shared_projections", True),
        ("cross_attn_num_key_value_heads", 1),
    ],
)
def test_a_layout_that_the_closed_form_does_not_fit_is_refused_by_its_key(base, key, value):
    with pytest.raises(ValueError, match=f"does not fit {key}:"):
        copy_init_(fused(base, **LAYOUT | {key: value}), [])
