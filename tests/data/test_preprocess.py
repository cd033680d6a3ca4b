"""The preprocessing command: used again, continued, refused, and one line for what goes wrong."""

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dssk.commands import preproc
from dssk.commands.train import parse_args
from dssk.config import experiment_id
from dssk.data import encode
from dssk.errors import DamagedData, DsskError, EnvironmentFault, Locked, exit_code_of
from dssk.store.dataset import load_rows
from dssk.store.opening import load_manifest
from dssk.training.run import train
from dssk.utils import files
from exp_configs import EXP_GROUPS
from tests.conftest import REPOSITORY, byte_tokenizer, encode_rows, make_base, question_rows
from tests.data.conftest import rows, stamps, tree, write_jsonl


class Killed(BaseException):
    """What no code catches: the process is gone."""


@pytest.mark.slow
def test_the_command_of_the_founding_document_works_from_its_folder(tmp_path, base_path, preprocess):
    """Run as a file from dssk/data, where `inspect.py` must not hide Python's own, also from spawned processes.

    Two processes give the same bytes as one.
    """
    command = f"""{sys.executable} preproc_nq.py \\
        --embedding_model {base_path}/ \\
        --maximum_input_length 256 \\
        --batch_size 2 \\
        --num_proc 2 \\
        --data_cache_path {tmp_path / "two"} --dataset toy --max_examples 60 --shard_rows 32"""
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY / "dssk" / "data", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "120 rows read, 120 kept (train: 60, val: 60)" in done.stdout
    two = tmp_path / "two" / "processed_data" / base_path.name
    assert load_rows(two)["train"][0]["encoder_hidden_states"].shape[1] == 32
    one = preprocess(tmp_path / "one", "toy", max_examples=60, batch_size=2, shard_rows=32, val_fraction=0.05)
    expected, found = tree(one), tree(two)
    for files_of in (expected, found):
        del files_of["manifest.json"]  # it holds the path of the model as it was given
    assert found == expected


def test_the_set_of_flags_is_known():
    flags = {option for action in preproc.build_parser()._actions for option in action.option_strings}
    named = """-h --help --embedding_model --revision --dtype --dataset --dataset_revision --split --val_dataset
        --val_fraction --max_examples --columns --skip_bad_rows --seed --maximum_input_length --batch_size
        --batch_tokens --num_proc --passage_tokens --overlap --repeat_title --truncate --whole_pages
        --data_cache_path --encode_layer --storage_dtype --text_only --shard_rows"""
    assert flags == set(named.split())


def test_a_finished_folder_is_used_again(tmp_path, preprocess, source, capsys):
    path = preprocess(tmp_path, source)
    before = stamps(path.rglob("*"))
    capsys.readouterr()
    preprocess(tmp_path, source, batch_size=1, num_proc=1)  # what does not change the rows may change
    assert capsys.readouterr().out == f"Encoded contexts found in {path}: used again.\n"
    assert stamps(path.rglob("*")) == before


def test_a_finished_folder_on_a_read_only_disk_is_used_again(tmp_path, preprocess, source, monkeypatch):
    preprocess(tmp_path, source)
    monkeypatch.setattr(files, "make_folder", lambda folder: pytest.fail("wrote"))
    monkeypatch.setattr(files, "lock", lambda path: pytest.fail("wrote"))
    preprocess(tmp_path, source)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ({"maximum_input_length": 100}, r"maximum_input_length 256 \(now 100\)"),
        ({"storage_dtype": "fp32"}, r"storage_dtype bf16 \(now fp32\)"),
        ({"dtype": "bf16"}, r"model_dtype float32 \(now bfloat16\)"),
        ({"val_fraction": 0.5}, r"val_fraction 0.2 \(now 0.5\)"),
        ({"max_examples": 9}, r"max_examples None \(now 9\)"),
        ({"text_only": True}, r"storage_dtype bf16 \(now None\)"),
        ({"shard_rows": 9}, r"shard_rows 8 \(now 9\)"),
        ({"dataset": "toy"}, r"dataset .*rows.jsonl \(now toy\)"),
    ],
)
@pytest.mark.parametrize("finished_before", [True, False])
def test_other_settings_in_the_same_folder_are_refused(
    tmp_path, preprocess, source, monkeypatch, flags, difference, finished_before
):
    if finished_before:
        path = preprocess(tmp_path, source)
    else:
        path = interrupted(tmp_path, preprocess, source, monkeypatch, after_shards=1)
    before = tree(path)
    with pytest.raises(DsskError, match=f"was made with .*{difference}.*: repeat those settings, or choose"):
        preprocess(tmp_path, **({"dataset": source} | flags))
    assert tree(path) == before


def test_another_model_of_the_same_name_is_refused(tmp_path, preprocess, source, base_path):
    preprocess(tmp_path, source)
    other = make_base(tmp_path / "elsewhere" / base_path.name, seed=1)
    with pytest.raises(DsskError, match="model_fingerprint"):
        preprocess(tmp_path, source, model=other)


def test_changed_rows_under_the_same_name_are_refused(tmp_path, preprocess, source):
    preprocess(tmp_path, source)
    write_jsonl(source, rows(41))
    with pytest.raises(DsskError, match="dataset_contents"):
        preprocess(tmp_path, source)


# --- the output folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "./", "sub/.."])
def test_the_folder_is_named_after_the_model_however_its_path_is_written(
    tmp_path, preprocess, source, base_path, monkeypatch, name
):
    """`processed_data` itself would else be the store, and what else lies in it be taken for a part of it."""
    base = shutil.copytree(base_path, tmp_path / "mine")
    (base / "sub").mkdir()
    monkeypatch.chdir(base)
    victim = tmp_path / "cache" / "processed_data" / "contexts" / "data-00007-of-00009.arrow"
    victim.parent.mkdir(parents=True)
    victim.write_text("another's")
    words = [
        "--embedding_model",
        name,
        "--data_cache_path",
        str(tmp_path / "cache"),
        "--dataset",
        str(source),
    ]
    preproc.main([*words, "--maximum_input_length", "256"])
    load_rows(tmp_path / "cache" / "processed_data" / "mine")
    assert victim.read_text() == "another's"


@pytest.mark.parametrize("name", ["", "/", "owner/..", "owner/."])
def test_a_model_without_a_name_of_its_own_is_refused(tmp_path, source, name):
    words = ["--embedding_model", name, "--data_cache_path", str(tmp_path), "--dataset", str(source)]
    with pytest.raises(DsskError, match="has no name of its own to call the result by"):
        preproc.main(words)


def test_what_others_put_into_the_folder_stays_there(tmp_path, preprocess, source, monkeypatch):
    path = interrupted(tmp_path, preprocess, source, monkeypatch, after_shards=2)
    kept = [path / "contexts" / "notes.txt", path / "notes" / ".tmp-1-data", path / "contexts" / ".tmp-mine"]
    stale = [path / "contexts" / f"data-00000-of-00009.{ending}" for ending in ("arrow", "json")]
    for file in [*kept, *stale]:
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    preprocess(tmp_path, source)
    assert all(file.read_text() == "x" for file in kept)
    assert not any(file.exists() for file in stale)
    assert not {str(file.relative_to(path)) for file in kept} & set(load_manifest(path).all_files)


def test_a_path_that_is_not_there_is_fetched_from_nowhere(tmp_path, preprocess, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the network"))
    for name in ("models/base", "./base", "/no/such/base"):
        with pytest.raises(DsskError, match=f"no model at {name}"):
            preprocess(tmp_path, source, model=Path(name), embedding_model=name)


# --- interruptions ----------------------------------------------------------------------------------------------


def interrupted(tmp_path, preprocess, source, monkeypatch, after_shards):
    """Start the command and end it when it begins to write shard number `after_shards`."""
    real = encode.encode_shard

    def encode_shard(job, index, model, progress):
        if index == after_shards:
            raise Killed
        real(job, index, model, progress)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_shard", encode_shard)
        with pytest.raises(Killed):
            preprocess(tmp_path, source)
    return next((tmp_path / "processed_data").glob("[!.]*"))


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, preprocess, source, monkeypatch, capsys):
    expected = tree(preprocess(tmp_path / "whole", source))
    path = interrupted(tmp_path / "cut", preprocess, source, monkeypatch, after_shards=3)
    with pytest.raises(DsskError, match="unfinished"):
        load_rows(path)
    kept = stamps(path.glob("contexts/data-*"))
    assert len(kept) == 6
    for folder in (path, path / "train", path / "contexts"):
        (folder / ".tmp-01234567-data").write_bytes(b"left behind")
    preprocess(tmp_path / "cut", source)
    assert f"Going on in {path}" in capsys.readouterr().out
    assert stamps(kept) == kept
    assert tree(path) == expected


@pytest.mark.slow
def test_every_moment_of_death_leaves_a_folder_that_goes_on(tmp_path, preprocess, monkeypatch):
    """Die before each step that makes a file appear or vanish; the next run must end as an uninterrupted one."""
    source = write_jsonl(tmp_path / "rows.jsonl", rows(12, questions=1))
    expected = tree(preprocess(tmp_path / "whole", source))
    steps = []

    def run_until(folder, last_step):
        with monkeypatch.context() as patch:
            for module, name in ((files.os, "replace"), (files, "remove"), (files, "sync")):
                real = getattr(module, name)

                def step(*args, real=real, name=name):
                    steps.append(name)
                    if len(steps) == last_step:
                        raise Killed
                    return real(*args)

                patch.setattr(module, name, step)
            return preprocess(folder, source)

    run_until(tmp_path / "counted", None)
    num_steps = len(steps)
    assert num_steps > 30
    for last_step in range(1, num_steps + 1):
        steps.clear()
        folder = tmp_path / str(last_step)
        with pytest.raises(Killed):
            run_until(folder, last_step)
        path = preprocess(folder, source)
        assert tree(path) == expected, last_step
        shutil.rmtree(folder)


@pytest.mark.parametrize("file", ["data-00001-of-00005.arrow", "data-00001-of-00005.json"])
def test_a_shard_that_is_lost_or_cut_is_encoded_again(tmp_path, preprocess, source, monkeypatch, file):
    expected = tree(preprocess(tmp_path / "whole", source))
    path = interrupted(tmp_path / "cut", preprocess, source, monkeypatch, after_shards=3)
    shard = path / "contexts" / file
    shard.write_bytes(shard.read_bytes()[:100])
    assert tree(preprocess(tmp_path / "cut", source)) == expected


# --- faults -----------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_in_one_line_and_leaves_no_temp_file(tmp_path, preprocess, source, monkeypatch):
    real = files.HashingWriter.write
    for room in (0, 3_000, 30_000, 100_000):
        left = room

        def write(self, data):
            nonlocal left
            left -= len(data)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(files.HashingWriter, "write", write)
            with pytest.raises(EnvironmentFault, match=r"^disk full at .*: make room"):
                preprocess(tmp_path / str(room), source)
        assert not list((tmp_path / str(room)).rglob(".tmp-*"))
        load_rows(preprocess(tmp_path / str(room), source))


def test_too_small_a_disk_is_refused_before_anything_is_encoded(tmp_path, preprocess, source, monkeypatch):
    monkeypatch.setattr(encode, "load_base", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(EnvironmentFault, match=r"encoding 40 contexts needs \d+.\d kB, 100.0 kB free"):
        preprocess(tmp_path, source)


def test_a_second_process_on_the_same_folder_is_told_who_holds_it(tmp_path, preprocess, source, base_path):
    folder = tmp_path / "processed_data" / base_path.name
    folder.parent.mkdir()
    with (
        files.only_writer(folder),
        pytest.raises(Locked, match=r'held by \{"host": ".*", "pid": \d+, "since": "'),
    ):
        preprocess(tmp_path, source)
    preprocess(tmp_path, source)


def test_a_damaged_store_is_not_used_again(tmp_path, preprocess, source):
    path = preprocess(tmp_path, source)
    shard = path / "contexts" / "data-00000-of-00005.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedData, match="--discard"):
        preprocess(tmp_path, source)


def test_a_context_limit_above_the_positions_of_the_model_is_refused(tmp_path, preprocess, source):
    with pytest.raises(DsskError, match="257 is more than the 256 positions"):
        preprocess(tmp_path, source, maximum_input_length=257)


def test_more_processes_than_gpus_are_refused(tmp_path, preprocess, source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(DsskError, match="--num_proc 8 is more than the 4 visible GPUs"):
        preprocess(tmp_path, source, num_proc=8)


@pytest.mark.parametrize(
    ("content", "message", "code"),
    [
        (b"", r"0 usable rows in train, of 0 rows read", 2),
        (json.dumps({"\x1b[2J\nq": 1}).encode() + b"\n", r"just the fields \\x1b\[2J\\nq: want context", 2),
        (json.dumps({f"k{i}": 1 for i in range(100_000)}).encode(), r"just the fields k0, .* \.\.\. ", 2),
        (b'{"context": "c", "question": "q", "answer": "\\ud800"}', r"answer has half a surrogate pair", 2),
        (b'{"context": "c", "question": "q", "answer": "\xff"}\n', r"r.jsonl:1: not UTF-8 at byte 45", 2),
        (b"{" * 5000, r"r.jsonl:1: not JSON", 2),
        (b"[]\n" * 7, r"7 of 7 rows .* cannot be used: .*r.jsonl:5: .*; \.\.\.: mend them or pass", 2),
        (b"\x1f\x8b", r"r.jsonl.gz is damaged", 4),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(tmp_path, preprocess, capsys, content, message, code):
    name = "r.jsonl.gz" if content.startswith(b"\x1f") else "r.jsonl"
    (tmp_path / name).write_bytes(content)
    assert exit_code_of(lambda: preprocess(tmp_path, tmp_path / name)) == code
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("dssk: error: ")
    assert error.count("\n") == 1
    assert len(error) < 800
    assert error[:-1].isprintable()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("seed", "-1"), ("seed", "x"), ("val_fraction", "1"), ("val_fraction", "nan"), ("skip_bad_rows", "-1")]
    + [("columns", value) for value in ("context", "=a", "context=a=b", "context=")],
)
def test_a_value_that_makes_no_sense_is_refused_with_what_would(
    tmp_path, preprocess, source, capsys, flag, value
):
    with pytest.raises(SystemExit, match="2"):
        preprocess(tmp_path, source, **{flag: value})
    error = capsys.readouterr().err
    assert f"argument --{flag}: got {value!r}, want " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("dataset", ["x" * 300, "x" * 300 + ".jsonl", "a" * 5000 + "/b/c"])
def test_a_name_longer_than_any_file_can_have_is_one_line(tmp_path, preprocess, capsys, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(lambda: preprocess(tmp_path, dataset)) in (2, 3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 800


@pytest.mark.slow
def test_the_group_crossattn_santacoder_goes_all_the_way_with_a_tokenizer_like_santacoders(tmp_path):
    """Hyphens in the names of its tokens, and none for padding."""
    base = make_base(tmp_path / "base", n_layer=12)
    byte_tokenizer("<fim-{}>").save_pretrained(base)
    path = encode_rows(base, tmp_path, question_rows(24))
    changes = {"model_path": str(base), "context_size": 128, "fp16": False, "skip_steps": 1}
    exp_dict = EXP_GROUPS["crossattn_santacoder"][0] | changes
    assert exp_dict["include_context_ids"]
    argv = ["-e", "group", "-sb", str(tmp_path / "runs"), "--data_path", str(path), "--steps", "2"]
    train(parse_args([*argv, "--log_every", "2", "--generation_eval_samples", "0"]), {"group": [exp_dict]})
    assert (tmp_path / "runs" / experiment_id(exp_dict) / "checkpoint-2").is_dir()


def test_a_data_set_with_a_list_of_questions_goes_all_the_way(tmp_path, preprocess):
    squad = {
        "data": [
            {"title": f"T{i}", "paragraphs": [{"context": f"c{i}", "qas": [{"id": f"{i}", "question": "q"}]}]}
            for i in range(10)
        ]
    }
    (tmp_path / "dev.json").write_text(json.dumps(squad))
    loaded = load_rows(preprocess(tmp_path, tmp_path / "dev.json"))
    assert loaded["val"][0]["answers"] == ["Answer not in context."]
    assert len(loaded["val"]) == 2
