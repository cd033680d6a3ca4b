"""Packed contexts: the same as each row's contexts one behind the other, for both readers."""

import pytest
import torch

import dssk
from dssk.models.packing import Packing, groups_of
from tests.conftest import VOCAB_SIZE, fused
from tests.families import tiny_base

LENGTHS = [5, 1, 7]
GROUPS = [[2], [0, 1, 2], [1, 0]]


def test_every_row_names_the_tokens_of_its_contexts_at_its_right_end():
    packing = Packing(torch.tensor(LENGTHS), groups_of(GROUPS))
    tokens, visible = packing.tokens_of_rows()
    of = [list(range(0, 5)), [5], list(range(6, 13))]
    assert visible.sum(1).tolist() == [7, 13, 6]
    for row, group in enumerate(GROUPS):
        expected = [token for context in group for token in of[context]]
        assert tokens[row, -len(expected) :].tolist() == expected
        assert visible[row, -len(expected) :].all()
    assert packing.positions().tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5, 6]
    alone, visible = Packing(torch.tensor(LENGTHS)).tokens_of_rows()
    assert alone[visible].tolist() == list(range(13))


@pytest.fixture(scope="module", params=["cross_attention", "merged", "replay"])
def model(request, base_path, tmp_path_factory):
    if request.param == "cross_attention":
        return fused(base_path)
    folder = tiny_base("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCAB_SIZE)
    torch.manual_seed(1)
    replay = 1 if request.param == "replay" else 0
    model = dssk.from_base(folder, reader="merged", encode_layer=2, reader_replay=replay).eval()
    with torch.no_grad():
        model.cross_attn_blocks[0].up.weight.normal_(std=0.3)
    return model


@pytest.fixture
def packed(model):
    states = torch.randn(
        1, sum(LENGTHS), model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    return {"encoder_hidden_states": states, "context_lengths": torch.tensor(LENGTHS)}


@torch.no_grad()
def test_packed_contexts_are_read_as_each_row_alone_would_read_its_own(model, packed, tokens):
    ids = tokens(3, 6)
    together = model(ids, **packed, context_groups=groups_of(GROUPS)).logits
    parts = packed["encoder_hidden_states"][0].split(LENGTHS)
    for row, group in enumerate(GROUPS):
        alone = {
            "encoder_hidden_states": torch.cat([parts[i] for i in reversed(group)])[None],
            "context_lengths": torch.tensor([LENGTHS[i] for i in reversed(group)]),
            "context_groups": groups_of([list(range(len(group)))]),
        }
        logits = model(ids[row : row + 1], **alone).logits  # the order of contexts is none
        torch.testing.assert_close(together[row : row + 1], logits, atol=1e-4, rtol=1e-4)
    one = model(ids[:1], encoder_hidden_states=parts[2][None]).logits
    torch.testing.assert_close(together[:1], one, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_text_goes_on_behind_the_longest_of_its_contexts(model, packed):
    context = model.project_context(**packed, context_groups=groups_of(GROUPS))
    if model.config.reader == "merged":
        assert context.lengths.tolist() == [7, 7, 5]
    else:  # whose contexts have no place in the text
        assert not hasattr(context, "lengths")


@torch.no_grad()
def test_a_context_that_a_row_does_not_name_does_not_reach_it(model, packed, tokens):
    ids, groups = tokens(2, 6), groups_of([[0, 1], [2]])
    before = model(ids, **packed, context_groups=groups).logits
    packed["encoder_hidden_states"] = packed["encoder_hidden_states"].clone()
    packed["encoder_hidden_states"][0, -1] += 3.0
    after = model(ids, **packed, context_groups=groups).logits
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_tokens_of_packed_contexts_are_encoded_online(base_path, tokens):
    model, ids, contexts = fused(base_path), tokens(2, 6), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    groups = groups_of([[0, 1], [1]])
    online = model(ids, context_input_ids=contexts, context_attention_mask=mask, context_groups=groups).logits
    states, _ = model.encode(contexts, mask)
    lengths = torch.tensor([9, 4])
    stored = model(
        ids, encoder_hidden_states=states[mask][None], context_lengths=lengths, context_groups=groups
    ).logits
    torch.testing.assert_close(online, stored)


def test_packed_contexts_train_with_some_tokens_hidden(base_path, tokens):
    model = fused(base_path, cross_attn_dropout_prob=0.5).train()
    ids = tokens(2, 6)
    states = torch.randn(1, 12, 32)
    given = {"context_lengths": torch.tensor([5, 7]), "context_groups": groups_of([[0, 1], [1]])}
    torch.manual_seed(0)
    context = model.project_context(states, **given)
    assert 0 < context.mask.sum() < 12 + 7
    assert context.mask.any(-1).all()
    model(ids, encoder_hidden_states=states, labels=ids, **given).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lengths_and_groups_that_do_not_fit_are_refused(base_path):
    model = fused(base_path)
    with pytest.raises(ValueError, match=r"want \(1, 9, hidden size\) as context_lengths say"):
        model.project_context(torch.randn(1, 8, 32), context_lengths=torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="context_groups are"):
        Packing(torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(ValueError, match="context_lengths are"):
        Packing(torch.tensor([[2]]))
