"""Training-time augmentations: pure functions of tokens and a random generator."""

from collections.abc import Sequence

import numpy as np

FIM_PROB = 0.5  # share of context rows that get the fill-in-the-middle transform
REPETITION_TASKS = ("question", "answer", "both", "context")


def fill_in_the_middle(
    tokens: Sequence[int], rng: np.random.Generator, markers: tuple[int, int, int]
) -> list[int]:
    """Cut `tokens` at two places and move the middle to the end, as StarCoder was trained (suffix-prefix-middle).

    `markers` are the ids of `<fim_prefix>`, `<fim_middle>`, `<fim_suffix>`. No token is lost, three are added.
    Source of the idea: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022.
    """
    prefix_id, middle_id, suffix_id = markers
    start, end = sorted(rng.integers(0, len(tokens) + 1, size=2).tolist())
    prefix, middle, suffix = tokens[:start], tokens[start:end], tokens[end:]
    return [suffix_id, *suffix, prefix_id, *prefix, middle_id, *middle]
