"""Which rows make which optimizer step: decided by (seed, epoch) alone, whatever the number of ranks and workers."""

from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from dssk.data.dataset import CrossAttnDataset

POOL_BATCHES = 50  # global batches whose rows are sorted by length together


class EpochSampler(torch.utils.data.Sampler[int]):
    """Row numbers of one epoch, in whole global batches (rows of one optimizer step, over all ranks).

    Every epoch drops another remainder of less than one global batch. So each way to divide a global batch into
    ranks and accumulated micro-batches trains on the same rows in the same step. With `lengths`, the rows of a
    global batch are about equally long, and lie from long to short: less padding.
    """

    def __init__(self, num_rows: int, global_batch: int, seed: int, lengths: np.ndarray | None = None):
        self.num_rows = num_rows
        self.global_batch = global_batch
        self.seed = seed
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_rows // self.global_batch)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.global_batch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch).ravel().tolist())

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers, (steps_per_epoch, global_batch)."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = np.resize(rng.permutation(self.num_rows), len(self))  # repeats rows only if they fill no batch
        if self.lengths is not None:
            pool = self.global_batch * POOL_BATCHES
            pools = [rows[start : start + pool] for start in range(0, len(rows), pool)]
            rows = np.concatenate([p[np.argsort(-self.lengths[p], kind="stable")] for p in pools])
        batches = rows.reshape(-1, self.global_batch)
        return batches if self.lengths is None else rng.permutation(batches)

    def rows_of_step(self, step: int) -> list[int]:
        """The rows that optimizer step number `step` (the first is 1) trains on, over all ranks."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        return self.order(epoch)[index].tolist()


def text_lengths(dataset: CrossAttnDataset) -> np.ndarray:
    """About how long each example is: characters of its context, twice where the decoder reads it too."""
    rows: datasets.Dataset = dataset.rows
    contexts = rows.with_format("arrow").select_columns(["context"])[:]["context"]
    characters = pc.utf8_length(contexts).to_numpy()
    return np.concatenate([characters, 2 * characters]) if dataset.with_contexts else characters
