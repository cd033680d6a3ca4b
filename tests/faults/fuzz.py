"""Mutated inputs of every kind through the real commands: `python -m tests.faults.fuzz --count 10_000 --seed 0`.

Each input must end within a minute, with exit code 0 and right results or with a code from 2 to 6 and one line that
says what is wrong; nothing beside the folders that the command was given may change. Every input depends on the seed
and its number alone: `--first N --count 1` tries number N again and keeps what it read.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from dssk.checkpoint import MANIFEST
from tests.data.layouts import LAYOUTS, Annotation, Page, wrap
from tests.faults import campaign, world
from tests.faults.campaign import Campaign, Case
from tests.faults.mutations import (
    MARKUP,
    VALUES,
    dumps,
    mutate_bytes,
    mutate_json_file,
    mutate_lines,
    mutate_value,
    reseal_checkpoint,
    reseal_store,
)
from tests.faults.processes import Done


class Row(NamedTuple):
    """What preprocessing makes of a raw row."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


# --- raw data -----------------------------------------------------------------------------------------------------


def mills(count: int = 6) -> list[dict]:
    return [
        {"id": f"r{i}", "context": f"Mill {i} was built in 17{i:02} by Ann {i} .", "question": f"who built mill {i}",
         "answers": [f"Ann {i}", f"17{i:02}"]}
        for i in range(count)
    ]  # fmt: skip


def schema_rows(schema: str) -> list[dict]:
    """The mills in one of the schemas."""
    rows = mills()
    if schema == "plain":
        return [{**{k: r[k] for k in ("id", "context", "question")}, "answer": r["answers"][0]} for r in rows]
    if schema == "squad":
        return [
            {**r, "title": "Mills", "answers": {"text": r["answers"], "answer_start": [0, 0]}} for r in rows
        ]
    if schema == "answers":
        return rows
    pages = [Page(str(i), f"Mill {i}", r["question"], f"<P> {r['context']} </P>",
                  [Annotation(f"<P> {r['context']} </P>", r["answers"])]) for i, r in enumerate(rows)]  # fmt: skip
    return [wrap(schema, page) for page in pages]


SCHEMAS = ("plain", "squad", "answers", *LAYOUTS)
CONTAINERS = (
    "jsonl",
    "json",
    "data.json",
    "jsonl.gz",
    "jsonl.zst",
    "csv",
    "tsv",
    "csv.gz",
    "parquet",
    "arrow",
)


def encode_rows(container: str, rows: list[Any]) -> bytes:
    """Rows as the content of a file. Raises for rows that it cannot hold."""
    if container in ("parquet", "arrow"):
        table, stream = pa.Table.from_pylist(rows), io.BytesIO()
        if container == "parquet":
            pa.parquet.write_table(table, stream)
        else:
            with pa.ipc.new_file(stream, table.schema) as writer:
                writer.write_table(table)
        return stream.getvalue()
    if container.startswith(("csv", "tsv")):
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(
            text, names, delimiter="," if container[0] == "c" else "\t", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    elif container == "data.json":
        data = dumps({"data": rows})
    elif container == "json":
        data = dumps(rows, 1)
    else:
        data = b"".join(dumps(row) + b"\n" for row in rows)
    if container.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    return pa.compress(data, "zstd", asbytes=True) if container.endswith(".zst") else data


def rows_file(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """One row, or some bytes, of raw data."""
    container, schema = rng.choice(CONTAINERS), rng.choice(SCHEMAS)
    if container.startswith(("csv", "tsv")):
        schema = "plain"
    campaign.copy(here, ["base"])
    rows: list[Any] = schema_rows(schema)
    by_value, touched = rng.random() < 0.6, rng.randrange(len(rows))
    mutated = list(rows)
    if by_value:
        mutated[touched] = mutate_value(rng, rows[touched])
    try:
        data = encode_rows(container, mutated)
    except Exception:  # noqa: BLE001 - whatever the library has against such a row
        by_value, data = False, encode_rows(container, rows)
    if not by_value:
        data = mutate_bytes(rng, data)
    file = here / f"raw.{container}"
    file.write_bytes(data)
    argv = ["preproc", "--embedding_model", "base", "--dataset", file.name, "--data_cache_path", "out"]
    argv += ["--maximum_input_length", "96", "--val_fraction", "0.3"]
    argv += ["--skip_bad_rows", "1"] if rng.random() < 0.3 else []
    argv += ["--text_only"] if rng.random() < 0.8 else []
    whole = {r["question"]: (r["context"].removesuffix(" ."), set(r["answers"])) for r in mills()}

    def check(done: Done) -> str | None:
        """The rows that were not touched are as they were; one that was has texts of its own alone."""
        made = list(read_store(here / "out/processed_data/base"))
        row = mutated[touched]
        texts = set(_texts(row)) if by_value else set()
        texts |= {str(cell) for cell in row.values()} if isinstance(row, dict) else set()  # of a CSV
        for row in made:
            context, answers = whole.get(row.question, ("", set()))
            sound = row.context.startswith(context) and set(row.answers) <= answers
            if (
                by_value
                and not sound
                and not set(row.answers) <= texts | {"Yes", "No", "Answer not in context."}
            ):
                return f"made up {row}"
        if by_value and len({r.question for r in made} & whole.keys()) < len(whole) - 1:
            return f"lost rows that nobody touched: {sorted(whole.keys() - {r.question for r in made})}"
        return None

    return Case(argv, ["out"], check)


def read_store(folder: Path) -> Iterable[Row]:
    """The rows of a store, read without the package."""
    for split in ("train", "val"):
        for file in sorted(folder.glob(f"{split}/*.arrow")):
            with pa.memory_map(str(file)) as source:
                for row in pa.ipc.open_stream(source).read_all().to_pylist():
                    yield Row(row["id"], row["question"], row["context"], tuple(row["answers"]))


def _texts(value: Any) -> Iterable[str]:
    """Every text in a JSON value; and numbers as texts, which those of a CSV are."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts(entry)
        if isinstance(value, dict) and "document_text" in value or isinstance(value, list):
            yield from _joined(value)
    else:
        yield str(value)


def _joined(value: Any) -> Iterable[str]:
    """Every run of words of a tokenized page, which an answer may be."""
    words = value["document_text"].split(" ") if isinstance(value, dict) else value
    words = [w.get("token") if isinstance(w, dict) else w for w in words if w is not None]
    words = [w for w in words if isinstance(w, str)][:80]
    plain = [w for w in words if not w.startswith("<")]
    for start in range(len(plain)):
        for end in range(start + 1, len(plain) + 1):
            yield " ".join(plain[start:end])


def contexts_file(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """What a library is filled from, what is asked, what is read at once."""
    campaign.copy(here, ["base", "library", "fused", "one.txt", "more.jsonl", "questions.jsonl"])
    which = rng.randrange(4)
    if which == 0:
        container = rng.choice(CONTAINERS)
        rows: list[Any] = [{"id": f"n{i}", "title": "T", "text": f"Mill {i} stands."} for i in range(3)]
        rows[1] = mutate_value(rng, rows[1])
        try:
            data = encode_rows(container, rows)
        except Exception:  # noqa: BLE001
            container, data = "jsonl", b"".join(dumps(row) + b"\n" for row in rows)
        (here / f"new.{container}").write_bytes(mutate_bytes(rng, data) if rng.random() < 0.4 else data)
        return Case(["library", "library", "add", f"new.{container}"], ["library"])
    if which == 1:
        (here / "one.txt").write_bytes(mutate_bytes(rng, (here / "one.txt").read_bytes()))
        return Case(["answer", "--checkpoint", "fused", "--context", "one.txt", *world.QUESTION], [])
    if rng.random() < 0.5:
        mutate_lines(rng, here / "questions.jsonl")
    else:
        file = here / "questions.jsonl"
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    argv = ["answer", "--checkpoint", "fused", "--library", "library", "--input", "questions.jsonl"]
    return Case([*argv, "--output", "answers.jsonl", "--max_new_tokens", "2"], ["answers.jsonl"])


# --- what people configure ----------------------------------------------------------------------------------------


def experiment(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """An experiment: its file, or --set."""
    campaign.copy(here, ["base", world.STORE, "exps.py"])
    scope: dict[str, Any] = {}
    exec((here / "exps.py").read_text(), scope)  # noqa: S102 - our own file
    exp_dict = scope["EXP_GROUPS"][world.EXPERIMENT][0]
    key = rng.choice(list(exp_dict))
    value = rng.choice([v for v in VALUES if not isinstance(v, str) or len(v) < 1000])
    argv = [
        "train",
        "-e",
        world.EXPERIMENT,
        "--exp_configs",
        "exps.py",
        "-sb",
        "runs",
        "--data_path",
        world.STORE,
    ]
    argv += ["--steps", "1", "--generation_eval_samples", "0", "--save_fused", "never"]
    argv += ["--dry_run"] if rng.random() < 0.85 else []
    which = rng.randrange(4)
    if which == 0 and json.dumps(value).isascii():
        text = value if isinstance(value, str) else json.dumps(value)
        argv += ["--set", f"{key}={text}".replace("\0", " ").encode("utf-8", "replace").decode()]
        return Case(argv, ["runs"])
    if which == 1:
        file = here / "exps.py"
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        return Case(argv, ["runs", "__pycache__"])
    exp_dict = mutate_value(rng, exp_dict) if which == 2 else exp_dict | {key: value}
    names = {"nan": float("nan"), "inf": float("inf")}
    head = f"{', '.join(names)} = {', '.join(f'float({n!r})' for n in names)}\n"
    text = f"{head}EXP_GROUPS = {{{world.EXPERIMENT!r}: [{exp_dict!r}]}}\n".replace("@deep@", "deep")
    (here / "exps.py").write_text(text, errors="backslashreplace")
    return Case(
        argv, ["runs", "__pycache__"], must_fail=which == 3 and key == "seed" and value in (-1, None, [], {})
    )


def flags(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """The words of a command line."""
    run = f"runs/{campaign.world.run}"
    lines = [
        ["verify", world.STORE],
        ["inspect", world.STORE, "--plot", "lengths.png"],
        ["evaluate", "--checkpoint", f"{run}/final", "--data_path", world.STORE, *world.SHORT, "--max_questions", "1"],
        ["answer", "--checkpoint", "fused", "--context", "one.txt", *world.QUESTION, "--batch_size", "2"],
        world.LIBRARY_ANSWER + ["--k", "2"],
        ["library", "library", "add", "--storage_dtype", "bf16", "one.txt"],
        ["library", "library", "search", "mill", "--k", "2"],
        ["library", "library", "remove", "m4"],
        ["jobs", "runs"],
        ["export", "--checkpoint", run, "--output", "new"],
        ["publish", "--checkpoint", run, "--output", "new", "--what", "cross_attention", "--private", "true"],
        ["restore", "--checkpoint", "fused", "--context", "one.txt", "--output", "new", "--dtype", "bf16"],
        [*world.PREPROC, "--text_only", "--seed", "1", "--batch_size", "2", "--num_proc", "1", "--columns", "id=id"],
        [*world.TRAIN, "--dry_run", "--save_fused", "never", "--report_to", "none", "--local_rank", "0"],
        [*world.TRAIN, "-j", "slurm", "--job_configs", "jobs.py", "--job_action", "status"],
        ["calibrate", "--base", "base", "--text", "rows.jsonl", "--output", "new", "--tokens", "200"],
        ["demo", "--checkpoint", "fused", "--port", "99999"],
        ["base", "--output", "new", "--steps", "0", "--layers", "0"],
        ["compare", "--checkpoint", "nowhere", "--data_path", world.STORE, "--output", "new"],
        ["report", "nowhere", "--samples", "x"],
    ]  # fmt: skip
    campaign.copy(
        here, ["base", "library", "fused", "runs", world.STORE, "one.txt", "rows.jsonl", "exps.py", "jobs.py"]
    )
    argv = list(rng.choice(lines))
    at, kind = rng.randrange(1, len(argv)), rng.randrange(6)
    wrong = False
    if kind == 0:
        del argv[at]
    elif kind == 1:
        argv.insert(at, argv[at])
    elif kind == 2 and argv[at].startswith("--") and len(argv[at]) > 4:
        cut = rng.randrange(3, len(argv[at]))
        argv[at], wrong = argv[at][:cut] + "_" + argv[at][cut + 1 :], argv[at][cut] != "_"
    elif kind == 3:
        argv[at:at] = [rng.choice(("--unknown", "-z", "--no", "--", "--=", "--help_"))]
    else:
        texts = [str(v) for v in VALUES if not isinstance(v, dict | list) and len(str(v)) < 4000]
        value = rng.choice(
            texts + ["1e3", "1_0", "0x10", "٣", "nan", "true", "no/such/folder", "x.py", "a,b", "a=b=c"]
        )
        argv[at] = value.replace("\0", "\x01").replace("\ud800", "\udce9").replace("@deep@", "[[[[")
    if argv[0] == "demo" and "99999" not in argv:
        argv[:] = ["demo", "--port", "99999", "--checkpoint", "fused"]  # a page that opens would never end
    return Case(argv, ["."], new_is_ok=True, must_fail=wrong)


def job_file(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """job_configs.py, with a Slurm that takes everything."""
    campaign.copy(here, ["base", world.STORE, "exps.py", "jobs.py"])
    config = {
        "partition": "p",
        "gpus": 1,
        "time": "1:00:00",
        "cpus": 2,
        "mem": "4G",
        "options": ["--exclusive"],
    }
    scheduler = rng.choice(("slurm", "slurm", "toolkit"))
    if scheduler == "toolkit":
        config = {"image": "i", "data": ["team.{user}.home:/mnt"], "resources": {"gpu": 1, "cpu": 2},
                  "environment_vars": ["A=1"], "job_spec": {"x": 1}}  # fmt: skip
    text = f"EAI_ACCOUNT_ID_TO_USER = {{'6a1b': 'ann'}}\nJOB_CONFIG = {{'default': {mutate_value(rng, config)!r}}}\n"
    text = "nan = inf = float('inf')\n" + text.replace("@deep@", "deep")
    data = text.encode(errors="backslashreplace")
    (here / "jobs.py").write_bytes(mutate_bytes(rng, data) if rng.random() < 0.3 else data)
    commands = here.parent / "commands"
    commands.mkdir()
    for name, says in (("sbatch", "echo 17"), ("squeue", "true"), ("sacct", "true"), ("scancel", "true")):
        (commands / name).write_text(f"#!/bin/sh\n{says}\n")
        (commands / name).chmod(0o755)
    argv = [*world.TRAIN, "-j", scheduler, "--job_configs", "jobs.py", "--set", f"model_path={here / 'base'}"]
    argv[argv.index("-sb") + 1] = str(here / "runs")
    argv[argv.index("--data_path") + 1] = str(here / world.STORE)
    env = {"PATH": f"{commands}:/usr/bin:/bin", "EAI_ACCOUNT_ID": "6a1b"}
    return Case(argv, ["runs", "__pycache__"], env=env)


def deepspeed_file(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """A configuration of DeepSpeed."""
    campaign.copy(here, ["base", world.STORE, "exps.py"])
    config = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_accumulation_steps": "auto",
              "train_micro_batch_size_per_gpu": "auto", "fp16": {"enabled": "auto"}}  # fmt: skip
    data = dumps(mutate_value(rng, config))
    (here / "ds.json").write_bytes(mutate_bytes(rng, data) if rng.random() < 0.4 else data)
    return Case([*world.TRAIN, "--dry_run", "--deepspeed", "ds.json"], ["runs", "__pycache__"])


# --- what commands have written -----------------------------------------------------------------------------------


def _damage(rng: random.Random, folder: Path, seal: Callable | None) -> bool:
    """One file of a folder mutated, removed, or added; whether it was sealed again as if it belonged so."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    file = rng.choice(files)
    if seal is not None and rng.random() < 0.4:
        if rng.random() < 0.5:
            seal(folder, lambda body: mutate_value(rng, body))
            return True
        file = rng.choice([f for f in files if "manifest" not in f.name])
        if file.suffix == ".json" and rng.random() < 0.8:
            mutate_json_file(rng, file)
        else:
            file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        seal(folder)
        return True
    kind = rng.randrange(8)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.unlink()
        file.mkdir()
    elif kind == 2:
        other = rng.choice(files)
        file.write_bytes(other.read_bytes())
    elif kind == 3 and file.suffix == ".json":
        mutate_json_file(rng, file, rng.choice((None, 1, 2)))
    else:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return False


def store(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    campaign.copy(here, ["base", "data", "fused", "rows.jsonl", "exps.py"])
    sealed = _damage(rng, here / world.STORE, reseal_store)
    argv, writes, seen = rng.choice([
        (["verify", world.STORE], [], []),
        (["verify", world.STORE, "--discard"], ["data"], []),
        (["inspect", world.STORE], [], []),
        (["library", world.STORE, "list"], [], []),
        (["library", world.STORE, "search", "mill 3"], [], []),
        (["answer", "--checkpoint", "fused", "--library", world.STORE, *world.QUESTION], [], []),
        (world.PREPROC, ["data"], []),
        (["evaluate", "--checkpoint", "fused", "--data_path", world.STORE, *world.SHORT, "--controls",
          "with_context", "--output", "s/scores.json"], ["s"], ["s/scores.json"]),
        ([*world.TRAIN, "--steps", "1", "--save_fused", "never"], ["runs", "__pycache__"], []),
    ])  # fmt: skip
    if argv[0] == "verify" and not sealed:
        return Case(argv, writes)
    return Case(argv, writes, seen=None if sealed or argv[0] == "preproc" else seen)


def library(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    campaign.copy(here, ["base", "library", "fused", "one.txt", "two.txt", "more.jsonl"])
    sealed = _damage(rng, here / "library", reseal_store)
    listed = [("library", "library", "list")]
    argv, writes, seen = rng.choice([
        (["library", "library", "verify"], [], []),
        (["library", "library", "list"], [], []),
        (["library", "library", "search", "mill 3"], ["library"], []),
        (["library", "library", "add", "two.txt"], ["library"], listed),
        (["library", "library", "remove", "m4"], ["library"], listed),
        (["inspect", "library"], [], []),
        (["verify", "library"], [], []),
        (world.LIBRARY_ANSWER, ["library"], []),
    ])  # fmt: skip
    return Case(argv, writes, seen=None if sealed else seen)


def model(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """A base, a checkpoint, or a fused model."""
    run = f"runs/{campaign.world.run}"
    damaged = rng.choice(("base", f"{run}/checkpoint-2", "fused"))
    campaign.copy(
        here, ["base", "library", "fused", run, "one.txt", "more.jsonl", world.STORE, "exps.py", "rows.jsonl"]
    )
    sealed = _damage(rng, here / damaged, None if damaged == "base" else reseal_checkpoint)
    reading = damaged if damaged == "fused" else f"{run}/checkpoint-2"
    export = ["export", "--checkpoint", reading, "--output", "new"]
    argv, writes, seen = rng.choice([
        (["answer", "--checkpoint", reading, "--context", "one.txt", *world.QUESTION], [], []),
        (["answer", "--checkpoint", reading, "--context", "one.txt", *world.QUESTION], [], []),
        (["answer", "--checkpoint", reading, "--library", "library", *world.QUESTION], ["library"], []),
        (export, ["new"], ["new/model.safetensors"]),
        (["publish", "--checkpoint", reading, "--output", "new"], ["new"], ["new/model.safetensors"]),
        (["evaluate", "--checkpoint", reading, "--data_path", world.STORE, *world.SHORT, "--controls",
          "with_context", "--output", "s/scores.json"], ["s"], ["s/scores.json"]),
        ([*world.TRAIN, "--steps", "3", "--save_fused", "never"], ["runs", "__pycache__"],
         [f"{run}/checkpoint-3/model.safetensors"]),
    ])  # fmt: skip
    if damaged == "base" and rng.random() < 0.4:  # that nothing has known before: any base may be given
        new = [
            ["library", "fresh", "add", "--checkpoint", "base", "one.txt"],
            ["preproc", "--embedding_model", "base", "--dataset", "rows.jsonl", "--data_cache_path", "out",
             "--maximum_input_length", "64"],
            [*world.TRAIN, "--dry_run"],
            ["calibrate", "--base", "base", "--text", "rows.jsonl", "--output", "new"],
        ]  # fmt: skip
        return Case(rng.choice(new), ["fresh", "out", "runs", "new", "__pycache__"])
    # Without its manifest a fused model is what `save_pretrained` writes: whole, but scores cannot say of which step.
    plain = not (here / reading / MANIFEST).exists()
    return Case(argv, writes, seen=None if sealed or plain else seen)


def run_files(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    """Scores, predictions, metrics, and what else lies in a run or a comparison, for the report and the tables."""
    run = f"runs/{campaign.world.run}"
    campaign.copy(here, ["base", run, world.STORE, "compare", "exps.py"])
    names = ["scores.json", "predictions.jsonl", "metrics.jsonl", "status.json", "exp_dict.json"]
    file = rng.choice([*(here / run / name for name in names), here / "compare" / "table.json",
                       here / "compare" / "cost.json"])  # fmt: skip
    for name, value in (("wandb.json", {"id": "a", "entity": "e", "project": "p", "name": "n"}),
                        ("job_dict.json", {"job_id": "7", "command": "c", "job_scheduler": "slurm"})):  # fmt: skip
        if rng.random() < 0.2:
            file = here / run / name
            file.write_bytes(dumps(value))
    if rng.random() < 0.7:
        (mutate_lines if file.suffix == ".jsonl" else mutate_json_file)(rng, file)
    else:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    argv = rng.choice([
        ["jobs", "runs"],
        ["jobs", "runs"],
        ["publish", "--checkpoint", run, "--output", "new"],
        [*world.TRAIN, "--steps", "2"],
        ["report", run, "--samples", "2", *(["--compare", "compare"] if "compare" in str(file) else [])],
    ])  # fmt: skip

    def check(done: Done) -> str | None:
        pages = [*here.glob(f"{run}/report.html"), *here.glob("new/README.md")]
        return next(
            (f"{p} holds markup of the data" for p in pages if MARKUP in p.read_text(errors="replace")), None
        )

    return Case(argv, ["runs", "new", "__pycache__"], check)


KINDS: dict[Callable[[Campaign, random.Random, Path], Case], int] = {
    rows_file: 30,
    contexts_file: 8,
    experiment: 12,
    flags: 16,
    job_file: 4,
    deepspeed_file: 2,
    store: 10,
    library: 8,
    model: 8,
    run_files: 4,
}


def make_case(campaign: Campaign, rng: random.Random, here: Path) -> Case:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if campaign.only:
        kind = next(k for k in KINDS if k.__name__ == campaign.only)
    return kind(campaign, rng, here)._replace(kind=kind.__name__)


def main() -> None:
    campaign.main(__doc__ or "", make_case, "inputs", [kind.__name__ for kind in KINDS])


if __name__ == "__main__":
    main()
