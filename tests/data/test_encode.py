"""Encoding: batches, faults of the device and of the numbers, and bytes that depend on rows and settings alone."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dssk.data import encode
from dssk.data.plan import PlannedShard
from dssk.errors import Diverged, EnvironmentFault
from dssk.inference import encoding
from dssk.inference.tokenizer import load_tokenizer
from dssk.store.dataset import load_rows
from dssk.store.manifest import load_shard_info
from dssk.store.opening import load_manifest
from tests.conftest import REPOSITORY
from tests.data.conftest import rows, stamps, tree, write_jsonl


@pytest.fixture
def forwards(monkeypatch):
    """The shapes of all batches that the model gets; `forwards.fail(shape)` may raise."""
    real = encoding.encode

    class Spy(list):
        fail = staticmethod(lambda shape: None)

        def __call__(self, model, input_ids, attention_mask=None, layers=()):
            self.fail(input_ids.shape)
            self.append(tuple(input_ids.shape))
            return real(model, input_ids, attention_mask, layers)

    spy = Spy()
    monkeypatch.setattr(encoding, "encode", spy)
    return spy


def states(path) -> dict[str, torch.Tensor]:
    return {row["context"]: row["encoder_hidden_states"] for row in load_rows(path)["train"]}


def out_of_memory(shape):
    if shape[0] % 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    torch.empty(1 << 60)  # what a CPU says


def test_batches_keep_to_both_limits(tmp_path, preprocess, source, forwards):
    preprocess(tmp_path, source, batch_size=5, batch_tokens=400, shard_rows=100)
    assert max(size for size, _ in forwards) == 5
    assert max(size * length for size, length in forwards) <= 400
    assert sum(size for size, _ in forwards) == 40
    lengths = [length for _, length in forwards]
    assert lengths == sorted(lengths, reverse=True)


def test_a_context_above_the_token_limit_is_a_batch_of_its_own(tmp_path, preprocess, source, forwards):
    preprocess(tmp_path, source, batch_size=5, batch_tokens=1)
    assert {size for size, _ in forwards} == {1}


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path, preprocess, source, forwards):
    whole = states(preprocess(tmp_path / "whole", source))
    forwards.fail = lambda shape: out_of_memory(shape) if shape[0] > 1 else None
    path = preprocess(tmp_path / "halved", source)
    for context, halved in states(path).items():
        torch.testing.assert_close(halved, whole[context], rtol=0.02, atol=0.02)
    shards = [load_shard_info(file) for file in sorted((path / "contexts").glob("data-*.json"))]
    assert [shard and shard.out_of_memory_splits for shard in shards] == [6] * 5


def test_out_of_memory_on_one_context_stops_with_its_number_and_tokens(
    tmp_path, preprocess, source, forwards
):
    forwards.fail = lambda shape: out_of_memory(shape) if shape[1] > 100 else None
    with pytest.raises(
        EnvironmentFault, match=r"out of memory on context 0 \('Town 6 .*'\) alone, \d+ tokens: lower"
    ):
        preprocess(tmp_path, source)
    forwards.fail = lambda shape: None
    preprocess(tmp_path, source)  # nothing was damaged


def test_any_other_error_of_the_model_is_not_hidden(tmp_path, preprocess, source, forwards):
    def fail(shape):
        raise RuntimeError("a bug")

    forwards.fail = fail
    with pytest.raises(RuntimeError, match="a bug"):
        preprocess(tmp_path, source)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("storage_dtype", ["bf16", "int8"])
def test_nan_stops_the_work_and_names_the_context(tmp_path, preprocess, base_path, storage_dtype):
    broken = shutil.copytree(base_path, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["transformer.wte.weight"][load_tokenizer(base_path).convert_tokens_to_ids("~")] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    values = rows(40)
    values[51]["context"] = values[50]["context"] = "Here is ~ once."
    source = write_jsonl(tmp_path / "rows.jsonl", values)
    with pytest.raises(Diverged, match=r"context \d+ \('Here is ~ once.'\) encodes to NaN or infinity as"):
        preprocess(tmp_path, source, model=broken, storage_dtype=storage_dtype)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_value_too_large_for_the_storage_type_stops_the_work(tmp_path, preprocess, source, monkeypatch):
    monkeypatch.setattr(encoding, "encode", lambda model, ids, *rest: torch.full((*ids.shape, 32), 1e6))
    with pytest.raises(Diverged, match="as fp16"):
        preprocess(tmp_path / "fp16", source, storage_dtype="fp16")
    preprocess(tmp_path / "bf16", source, storage_dtype="bf16")


def test_the_model_computes_in_the_type_that_was_asked_for(tmp_path, preprocess, source, monkeypatch):
    seen = []
    real = encoding.encode
    monkeypatch.setattr(
        encoding, "encode", lambda model, *args: seen.append(model.dtype) or real(model, *args)
    )
    path = preprocess(tmp_path, source, dtype="bf16")
    assert set(seen) == {torch.bfloat16}
    assert load_manifest(path).model_dtype == "bfloat16"


# --- bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["again", "torchrun", "more threads"])
def test_the_bytes_do_not_depend_on_who_encodes(tmp_path, preprocess, finished, base_path, forwards, how):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(40))
    if how == "torchrun":
        command = (
            "-m torch.distributed.run --nproc-per-node 2 -m dssk.data.preproc_nq --maximum_input_length 256"
        )
        command += " --batch_size 4 --shard_rows 8 --val_fraction 0.2 --num_proc 2"
        paths = ["--embedding_model", base_path, "--data_cache_path", tmp_path, "--dataset", source]
        command = [sys.executable, *command.split(), *map(str, paths)]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    elif how == "more threads":
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        forwards.fail = lambda shape: pytest.fail("more threads") if torch.get_num_threads() > 1 else None
        preprocess(tmp_path, source)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(before)
    else:
        preprocess(tmp_path, source)
    expected = tree(finished)
    found = tree(tmp_path / "processed_data" / base_path.name)
    # the manifest holds the path of the source
    expected_manifest, manifest = expected.pop("manifest.json"), found.pop("manifest.json")
    assert found == expected
    assert len(manifest) - len(expected_manifest) == len(str(source)) - len(
        str(finished.parent.parent / "rows.jsonl")
    )


@pytest.mark.slow
def test_a_killed_worker_is_named_and_the_same_command_goes_on(tmp_path, preprocess, base_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(1000, questions=1))
    flags = {"maximum_input_length": 256, "batch_size": 1, "shard_rows": 50, "num_proc": 2}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "dssk.data.preproc_nq", "--embedding_model", str(base_path), *words]
    command += ["--data_cache_path", str(tmp_path), "--dataset", str(source)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    contexts = tmp_path / "processed_data" / base_path.name / "contexts"
    while len(list(contexts.glob("*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(_workers(process.pid)[0], signal.SIGKILL)  # under load this one may not have begun yet
    _, errors = process.communicate()
    assert process.returncode == 3
    assert re.search(
        r"was killed by signal 9 \(out of memory\?\) (at contexts|before its first)", errors.splitlines()[-1]
    )
    kept = stamps(path.with_suffix(".arrow") for path in contexts.glob("data-*.json"))
    path = preprocess(tmp_path, source, **flags | {"val_fraction": 0.05, "num_proc": 1})
    assert stamps(kept) == kept
    load_rows(path)


def test_the_encoder_that_died_first_is_named_with_where_it_was():
    shards = [PlannedShard(first_row=first, rows=10, tokens=50, key="") for first in (0, 10, 20)]
    job = SimpleNamespace(plan=SimpleNamespace(shards=shards))
    board = encode._Board(multiprocessing.get_context("spawn"), 2)
    board.pids[:], board.shards[0] = [7, 8], 2
    by_pool = SimpleNamespace(pid=9, exitcode=-signal.SIGTERM)

    def message(pid, exitcode):
        return str(encode._lost(job, board, [by_pool, SimpleNamespace(pid=pid, exitcode=exitcode)]))

    assert message(7, -9).startswith(
        "encoder 0 was killed by signal 9 (out of memory?) at contexts 20 to 29: "
    )
    assert message(8, -9).startswith(
        "an encoder was killed by signal 9 (out of memory?) before its first context: "
    )
    assert message(7, 1).startswith("encoder 0 ended with exit code 1 at contexts 20 to 29: ")
    assert message(7, 0).startswith("an encoder was ended from outside: ")


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too_and_is_one_line(tmp_path, base_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows(2000, questions=1))
    flags = "--maximum_input_length 256 --batch_size 1 --shard_rows 100 --num_proc 2".split()
    command = [sys.executable, "-m", "dssk", "preproc", "--embedding_model", str(base_path), *flags]
    command += ["--data_cache_path", str(tmp_path), "--dataset", str(source)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("processed_data/*/contexts/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    workers = _workers(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "dssk: interrupted\n")
    assert len(workers) == 2
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def _workers(pid: int) -> list[int]:
    """The spawned encoders of a process (it also has a resource tracker)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
