"""Preprocessing: from a base model and raw rows to a finished store, which an interrupted run goes on with."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import get_token
from transformers import PreTrainedConfig

from dssk.data import plan as planning
from dssk.data import sources
from dssk.data.encode import Job, encode_shards
from dssk.errors import DsskError, short
from dssk.inference.fingerprint import is_model
from dssk.inference.loading import load_base_config
from dssk.inference.passages import Splitter
from dssk.inference.rounding import StorageDtype
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.layers import layers_name, named_layers
from dssk.models.shapes import window
from dssk.store.dataset import finish
from dssk.store.encoder import describe_encoding
from dssk.store.manifest import MANIFEST, Manifest, Settings
from dssk.store.opening import check_sizes, load_manifest
from dssk.utils import files, ranks
from dssk.utils.console import quiet_libraries

PASSAGES = "passages"  # in the settings: how contexts were divided
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The flags of `dssk preproc`, where their meanings and defaults are said."""

    embedding_model: str
    revision: str | None
    dtype: str
    dataset: str
    dataset_revision: str | None
    split: str | None
    val_dataset: str | None
    val_fraction: float
    max_examples: int | None
    columns: Mapping[str, str]
    skip_bad_rows: int
    seed: int
    maximum_input_length: int
    passage_tokens: int | None
    overlap: int
    repeat_title: bool
    truncate: bool
    whole_pages: bool
    batch_size: int
    batch_tokens: int
    num_proc: int
    data_cache_path: Path
    storage_dtype: StorageDtype
    encode_layer: str
    text_only: bool
    shard_rows: int
    makers: Mapping[str, sources.Maker] = field(default_factory=dict)
    """Data sets that are made on the spot, by name."""

    def source(self) -> sources.Source:
        return sources.Source(
            dataset=self.dataset,
            revision=self.dataset_revision,
            split=self.split,
            val_dataset=self.val_dataset,
            val_fraction=self.val_fraction,
            max_examples=self.max_examples,
            columns=self.columns,
            seed=self.seed,
            makers=self.makers,
        )

    def splitter(self) -> Splitter | None:
        """The splitter of long contexts; None to cut them off."""
        if self.truncate:
            if self.passage_tokens or self.overlap or self.repeat_title or self.whole_pages:
                raise DsskError(
                    "--truncate leaves one passage of a context: leave out --passage_tokens, --overlap, --repeat_title "
                    "and --whole_pages"
                )
            return None
        tokens = self.passage_tokens or self.maximum_input_length
        if tokens > self.maximum_input_length:
            raise DsskError(
                f"--passage_tokens {tokens} is more than --maximum_input_length {self.maximum_input_length}: lower it"
            )
        return Splitter(tokens, self.overlap, self.repeat_title)

    def passages(self) -> dict[str, str | int | float | None]:
        """The settings of passages, for comparing two runs; empty where contexts are cut off, as in 0.1."""
        splitter = self.splitter()
        if splitter is None:
            return {}
        parts = [f"{splitter.tokens} tokens", *([f"overlap {splitter.overlap}"] if splitter.overlap else [])]
        parts += [name for name in ("repeat_title", "whole_pages") if getattr(self, name)]
        return {PASSAGES: ", ".join(parts)}

    def folder(self) -> Path:
        """The folder of the store, which has the name of the model."""
        model = self.embedding_model
        name = os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model.rpartition("/")[2]
        if name in ("", ".", ".."):
            raise DsskError(
                f"--embedding_model {short(model, 100)} has no name of its own to call the result by: give the "
                "model's folder, or its name on the Hub"
            )
        return self.data_cache_path / "processed_data" / name


def preprocess(request: Request) -> None:
    """Do what is asked for, as one process or as a rank of torchrun's."""
    quiet_libraries()
    with ranks.join() as team, contextlib.ExitStack() as locks:
        job = team.from_first(lambda: prepare(request, locks, team))
        if job is None:
            return
        encode_shards(job, team, request.num_proc)
        team.wait()
        if team.rank == 0:
            _report(job.folder, _finish(job))


# --- before anything is encoded ---------------------------------------------------------------------------------


def prepare(request: Request, locks: contextlib.ExitStack, team: ranks.Ranks) -> Job | None:
    """Check everything, lock the folder, and plan what is to be encoded; None if it all exists."""
    folder = request.folder()
    config = _check_model(request)
    _check_devices(request, team)
    source = request.source()
    settings = _settings(request, config, source)
    staging = folder / planning.STAGING
    # A complete one may lie on a read-only disk.
    if staging.exists() or not _is_complete(folder, settings, request, config):
        locks.enter_context(files.only_writer(folder))
    if _is_complete(folder, settings, request, config):
        files.remove(staging)
        print(f"Encoded contexts found in {folder}: used again.")
        return None
    plan = _resume(folder, settings) or _start(folder, settings, source, request)
    job = Job(
        folder=folder,
        plan=plan,
        model_path=request.embedding_model,
        revision=request.revision,
        model_dtype=_model_dtype(request, config),
        batch_size=request.batch_size,
        batch_tokens=request.batch_tokens,
    )
    job.open_folder()
    return job


def _check_model(request: Request) -> PreTrainedConfig:
    try:
        config = load_base_config(request.embedding_model, request.revision)
    except DsskError as error:
        if os.path.exists(request.embedding_model) or get_token():
            raise
        raise DsskError(
            f"{error} (a gated or private model on the Hub needs `hf auth login` first)"
        ) from error
    if request.maximum_input_length > window(config):
        raise DsskError(
            f"--maximum_input_length {request.maximum_input_length} is more than the {window(config)} positions of "
            f"{request.embedding_model}: lower it"
        )
    return config


def _check_devices(request: Request, team: ranks.Ranks) -> None:
    if team.size > 1 and request.num_proc > 1:
        print(f"Started by torchrun as {team.size} processes: --num_proc is not used.")
    num_gpus = torch.cuda.device_count()
    if num_gpus and team.size == 1 and request.num_proc > num_gpus:
        raise DsskError(f"--num_proc {request.num_proc} is more than the {num_gpus} visible GPUs: lower it")


def _settings(request: Request, config: PreTrainedConfig, source: sources.Source) -> Settings:
    encoding = describe_encoding(
        request.embedding_model,
        request.revision,
        None if request.text_only else request.storage_dtype,
        request.maximum_input_length,
        _encode_layer(request, config),
    )
    encoding["model_dtype"] = str(_model_dtype(request, config)).removeprefix("torch.")
    source_facts = source.describe() | request.passages()
    return Settings(**encoding, shard_rows=request.shard_rows, source=source_facts)


def _encode_layer(request: Request, config: PreTrainedConfig) -> str:
    """The layers that are asked for, by number: `10+18` for two."""
    num_layers = config.get_text_config().num_hidden_layers
    try:
        return layers_name(named_layers(request.encode_layer, num_layers), num_layers)
    except ValueError as error:
        raise DsskError(f"--encode_layer {request.encode_layer}: {error}") from error


def _model_dtype(request: Request, config: PreTrainedConfig) -> torch.dtype:
    return (config.dtype or torch.float32) if request.dtype == "auto" else _DTYPES[request.dtype]


def _is_complete(folder: Path, settings: Settings, request: Request, config: PreTrainedConfig) -> bool:
    if not (folder / MANIFEST).exists():
        return False
    manifest = load_manifest(folder)
    found = manifest.settings
    if is_model(found.model_fingerprint, request.embedding_model, config, request.revision):
        # the same base, in whichever version's words
        found = found.model_copy(update={"model_fingerprint": settings.model_fingerprint})
    whole: dict[str, str | int | float | None] = {PASSAGES: f"{found.maximum_input_length} tokens"}
    if PASSAGES not in found.source and not manifest.counts.truncated and request.passages() in ({}, whole):
        # Nothing was cut anyway.
        found = found.model_copy(update={"source": found.source | request.passages()})
    _require_same(folder, found, settings)
    check_sizes(folder, manifest)
    return True


def _resume(folder: Path, settings: Settings) -> planning.Plan | None:
    plan = planning.load_plan(folder)
    if plan:
        _require_same(folder, plan.settings, settings)
        files.remove_temps(folder)
        print(f"Going on in {folder}.")
    return plan


def _require_same(folder: Path, found: Settings, wanted: Settings) -> None:
    """Raise `DsskError` naming the settings in which a folder differs from what is wanted."""
    old, new = _comparable(found), _comparable(wanted)
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differ:
        changes = ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in differ)
        raise DsskError(
            f"{folder} was made with {changes}: repeat those settings, or choose another --data_cache_path"
        )


def _comparable(settings: Settings) -> dict[str, object]:
    """The settings by name, without those that say where the model and the rows were found."""
    entries = settings.model_dump()
    entries |= entries.pop("source")
    return {name: value for name, value in entries.items() if name not in ("model_id", *sources.COMMITS)}


def _start(folder: Path, settings: Settings, source: sources.Source, request: Request) -> planning.Plan:
    """Read the source and plan the store."""
    staging = folder / planning.STAGING
    files.remove(staging)
    files.make_folder(staging)
    files.remove_temps(folder)
    rows = source.open()
    settings = settings.model_copy(update={"source": settings.source | source.commits()})
    tally = planning.Tally(request.skip_bad_rows)
    staged = {split: staging / f"{split}.arrow" for split in rows}
    for split, path in staged.items():
        planning.stage_rows(path, rows[split], request.max_examples, tally, request.whole_pages)
    tally.check(request.dataset)
    tokenizer = load_tokenizer(request.embedding_model, request.revision)
    return planning.make_plan(
        folder, settings, tokenizer, staged, request.val_fraction, tally, request.splitter()
    )


# --- after everything is encoded --------------------------------------------------------------------------------


def _finish(job: Job) -> Manifest:
    manifest = finish(job.folder, job.plan.settings, job.plan.counts, job.shard_names(), job.plan.tables)
    files.remove(job.folder / planning.STAGING)
    return manifest


def _report(folder: Path, manifest: Manifest) -> None:
    counts = manifest.counts
    lost = f" ({counts.lost_tokens} tokens lost)" if counts.lost_tokens else ""
    print(
        f"{counts.read} rows read, {sum(counts.rows.values())} kept ({planning.describe(counts.rows)}); "
        f"dropped: {planning.describe(counts.dropped)}; malformed: {len(counts.bad_rows)}"
    )
    print(
        f"{counts.contexts} contexts, {counts.tokens} tokens, {counts.truncated} truncated{lost}. Written to {folder}"
    )
