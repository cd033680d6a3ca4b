"""Encoding contexts with the frozen model, shard by shard, on one device or several.

A shard's bytes depend on its rows and the settings only: batches are formed inside a shard, and on a CPU every
worker computes on one thread, because the order of additions, and with it the last bit, depends on both.
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dssk.data import plan as planning
from dssk.data.plan import Plan, PlannedShard
from dssk.errors import EnvironmentFault
from dssk.inference.batching import length_batches
from dssk.inference.encoding import Batch, Encoder, one_thread
from dssk.inference.loading import device, load_base
from dssk.inference.rounding import StorageDtype, encoding_bytes
from dssk.models.layers import named_layers
from dssk.store.manifest import CONTEXTS, FileInfo, ShardInfo, load_shard_info, shard_name
from dssk.store.opening import find_fault
from dssk.store.segments import Origin, context_features, encoded_record
from dssk.utils import files
from dssk.utils.console import quiet_libraries
from dssk.utils.ranks import Ranks

_PROGRESS_SECONDS = 0.2
_SHARD = re.compile(r"data-\d{5,}-of-\d{5,}\.(arrow|json)")


@dataclass(frozen=True)
class Job:
    """A worker's task, which is sent to it as a pickle."""

    folder: Path
    plan: Plan
    model_path: str
    revision: str | None
    model_dtype: torch.dtype
    batch_size: int
    """Most contexts in a batch."""
    batch_tokens: int
    """Most tokens in a batch, padding included; one longer context is a batch of its own."""

    @property
    def storage_dtype(self) -> StorageDtype:
        return cast(StorageDtype, self.plan.settings.storage_dtype)

    def path(self, index: int, suffix: str) -> Path:
        """File of shard `index`; `suffix` is `.arrow` or `.json`."""
        return self.folder / CONTEXTS / (shard_name(index, len(self.plan.shards)) + suffix)

    def shard_bytes(self, shard: PlannedShard) -> int:
        """About the size of a shard's Arrow file, texts left out."""
        return encoding_bytes(self.storage_dtype, self.plan.settings.hidden_size) * shard.tokens

    def shard_names(self) -> list[str]:
        """The Arrow files of `contexts/`, in order; none for a store of texts only."""
        if self.plan.settings.storage_dtype is None:
            return []
        return [self.path(index, ".arrow").name for index in range(len(self.plan.shards))]

    def open_folder(self) -> None:
        """Make `contexts/` ready: no shard of another plan in it, room for what is missing."""
        folder = self.folder / CONTEXTS
        names = self.shard_names()
        if not names:
            return
        files.make_folder(folder)
        for path in folder.iterdir():
            if _SHARD.fullmatch(path.name) and path.with_suffix(".arrow").name not in names:
                files.remove(path)
        num_bytes = sum(self.shard_bytes(self.plan.shards[index]) for index in self.missing())
        counts = self.plan.counts
        files.require_free(folder, num_bytes, f"encoding {counts.contexts} contexts")
        print(
            f"Encoding {counts.contexts} contexts, {counts.tokens} tokens: {files.size(num_bytes)} to write."
        )

    def missing(self) -> list[int]:
        """The shards that are still to be encoded."""
        return [i for i in range(len(self.shard_names())) if not self._is_done(i, self.plan.shards[i])]

    def _is_done(self, index: int, shard: PlannedShard) -> bool:
        """Whether a shard was written for these contexts, and every byte of it is still as it was written."""
        info = load_shard_info(self.path(index, ".json"))
        if info is None or info.key != shard.key:
            return False
        written = FileInfo(num_bytes=info.num_bytes, xxh3_128=info.xxh3_128)
        return not find_fault(self.path(index, ".arrow"), written)


# --- all shards ------------------------------------------------------------------------------------------------


def encode_shards(job: Job, team: Ranks, num_proc: int) -> None:
    """Encode what is missing: this process its share of a torchrun launch, or `num_proc` spawned ones all of it.

    Process p, or the p-th on its node, takes device p.
    """
    shards = team.from_first(job.missing)[team.rank :: team.size]
    if not shards:
        return
    total = sum(job.plan.shards[index].tokens for index in shards)
    with tqdm(total=total, desc="encoding", unit=" tokens", unit_scale=True, disable=None) as bar:
        if team.size > 1 or num_proc == 1 or len(shards) == 1:
            model = load_model(job, team.local_rank)
            with one_thread(model.device):
                for index in shards:
                    encode_shard(job, index, model, bar.update)
        else:
            _encode_in_processes(job, shards, min(num_proc, len(shards)), bar.update)


def load_model(job: Job, device_index: int) -> PreTrainedModel:
    """The base on GPU number `device_index`, or on the CPU of a machine without any."""
    where = device(device_index)
    return load_base(job.model_path, job.revision, dtype=job.model_dtype, device=where)


def _encode_in_processes(
    job: Job, shards: list[int], num_proc: int, progress: Callable[[int], object]
) -> None:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    board = _Board(context, num_proc)
    others = set(multiprocessing.active_children())
    workers: set[BaseProcess] = set()
    told = 0
    try:
        with ProcessPoolExecutor(num_proc, context, _start_worker, (job, board)) as pool:
            tasks = {pool.submit(_encode_shard, index) for index in shards}
            workers |= set(multiprocessing.active_children()) - others
            try:
                while tasks:
                    done, tasks = wait(tasks, _PROGRESS_SECONDS, FIRST_COMPLETED)
                    progress(-told + (told := sum(board.tokens)))
                    for task in done:
                        task.result()
            except BrokenProcessPool:
                raise  # the pool itself ends the others, by another signal than what ended the first
            except BaseException:
                for worker in workers:
                    worker.kill()
                raise
    except BrokenProcessPool:
        raise _lost(job, board, workers) from None


class _Board:
    """Progress of the workers in shared memory without a lock: each writes to a place of its own."""

    def __init__(self, context: SpawnContext, num_proc: int):
        self.pids, self.shards, self.tokens = (context.Array("q", num_proc, lock=False) for _ in range(3))
        self.shards[:] = [-1] * num_proc  # none yet
        self.free_places = context.SimpleQueue()
        for place in range(num_proc):
            self.free_places.put(place)

    def told(self, pid: int | None, how: str, shards: Sequence[PlannedShard]) -> str:
        """Which worker ended, how, and at which contexts, for people."""
        for place, (other, index) in enumerate(zip(self.pids, self.shards, strict=True)):
            if other == pid and index >= 0:
                shard = shards[index]
                return f"encoder {place} {how} at contexts {shard.first_row} to {shard.first_row + shard.rows - 1}"
        return f"an encoder {how} before its first context"


def _lost(job: Job, board: _Board, workers: Iterable[BaseProcess]) -> EnvironmentFault:
    """The fault that names the worker that died first; the pool has ended all others by SIGTERM."""
    ended = ((w.pid, w.exitcode) for w in workers if w.exitcode and w.exitcode != -signal.SIGTERM)
    pid, code = next(ended, (None, None))
    if code is None:
        who = "an encoder was ended from outside"
    else:
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"
        who = board.told(pid, how, job.plan.shards)
    return EnvironmentFault(f"{who}: all finished shards are kept, start the same command again to go on")


class _Worker:
    """A spawned process, as it sees itself: its place on the board, which is the number of its device, too."""

    def __init__(self, job: Job, board: _Board):
        self.job, self._board = job, board
        self._place = board.free_places.get()
        board.pids[self._place] = os.getpid()

    @cached_property
    def model(self) -> PreTrainedModel:
        return load_model(self.job, self._place)

    def begin(self, index: int) -> None:
        self._board.shards[self._place] = index

    def progress(self, num_tokens: int) -> None:
        self._board.tokens[self._place] += num_tokens


_worker: _Worker  # of this process


def _start_worker(job: Job, board: _Board) -> None:
    """Make this process one that never outlives its parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    _worker = _Worker(job, board)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_shard(index: int) -> None:
    _worker.begin(index)
    with one_thread(_worker.model.device):
        encode_shard(_worker.job, index, _worker.model, _worker.progress)


# --- one shard -------------------------------------------------------------------------------------------------


def encode_shard(job: Job, index: int, model: PreTrainedModel, progress: Callable[[int], object]) -> None:
    """Encode and write one shard, writing each batch while the next one is computed."""
    shard = job.plan.shards[index]
    arrow = job.path(index, ".arrow")
    files.require_free(arrow.parent, job.shard_bytes(shard), f"shard {arrow.name}")
    schema = context_features(job.storage_dtype).arrow_schema
    layers = named_layers(job.plan.settings.encode_layer, model.config.num_hidden_layers)
    encoder = Encoder(model, storage_dtype=job.storage_dtype, layers=layers)
    with (
        files.atomic_file(arrow) as file,
        ThreadPoolExecutor(1) as pool,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        written: Future | None = None
        for batch, titles, origins, truncated in batches(job, index):
            record = _record(batch, titles, origins, truncated, encoder)
            if written:
                written.result()
            written = pool.submit(writer.write_batch, record)
            progress(sum(map(len, batch.input_ids)))
        if written:
            written.result()
    info = ShardInfo(
        key=shard.key,
        first_row=shard.first_row,
        rows=shard.rows,
        tokens=shard.tokens,
        num_bytes=file.num_bytes,
        xxh3_128=file.hexdigest(),
        batch_size=job.batch_size,
        batch_tokens=job.batch_tokens,
        out_of_memory_splits=encoder.out_of_memory_splits,
    )
    files.write_text(job.path(index, ".json"), info.to_json())


def _record(
    batch: Batch, titles: list[str], origins: list[Origin], truncated: list[bool], encoder: Encoder
) -> pa.RecordBatch:
    """The rows of a batch as they are stored; a context's id is its row number."""
    num_tokens = [len(ids) for ids in batch.input_ids]
    ids = [str((batch.first_row or 0) + row) for row in range(len(num_tokens))]
    return encoded_record(ids, titles, batch.texts, origins, num_tokens, truncated, *encoder.quantized(batch))


def batches(job: Job, index: int) -> Iterator[tuple[Batch, list[str], list[Origin], list[bool]]]:
    """The contexts of a shard, longest first, cut into batches: titles, places, and which of them were truncated."""
    rows = planning.shard_tokens(job.folder, index)
    contexts, input_ids = rows["context"].to_pylist(), rows["input_ids"].to_pylist()
    titles, truncated = rows["title"].to_pylist(), rows["truncated"].to_pylist()
    places = (rows[name].to_pylist() for name in Origin._fields)
    origins = [Origin(*place) for place in zip(*places, strict=True)]
    for batch in length_batches([len(ids) for ids in input_ids], job.batch_size, job.batch_tokens):
        cut = slice(batch[0], batch[-1] + 1)  # they lie in this order
        first_row = job.plan.shards[index].first_row + cut.start
        yield Batch(contexts[cut], input_ids[cut], first_row), titles[cut], origins[cut], truncated[cut]
