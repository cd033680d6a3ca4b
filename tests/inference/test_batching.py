import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dssk.inference.batching import length_batches, length_mask, pad_states, pad_tokens

lengths = st.lists(st.integers(1, 50), max_size=30)


@given(lengths, st.integers(1, 7), st.one_of(st.none(), st.integers(1, 100)))
def test_every_row_is_in_one_batch_and_no_batch_is_too_large(lengths, batch_size, batch_tokens):
    batches = length_batches(lengths, batch_size, batch_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert [lengths[row] for batch in batches for row in batch] == sorted(lengths, reverse=True)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        padded = len(batch) * max(lengths[row] for row in batch)
        assert batch_tokens is None or padded <= batch_tokens or len(batch) == 1


def test_rows_of_equal_length_keep_their_order():
    assert length_batches([3, 5, 3, 5], 3) == [[1, 3, 0], [2]]


@pytest.mark.parametrize("left", [False, True])
def test_padding_stands_where_the_mask_is_false(left):
    rows = [[7], [8, 9, 10], []]
    padded, mask = pad_tokens(rows, 4, left), length_mask(list(map(len, rows)), left)
    assert [padded[i][mask[i]].tolist() for i in range(3)] == rows
    assert (padded[~mask] == 4).all()


def test_states_are_padded_with_zeros_in_their_own_type():
    states = [torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16)]
    padded, mask = pad_states(states)
    assert padded.dtype == torch.bfloat16
    assert padded.sum(-1).tolist() == [[2, 0, 0], [2, 2, 2]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]
