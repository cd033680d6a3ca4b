"""Encode the contexts of a question-answering data set once, with the frozen model that will attend to them.

    python dssk/data/preproc_nq.py --embedding_model MODEL --maximum_input_length 4096 --batch_size 2 --num_proc 2 \\
        --data_cache_path DIR

writes DIR/processed_data/<name of MODEL>, which training reads. A finished folder is used again; an interrupted
one is continued by the same command.
"""

import os
import sys

if __name__ == "__main__":
    # Run as a file, this folder would come first on the path, and its `inspect` would hide Python's own.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import argparse
from pathlib import Path

import torch
from transformers import GPTBigCodeConfig, PreTrainedTokenizerBase

from dssk import files, prompts
from dssk.data import plan as planning
from dssk.data import sources, store
from dssk.data.encode import Job, encode_shards
from dssk.data.fingerprint import model_fingerprint, tokenizer_hash
from dssk.errors import DsskError, run
from dssk.flags import Parser, bool_flag, optional_str, positive_int
from dssk.models.base import load_base_config
from dssk.tokenizer import load_tokenizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--embedding_model",
        required=True,
        help="GPTBigCode model that encodes: a folder, or a name on the Hub",
    )
    add(
        "--data_cache_path",
        type=Path,
        required=True,
        help="results go to processed_data/<model name> in this folder",
    )
    add("--maximum_input_length", type=positive_int, default=4096, help="tokens that a context is cut to")
    add("--batch_size", type=positive_int, default=2, help="most contexts encoded at a time, on each device")
    add(
        "--batch_tokens",
        type=positive_int,
        default=16384,
        help="most tokens encoded at a time, padding included",
    )
    add(
        "--num_proc",
        type=positive_int,
        default=1,
        help="processes: one for each GPU, or CPU core if there is none",
    )
    add("--dataset", default=sources.NATURAL_QUESTIONS, help="a name on the Hub, a file, a folder, or `toy`")
    add("--val_dataset", type=optional_str, help="where the val rows come from, if not from --dataset")
    add("--split", type=optional_str, help="read only this split of --dataset")
    add(
        "--val_fraction",
        type=_fraction,
        default=0.05,
        help="share of rows for val if the data set has no such split",
    )
    add("--max_examples", type=positive_int, help="most usable rows to read of each split")
    add("--skip_bad_rows", type=int, default=0, help="malformed rows to leave out before giving up")
    add("--seed", type=int, default=0, help="of the toy data set")
    add("--revision", type=optional_str, help="branch, tag or commit of a model on the Hub")
    add("--dataset_revision", type=optional_str, help="branch, tag or commit of a data set on the Hub")
    add(
        "--dtype",
        choices=("auto", *_DTYPES),
        default="auto",
        help="type to compute in; auto: the model's own",
    )
    add(
        "--storage_dtype",
        choices=tuple(store.TORCH_DTYPES),
        default="bf16",
        help="type that encodings are stored in",
    )
    add(
        "--text_only",
        type=bool_flag,
        nargs="?",
        const=True,
        default=False,
        help="store no encodings (encode_online)",
    )
    add(
        "--shard_rows",
        type=positive_int,
        default=256,
        help="contexts in a file; what a kill can cost each process",
    )
    return parser


def main(argv: list[str] | None = None) -> int | None:
    args = build_parser().parse_args(argv)
    config = _check_model(args)
    tokenizer = load_tokenizer(args.embedding_model, args.revision)
    data = DataFiles(args)
    settings = _settings(args, config, tokenizer, data)
    folder = args.data_cache_path / "processed_data" / Path(args.embedding_model).name
    files.make_folder(folder.parent)
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        if _is_complete(folder, settings):
            print(f"Encoded contexts found in {folder}: used again.")
            return None
        plan = _resume(folder, settings) or _start(folder, settings, tokenizer, data, args)
        if not args.text_only:
            _encode(folder, plan, args, config)
        manifest = store.finish(folder, settings, plan.counts)
        files.remove(folder / planning.STAGING)
    _report(folder, manifest)
    return None


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number between 0 and 1")
    return value


def _check_model(args: argparse.Namespace) -> GPTBigCodeConfig:
    config = load_base_config(args.embedding_model, args.revision)
    if args.maximum_input_length > config.n_positions:
        raise DsskError(
            f"--maximum_input_length {args.maximum_input_length} is more than the {config.n_positions} positions of "
            f"{args.embedding_model}: lower it"
        )
    num_gpus = torch.cuda.device_count()
    if num_gpus and args.num_proc > num_gpus:
        raise DsskError(f"--num_proc {args.num_proc} is more than the {num_gpus} visible GPUs: lower it")
    return config


class DataFiles:
    """Where the rows come from: files by split, or the toy."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._files: dict[str, list[str]] = {}
        if args.dataset == sources.TOY:
            return
        self._files = sources.find_files(args.dataset, args.dataset_revision, args.split)
        if args.val_dataset:
            val = sources.find_files(args.val_dataset, args.dataset_revision, None)
            self._files = {
                "train": self._files.get("train") or self._files["all"],
                "val": val.get("val") or val.get("all") or val["train"],
            }
        elif "val" not in self._files and "train" in self._files:
            self._files = {"all": self._files["train"]}

    def describe(self) -> dict[str, str | int | float | None]:
        """What decides the rows, for comparing two runs."""
        args = self._args
        described = {
            name: getattr(args, name) for name in ("dataset", "val_dataset", "split", "max_examples")
        }
        if args.dataset == sources.TOY:
            described["seed"] = args.seed
        if "all" in self._files:
            described["val_fraction"] = args.val_fraction
        for split, paths in self._files.items():
            described[f"{split}_files"] = sources.fingerprint(paths)
        return described

    def rows(self, split: str):
        if self._args.dataset == sources.TOY:
            return sources.toy_rows(split, self._args.max_examples, self._args.seed)
        return sources.read_rows(self._files[split])

    @property
    def splits(self) -> list[str]:
        return list(self._files) or list(store.SPLITS)


def _settings(
    args: argparse.Namespace, config: GPTBigCodeConfig, tokenizer: PreTrainedTokenizerBase, data: DataFiles
) -> store.Settings:
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
        source=data.describe(),
    )


def _model_dtype(args: argparse.Namespace, config: GPTBigCodeConfig) -> torch.dtype:
    return (config.dtype or torch.float32) if args.dtype == "auto" else _DTYPES[args.dtype]


def _is_complete(folder: Path, settings: store.Settings) -> bool:
    if not (folder / store.MANIFEST).exists():
        return False
    manifest = store.load_manifest(folder)
    _require_same(folder, manifest.settings, settings)
    store.check_sizes(folder, manifest)
    files.remove(folder / planning.STAGING)
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
    old, new = found.model_dump(), wanted.model_dump()
    old, new = {**old, **old.pop("source")}, {**new, **new.pop("source")}
    differ = [name for name in {**old, **new} if old.get(name) != new.get(name) and name != "model_id"]
    if differ:
        changes = ", ".join(f"{name} {old.get(name)} (now {new.get(name)})" for name in differ)
        raise DsskError(
            f"{folder} was made with {changes}: repeat those settings, or choose another --data_cache_path"
        )


def _start(
    folder: Path,
    settings: store.Settings,
    tokenizer: PreTrainedTokenizerBase,
    data: DataFiles,
    args: argparse.Namespace,
) -> planning.Plan:
    """Read the source and plan the store."""
    files.remove(folder / planning.STAGING)
    files.make_folder(folder / planning.STAGING)
    files.remove_temps(folder)
    tally = planning.Tally(args.skip_bad_rows)
    staged = {split: folder / planning.STAGING / f"{split}.arrow" for split in data.splits}
    for split, path in staged.items():
        planning.stage_rows(path, data.rows(split), args.max_examples, tally)
    tally.check(args.dataset)
    return planning.make_plan(folder, settings, tokenizer, staged, args.val_fraction, tally)


def _encode(folder: Path, plan: planning.Plan, args: argparse.Namespace, config: GPTBigCodeConfig) -> None:
    job = Job(
        folder=folder,
        plan=plan,
        model_path=args.embedding_model,
        revision=args.revision,
        model_dtype=_model_dtype(args, config),
        batch_size=args.batch_size,
        batch_tokens=args.batch_tokens,
    )
    files.make_folder(folder / store.CONTEXTS)
    missing = job.missing()
    num_bytes = sum(job.shard_bytes(plan.shards[index]) for index in missing)
    files.require_free(folder, num_bytes, f"encoding {plan.counts.contexts} contexts")
    print(
        f"Encoding {plan.counts.contexts} contexts, {plan.counts.tokens} tokens, {files.size(num_bytes)} to write."
    )
    encode_shards(job, missing, args.num_proc)
    names = [job.path(index, ".arrow").name for index in range(len(plan.shards))]
    store.write_dataset_files(
        folder / store.CONTEXTS, store.context_features(job.storage_dtype), names, store.CONTEXTS
    )


def _report(folder: Path, manifest: store.Manifest) -> None:
    counts = manifest.counts
    print(
        f"{counts.read} rows read, {sum(counts.rows.values())} kept ({planning.describe(counts.rows)}); "
        f"dropped: {planning.describe(counts.dropped)}; malformed: {len(counts.bad_rows)}"
    )
    print(
        f"{counts.contexts} contexts, {counts.tokens} tokens, {counts.truncated} truncated. Written to {folder}"
    )


if __name__ == "__main__":
    sys.exit(run(main))
