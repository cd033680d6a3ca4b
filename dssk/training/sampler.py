"""Which rows make which optimizer step: decided by (seed, epoch) alone, whatever the number of ranks and workers."""

from collections.abc import Callable, Iterator

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from dssk.data.dataset import CrossAttnDataset

POOL_BATCHES = 50  # global batches whose rows are sorted by length together


class EpochSampler(torch.utils.data.Sampler[int]):
    """Row numbers of one epoch, in whole global batches (rows of one optimizer step, over all ranks).

    Every epoch drops another remainder of less than one global batch. So each way to divide a global batch into
    ranks and accumulated micro-batches trains on the same rows in the same step. With `lengths` (of the rows in an
    epoch), the rows of a global batch are about equally long, and lie from long to short: less padding.

    With `contexts` (the number of each row's context), rows are kept in groups of `together` that share a context.
    Rows that fill no group are left out of an epoch; rows of contexts with fewer form global batches of their own.
    """

    def __init__(
        self,
        num_rows: int,
        global_batch: int,
        seed: int,
        lengths: Callable[[int], np.ndarray] | None = None,
        contexts: np.ndarray | None = None,
        together: int = 1,
    ):
        self.num_rows = num_rows
        self.global_batch = global_batch
        self.seed = seed
        self.lengths = lengths
        self.contexts = contexts if together > 1 else None
        self.together = together
        self.epoch = 0
        units = self._units(np.random.default_rng(0))
        steps = [unit.size // global_batch for unit in units]
        # Of each kind of units; at least one step in all.
        self._steps = steps if any(steps) else [int(unit is units[0]) for unit in units]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        return sum(self._steps)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.global_batch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).ravel().tolist())

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers, (steps_per_epoch, global_batch)."""
        rng = np.random.default_rng([self.seed, epoch])
        kinds = zip(self._units(rng), self._steps, strict=True)
        lengths = None if self.lengths is None else self.lengths(epoch)
        batches = np.concatenate([self._batches(units, steps, lengths) for units, steps in kinds if steps])
        ordered = self.lengths is None and self.contexts is None
        return batches if ordered else rng.permutation(batches)

    def _units(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Groups of rows that stay together, in random order: an array (groups, rows) for each group size."""
        rows = rng.permutation(self.num_rows)
        if self.contexts is None:
            return [rows[:, None]]
        rows = rows[np.argsort(self.contexts[rows], kind="stable")]
        counts = np.bincount(self.contexts)
        place = np.arange(len(rows)) - (counts.cumsum() - counts)[self.contexts[rows]]
        own = counts[self.contexts[rows]]  # rows of each row's context
        groups = rows[place < own // self.together * self.together].reshape(-1, self.together)
        alone = rows[own < self.together][:, None]
        return [kind for kind in (rng.permutation(groups), rng.permutation(alone)) if kind.size]

    def _batches(self, units: np.ndarray, steps: int, lengths: np.ndarray | None) -> np.ndarray:
        """Units as whole global batches (steps, global_batch): repeated only if they fill none."""
        width = units.shape[1]
        units = np.resize(units, (steps * self.global_batch // width, width))
        if lengths is not None:
            pool = self.global_batch // width * POOL_BATCHES
            pools = [units[start : start + pool] for start in range(0, len(units), pool)]
            units = np.concatenate([p[np.argsort(-lengths[p[:, 0]], kind="stable")] for p in pools])
        return units.reshape(-1, self.global_batch)

    def rows_of_step(self, step: int) -> list[int]:
        """The rows that optimizer step number `step` (the first is 1) trains on, over all ranks."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return self.order(epoch)[index].tolist()


def text_lengths(dataset: CrossAttnDataset) -> Callable[[int], np.ndarray]:
    """About how long each example of an epoch is: characters of its contexts, its own twice where it is read too."""
    rows: datasets.Dataset = dataset.rows
    contexts = rows.with_format("arrow").select_columns(["context"])[:]["context"]
    characters = pc.utf8_length(contexts).to_numpy()

    def lengths(epoch: int) -> np.ndarray:
        others = (dataset.contexts_of_epoch(epoch) - 1) * characters.mean()
        of_kind = {
            "contexts": 2 * characters,
            "questions": characters + others if others.any() else characters,
        }
        return np.concatenate([of_kind.get(kind, characters) for kind in dataset.kinds])

    return lengths


def shared_contexts(dataset: CrossAttnDataset) -> np.ndarray:
    """The number of each row's context; a row that is not a question has one of its own."""
    contexts = dataset.rows.with_format("arrow").select_columns(["context"])[:]["context"]
    numbers = contexts.combine_chunks().dictionary_encode().indices.to_numpy()
    if dataset.kinds[0] == "questions":
        return np.concatenate([numbers, len(numbers) + np.arange(len(dataset) - len(numbers))])
    return np.arange(len(dataset))
