"""How fast contexts are encoded and read, and what they take: `make bench-data`, `results/data.json`.

A random base, texts of random words with log-normal lengths (median 150 tokens, one in two hundred reaches 2000), one
thread. Ratios compare two ways of doing the same within one run. At most ten minutes.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from common import SIZES, Results, interleaved, random_base
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dssk.commands import preproc
from dssk.data import encode as encoding
from dssk.data.collate import Collator
from dssk.data.preprocess import prepare
from dssk.inference.batching import length_mask, pad_tokens
from dssk.inference.encoding import encode
from dssk.inference.tokenizer import load_tokenizer, tokenize_answer, tokenize_question
from dssk.research.make_base import make_tokenizer
from dssk.store.dataset import load_rows
from dssk.store.opening import load_manifest
from dssk.utils import files, hashes
from dssk.utils.console import quiet_libraries
from dssk.utils.ranks import Ranks

MEDIAN_TOKENS, SIGMA, MAXIMUM_TOKENS = 150, 1.0, 2000
HIDDEN_SIZE = SIZES["SMALL"]["n_embd"]
ENCODE_BATCH_SIZE, READ_BATCH_SIZE = 8, 4
NUM_ENCODED, NUM_EQUAL, NUM_READ = 256, 64, 96
QUESTION, ANSWER = "when did bon dal fest meet ren in the last gul", "bon dal"
MEMORY_SHARD, SMALL_STORE, LARGE_STORE = 20, 120, 1200
HASHED_BYTES = 1 << 28
ROUNDS = 3
WORDS = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("n", "l", "st", "ra")]


def draw_lengths(num_contexts: int) -> np.ndarray:
    """Words, and so about tokens, of contexts."""
    drawn = MEDIAN_TOKENS * np.exp(np.random.default_rng(0).normal(0, SIGMA, num_contexts))
    return np.minimum(drawn, MAXIMUM_TOKENS).astype(int)


def flags(folder: Path, lengths: np.ndarray, output: str, **more: object) -> list[str]:
    """The command line that encodes a new source: one row about a context of each of `lengths` words."""
    source = folder / f"{len(lengths)}.jsonl"
    chooser = random.Random(0)
    with open(source, "w") as file:
        for row, num_words in enumerate(lengths):
            context = " ".join(chooser.choices(WORDS, k=num_words))
            file.write(
                json.dumps({"id": str(row), "context": context, "question": "q", "answer": "a"}) + "\n"
            )
    settings = {
        "embedding_model": folder / "SMALL",
        "data_cache_path": folder / output,
        "dataset": source,
        "maximum_input_length": MAXIMUM_TOKENS,
        "batch_size": ENCODE_BATCH_SIZE,
        **more,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def preprocess(command_line: list[str]) -> Path:
    """Run the command in this process; returns the folder of the store."""
    preproc.main(command_line)
    return Path(command_line[3]) / "processed_data" / "SMALL"


# --- encoding ---------------------------------------------------------------------------------------------------


def bench_encoding(results: Results, folder: Path) -> None:
    """The encoder, writing included, against the bare forward on its own batches and on batches in row order.

    Order pays by the padding that it saves: with contexts of one length there is none to save.
    """
    lengths = draw_lengths(NUM_ENCODED)
    rates, settings = encoding_rates(folder, lengths, "bf16")
    for row, reference in (("encode_vs_bare", "bare"), ("encode_vs_row_order", "rows")):
        ratio = rates["ours"] / rates[reference]
        results.add(row, rates["ours"], rates[reference], ratio, "tokens/s", **settings)
    equal = np.full(NUM_EQUAL, round(lengths.mean()))
    rates, settings = encoding_rates(folder, equal, "equal")
    ratio = rates["ours"] / rates["rows"]
    results.add("encode_equal_lengths", rates["ours"], rates["rows"], ratio, "tokens/s", **settings)


def encoding_rates(folder: Path, lengths: np.ndarray, output: str) -> tuple[dict[str, float], dict[str, int]]:
    """Tokens a second of ours, of the bare forward on our batches, and on batches in row order; and the settings."""
    args = preproc.build_parser().parse_args(flags(folder, lengths, output))
    with contextlib.ExitStack() as locks:
        job = prepare(preproc.to_request(args), locks, Ranks(0, 1, 0))
    assert job is not None
    model = encoding.load_model(job, 0)
    shards = range(len(job.plan.shards))
    batches = [batch.input_ids for index in shards for batch, *_ in encoding.batches(job, index)]
    contexts = [ids for batch in batches for ids in batch]
    random.Random(1).shuffle(contexts)  # as they come in a source
    starts = range(0, len(contexts), ENCODE_BATCH_SIZE)

    def ours() -> None:
        for index in shards:
            encoding.encode_shard(job, index, model, lambda num_tokens: None)

    def forward(batches: Sequence[Sequence[list[int]]]) -> Callable[[], None]:
        inputs = [(pad_tokens(ids, 0), length_mask([len(row) for row in ids])) for ids in batches]

        def run() -> None:
            for input_ids, mask in inputs:
                encode(model, input_ids, mask)

        return run

    calls = {"ours": ours, "bare": forward(batches)}
    calls["rows"] = forward([contexts[start : start + ENCODE_BATCH_SIZE] for start in starts])
    rates = {name: job.plan.counts.tokens / s for name, s in interleaved(calls, ROUNDS).items()}
    return rates, {"contexts": len(contexts), "tokens": job.plan.counts.tokens, "batch": ENCODE_BATCH_SIZE}


def bench_bytes(results: Results, folder: Path) -> None:
    """Bytes of the Arrow files for one value of an encoding; the contexts' own text is not counted."""
    for storage_dtype, reference in (("bf16", 2.0), ("int8", 1.0)):
        path = preprocess(
            flags(folder, draw_lengths(NUM_ENCODED), storage_dtype, storage_dtype=storage_dtype)
        )
        manifest = load_manifest(path)
        text = sum(
            len(context.encode()) for context in datasets.load_from_disk(str(path / "contexts"))["context"]
        )
        stored = sum(segment.num_bytes for segment in manifest.segments)
        num_values = manifest.counts.tokens * HIDDEN_SIZE
        ours = (stored - text) / num_values
        settings = {"with_text": round(stored / num_values, 4), "hidden_size": HIDDEN_SIZE}
        results.add(
            f"bytes_per_value_{storage_dtype}", ours, reference, ours / reference, "bytes/value", **settings
        )


# --- checking ---------------------------------------------------------------------------------------------------


def bench_hashing(results: Results, folder: Path) -> None:
    """What reading a file whole costs the first time, beside plain reading, and the second time."""
    path = folder / "bytes"
    path.write_bytes(np.random.default_rng(0).bytes(HASHED_BYTES))
    settings = {"bytes": HASHED_BYTES, "from": "the page cache"}

    def plain() -> None:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass

    seconds = interleaved({"hash": lambda: files.xxh3_128(path), "plain": plain}, rounds=5)
    speed = {name: HASHED_BYTES / taken / 1e9 for name, taken in seconds.items()}
    results.add("hashing", speed["hash"], speed["plain"], speed["hash"] / speed["plain"], "GB/s", **settings)
    time.sleep(3)  # a file that was just written is not remembered
    hashes.xxh3_128(path)
    again = interleaved({"again": lambda: hashes.xxh3_128(path)}, rounds=5)["again"]
    results.add("hashing_again", again, seconds["hash"], seconds["hash"] / again, "s", **settings)


# --- reading ----------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Rows as examples for the collator; without a tokenizer, questions and answers are tokenized already."""

    rows: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        ids = [5] * 16
        if self.tokenizer:
            ids = tokenize_question(self.tokenizer, QUESTION) + tokenize_answer(self.tokenizer, ANSWER)
        return {"input_ids": ids, "labels": ids, "encoder_hidden_states": row["encoder_hidden_states"]}


def bench_reading(results: Results, folder: Path) -> None:
    """Shuffled rows through the loader and the collator: ours, and nested lists with `with_format("torch")`.

    Once the states alone, and once as training reads them: with a question and an answer that are tokenized.
    """
    path = preprocess(flags(folder, draw_lengths(NUM_ENCODED), "bf16"))
    ours = load_rows(path)["train"].select(range(NUM_READ))
    nested = datasets.Dataset.from_generator(
        lambda: ({"encoder_hidden_states": row["encoder_hidden_states"].float().tolist()} for row in ours),
        cache_dir=str(folder / "cache"),
    )
    nested.save_to_disk(folder / "nested")
    reference = datasets.load_from_disk(str(folder / "nested")).with_format("torch")

    def read(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[], None]:
        def run() -> None:
            order = torch.Generator().manual_seed(0)
            loader = DataLoader(
                Examples(rows, tokenizer),  # type: ignore[arg-type]
                batch_size=READ_BATCH_SIZE,
                shuffle=True,
                generator=order,
                collate_fn=Collator(0),
            )
            for _ in loader:
                pass

        return run

    tokens = sum(len(row["encoder_hidden_states"]) for row in ours) / NUM_READ
    settings = {"rows": NUM_READ, "batch": READ_BATCH_SIZE, "mean_tokens": round(tokens)}
    for row, tokenizer in (
        ("read_vs_nested", None),
        ("read_and_tokenize_vs_nested", load_tokenizer(folder / "SMALL")),
    ):
        seconds = interleaved({"ours": read(ours, tokenizer), "nested": read(reference, tokenizer)}, ROUNDS)
        rates = {name: NUM_READ / s for name, s in seconds.items()}
        results.add(
            row, rates["ours"], rates["nested"], rates["ours"] / rates["nested"], "rows/s", **settings
        )


# --- memory -----------------------------------------------------------------------------------------------------

MEASURED = """
import sys, time
from dssk.commands import preproc
started = time.perf_counter()
preproc.main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(time.perf_counter() - started, int(status["VmHWM"].split()[0]) / 1024)  # ru_maxrss would count our own
"""


def bench_memory(results: Results, folder: Path) -> None:
    """Peak memory of the whole command for a store ten times larger, beside what it writes and the time it takes."""
    seconds, peak, written = {}, {}, {}
    for num_contexts in (SMALL_STORE, LARGE_STORE):
        # every shard holds the same lengths, so that the largest batch is the same
        lengths = np.resize(draw_lengths(MEMORY_SHARD), num_contexts)
        command = flags(folder, lengths, f"memory-{num_contexts}", shard_rows=MEMORY_SHARD)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *command],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds[num_contexts], peak[num_contexts] = map(float, done.stdout.splitlines()[-1].split())
        manifest = load_manifest(Path(command[3]) / "processed_data" / "SMALL")
        written[num_contexts] = sum(segment.num_bytes for segment in manifest.segments)
    settings = {
        "contexts": f"{SMALL_STORE} and {LARGE_STORE}",
        "times_bytes": round(written[LARGE_STORE] / written[SMALL_STORE], 2),
        "times_seconds": round(seconds[LARGE_STORE] / seconds[SMALL_STORE], 2),
    }
    ratio = peak[LARGE_STORE] / peak[SMALL_STORE]
    results.add("memory_10x", peak[LARGE_STORE], peak[SMALL_STORE], ratio, "MiB peak", **settings)


BENCHMARKS = {
    "encoding": bench_encoding,
    "bytes": bench_bytes,
    "hashing": bench_hashing,
    "reading": bench_reading,
    "memory": bench_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(BENCHMARKS), help="run one benchmark and write no results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    datasets.disable_progress_bars()
    results = Results("data")
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer([" ".join(WORDS)], SIZES["SMALL"]["vocab_size"]).save_pretrained(
            random_base("SMALL", Path(folder))
        )
        for name, bench in BENCHMARKS.items():
            if args.only in (None, name):
                bench(results, Path(folder))
    if not args.only:
        results.write()


if __name__ == "__main__":
    main()
