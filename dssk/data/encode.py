"""Encoding contexts with the frozen model, shard by shard, on one device or several.

A shard's bytes depend on its rows and the settings only: batches are formed inside a shard, and on a CPU every
worker computes on one thread, because the order of additions, and with it the last bit, depends on both.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dssk.data import plan as planning
from dssk.data.plan import Plan, PlannedShard
from dssk.errors import DsskError, EnvironmentFault
from dssk.inference.batching import length_batches
from dssk.inference.encoding import Batch, Encoder, one_thread
from dssk.inference.loading import device, load_base
from dssk.inference.rounding import encoding_bytes
from dssk.store import format as store
from dssk.utils import files
from dssk.utils.console import quiet_libraries
from dssk.utils.ranks import Ranks


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; travels to it as a pickle."""

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
    def storage_dtype(self) -> store.StorageDtype:
        return cast(store.StorageDtype, self.plan.settings.storage_dtype)

    def path(self, index: int, suffix: str) -> Path:
        """File of shard `index`; `suffix` is `.arrow` or `.json`."""
        return self.folder / store.CONTEXTS / (store.shard_name(index, len(self.plan.shards)) + suffix)

    def shard_bytes(self, shard: PlannedShard) -> int:
        """About the size of a shard's Arrow file, texts left out."""
        return encoding_bytes(self.storage_dtype, self.plan.settings.hidden_size) * shard.tokens

    def shard_names(self) -> list[str]:
        """The Arrow files of `contexts/`, in order; none for a store of texts only."""
        if self.plan.settings.storage_dtype is None:
            return []
        return [self.path(index, ".arrow").name for index in range(len(self.plan.shards))]

    def open_folder(self) -> None:
        """Make `contexts/` ready: nothing foreign in it, room for what is missing."""
        folder = self.folder / store.CONTEXTS
        names = self.shard_names()
        if not names:
            return
        files.make_folder(folder)
        for path in folder.iterdir():
            if path.with_suffix(".arrow").name not in names:
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
        info = store.load_shard_info(self.path(index, ".json"))
        arrow = self.path(index, ".arrow")
        return (
            info is not None
            and info.key == shard.key
            and arrow.is_file()
            and arrow.stat().st_size == info.num_bytes
        )


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
    todo = iter(shards)
    workers = [_Worker(context, job, rank) for rank in range(num_proc)]
    try:
        busy = {worker.connection: worker for worker in workers if worker.next_shard(todo)}
        while busy:
            for connection in cast(list[Connection], wait(list(busy))):
                message = busy[connection].receive()
                if message != _DONE:
                    progress(message)
                elif not busy[connection].next_shard(todo):
                    del busy[connection]
    except BaseException:
        for worker in workers:
            worker.process.kill()
        raise
    finally:
        for worker in workers:
            worker.process.join()


_DONE = "done"


class _Worker:
    """A spawned process, as its parent sees it, and the shard it is at."""

    def __init__(self, context: SpawnContext, job: Job, rank: int):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(job, rank, theirs), name=f"encoder {rank}", daemon=True
        )
        self.process.start()
        theirs.close()  # so that its death ends the connection
        self._job = job
        self._shard: int | None = None

    def next_shard(self, todo: Iterator[int]) -> bool:
        """Hand out the next shard, or tell the worker to end if there is none."""
        self._shard = next(todo, None)
        with contextlib.suppress(BrokenPipeError):  # it died; `receive` says how
            self.connection.send(self._shard)
        return self._shard is not None

    def receive(self) -> Any:
        """What the worker says: tokens encoded, or `_DONE`. Raises the fault that ended it."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._lost() from None
        if isinstance(message, DsskError):
            raise message
        return message

    def _lost(self) -> EnvironmentFault:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"
        shard = self._job.plan.shards[self._shard or 0]
        return EnvironmentFault(
            f"{self.process.name} {how} at contexts {shard.first_row} to {shard.first_row + shard.rows - 1}: all "
            "finished shards are kept, start the same command again to go on"
        )


def _work(job: Job, rank: int, connection: Connection) -> None:
    """A worker's life: take shard numbers until there are no more. It never outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    quiet_libraries()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    try:
        model = load_model(job, rank)
        with one_thread(model.device):
            while (index := connection.recv()) is not None:
                encode_shard(job, index, model, connection.send)
                connection.send(_DONE)
    except DsskError as error:
        connection.send(error)
    except (EOFError, ConnectionError):
        pass  # the parent is gone, nobody is left to tell


# --- one shard -------------------------------------------------------------------------------------------------


def encode_shard(job: Job, index: int, model: PreTrainedModel, progress: Callable[[int], object]) -> None:
    """Encode and publish one shard, writing each batch while the next one is computed."""
    shard = job.plan.shards[index]
    arrow = job.path(index, ".arrow")
    files.require_free(arrow.parent, job.shard_bytes(shard), f"shard {arrow.name}")
    schema = store.context_features(job.storage_dtype).arrow_schema
    encoder = Encoder(model, storage_dtype=job.storage_dtype)
    with (
        files.publish(arrow) as file,
        ThreadPoolExecutor(1) as pool,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        written: Future | None = None
        for batch in batches(job, index):
            record = store.encoded_record(batch.texts, batch.input_ids, *encoder.quantized(batch), schema)
            if written:
                written.result()
            written = pool.submit(writer.write_batch, record)
            progress(sum(map(len, batch.input_ids)))
        if written:
            written.result()
    info = store.ShardInfo(
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
    files.publish_text(job.path(index, ".json"), info.model_dump_json(indent=1) + "\n")


def batches(job: Job, index: int) -> Iterator[Batch]:
    """The contexts of a shard, longest first, cut into batches."""
    rows = planning.shard_tokens(job.folder, index)
    contexts, input_ids = rows["context"].to_pylist(), rows["input_ids"].to_pylist()
    for batch in length_batches([len(ids) for ids in input_ids], job.batch_size, job.batch_tokens):
        cut = slice(batch[0], batch[-1] + 1)  # they lie in this order
        yield Batch(contexts[cut], input_ids[cut], job.plan.shards[index].first_row + cut.start)
