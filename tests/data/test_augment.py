import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dssk.data.augment import fill_in_the_middle

PREFIX, MIDDLE, SUFFIX = 1, 2, 3


@given(tokens=st.lists(st.integers(5, 99), max_size=30), seed=st.integers(0, 2**31))
def test_fill_in_the_middle_adds_three_markers_and_loses_nothing(tokens, seed):
    moved = fill_in_the_middle(tokens, np.random.default_rng(seed), (PREFIX, MIDDLE, SUFFIX))
    first, prefix_at, middle_at = (moved.index(marker) for marker in (SUFFIX, PREFIX, MIDDLE))
    assert first == 0 < prefix_at < middle_at
    suffix, prefix, middle = moved[1:prefix_at], moved[prefix_at + 1 : middle_at], moved[middle_at + 1 :]
    assert prefix + middle + suffix == tokens


def test_the_cut_varies():
    rng = np.random.default_rng(0)
    assert len({tuple(fill_in_the_middle(range(5, 25), rng, (1, 2, 3))) for _ in range(20)}) > 10
