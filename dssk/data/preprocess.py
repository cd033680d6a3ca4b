"""Preprocessing: from a base model and raw rows to a finished store, which an interrupted run goes on with."""

import argparse
import contextlib
from pathlib import Path

import torch
from huggingface_hub import get_token
from transformers import GPTBigCodeConfig

from dssk import prompts
from dssk.data import plan as planning
from dssk.data import sources
from dssk.data.encode import Job, encode_shards
from dssk.errors import DsskError
from dssk.inference.base import load_base_config
from dssk.inference.fingerprint import model_fingerprint, tokenizer_hash
from dssk.inference.tokenizer import load_tokenizer
from dssk.store import format as store
from dssk.utils import files, ranks
from dssk.utils.console import quiet_libraries

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def preprocess(args: argparse.Namespace) -> None:
    """Do what the flags of `dssk preproc` say, as one process or as a rank of torchrun's."""
    quiet_libraries()
    with ranks.join() as team, contextlib.ExitStack() as locks:
        job = team.from_first(lambda: prepare(args, locks, team))
        if job is None:
            return
        encode_shards(job, team, args.num_proc)
        team.wait()
        if team.rank == 0:
            _report(job.folder, _finish(job))


# --- before anything is encoded ---------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, locks: contextlib.ExitStack, team: ranks.Ranks) -> Job | None:
    """Check everything, lock the folder, and plan what is to be encoded; None if it all exists."""
    config = _check_model(args)
    _check_devices(args, team)
    source = sources.Source(
        dataset=args.dataset,
        revision=args.dataset_revision,
        split=args.split,
        val_dataset=args.val_dataset,
        val_fraction=args.val_fraction,
        max_examples=args.max_examples,
        seed=args.seed,
    )
    settings = _settings(args, config, source)
    folder = args.data_cache_path / "processed_data" / Path(args.embedding_model).name
    staging = folder / planning.STAGING
    if staging.exists() or not _is_complete(folder, settings):  # a complete one may lie on a read-only disk
        files.make_folder(folder.parent)
        locks.enter_context(store.lock(folder))
    if _is_complete(folder, settings):
        files.remove(staging)
        print(f"Encoded contexts found in {folder}: used again.")
        return None
    plan = _resume(folder, settings) or _start(folder, settings, source, args)
    job = Job(
        folder=folder,
        plan=plan,
        model_path=args.embedding_model,
        revision=args.revision,
        model_dtype=_model_dtype(args, config),
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
    )
    job.open_folder()
    return job


def _check_model(args: argparse.Namespace) -> GPTBigCodeConfig:
    try:
        config = load_base_config(args.embedding_model, args.revision)
    except DsskError as error:
        if Path(args.embedding_model).exists() or get_token():
            raise
        raise DsskError(
            f"{error} (a gated or private model on the Hub needs `hf auth login` first)"
        ) from error
    if args.maximum_input_length > config.n_positions:
        raise DsskError(
            f"--maximum_input_length {args.maximum_input_length} is more than the {config.n_positions} positions of "
            f"{args.embedding_model}: lower it"
        )
    return config


def _check_devices(args: argparse.Namespace, team: ranks.Ranks) -> None:
    if team.size > 1 and args.num_proc > 1:
        print(f"Started by torchrun as {team.size} processes: --num_proc is not used.")
    num_gpus = torch.cuda.device_count()
    if num_gpus and team.size == 1 and args.num_proc > num_gpus:
        raise DsskError(f"--num_proc {args.num_proc} is more than the {num_gpus} visible GPUs: lower it")


def _settings(args: argparse.Namespace, config: GPTBigCodeConfig, source: sources.Source) -> store.Settings:
    tokenizer = load_tokenizer(args.embedding_model, args.revision)
    return store.Settings(
        model_id=args.embedding_model,
        model_revision=getattr(config, "_commit_hash", None),
        model_fingerprint=model_fingerprint(args.embedding_model, config, args.revision),
        tokenizer_hash=tokenizer_hash(tokenizer),
        hidden_size=config.n_embd,
        model_dtype=str(_model_dtype(args, config)).removeprefix("torch."),
        storage_dtype=None if args.text_only else args.storage_dtype,
        template_version=prompts.TEMPLATE_VERSION,
        maximum_input_length=args.maximum_input_length,
        shard_rows=args.shard_rows,
        source=source.describe(),
    )


def _model_dtype(args: argparse.Namespace, config: GPTBigCodeConfig) -> torch.dtype:
    return (config.dtype or torch.float32) if args.dtype == "auto" else _DTYPES[args.dtype]


def _is_complete(folder: Path, settings: store.Settings) -> bool:
    if not (folder / store.MANIFEST).exists():
        return False
    manifest = store.load_manifest(folder)
    _require_same(folder, manifest.settings, settings)
    store.check_sizes(folder, manifest)
    return True


def _resume(folder: Path, settings: store.Settings) -> planning.Plan | None:
    plan = planning.load_plan(folder)
    if plan:
        _require_same(folder, plan.settings, settings)
        files.remove_temps(folder)
        print(f"Going on in {folder}.")
    return plan


def _require_same(folder: Path, found: store.Settings, wanted: store.Settings) -> None:
    """Raise `DsskError` naming the settings in which a folder differs from what is wanted."""
    old, new = _comparable(found), _comparable(wanted)
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differ:
        changes = ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in differ)
        raise DsskError(
            f"{folder} was made with {changes}: repeat those settings, or choose another --data_cache_path"
        )


def _comparable(settings: store.Settings) -> dict[str, object]:
    """The settings by name, without those that say where the model and the rows were found."""
    entries = settings.model_dump()
    entries |= entries.pop("source")
    return {name: value for name, value in entries.items() if name not in ("model_id", *sources.COMMITS)}


def _start(
    folder: Path, settings: store.Settings, source: sources.Source, args: argparse.Namespace
) -> planning.Plan:
    """Read the source and plan the store."""
    staging = folder / planning.STAGING
    files.remove(staging)
    files.make_folder(staging)
    files.remove_temps(folder)
    rows = source.open()
    settings = settings.model_copy(update={"source": settings.source | source.commits()})
    tally = planning.Tally(args.skip_bad_rows)
    staged = {split: staging / f"{split}.arrow" for split in rows}
    for split, path in staged.items():
        planning.stage_rows(path, rows[split], args.max_examples, tally)
    tally.check(args.dataset)
    tokenizer = load_tokenizer(args.embedding_model, args.revision)
    return planning.make_plan(folder, settings, tokenizer, staged, args.val_fraction, tally)


# --- after everything is encoded --------------------------------------------------------------------------------


def _finish(job: Job) -> store.Manifest:
    manifest = store.finish(job.folder, job.plan.settings, job.plan.counts, job.shard_names())
    files.remove(job.folder / planning.STAGING)
    return manifest


def _report(folder: Path, manifest: store.Manifest) -> None:
    counts = manifest.counts
    print(
        f"{counts.read} rows read, {sum(counts.rows.values())} kept ({planning.describe(counts.rows)}); "
        f"dropped: {planning.describe(counts.dropped)}; malformed: {len(counts.bad_rows)}"
    )
    print(
        f"{counts.contexts} contexts, {counts.tokens} tokens, {counts.truncated} truncated. Written to {folder}"
    )
