"""One training run, from an experiment to a fused model."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dssk.checkpoint import BEST, FINAL, latest_checkpoint
from dssk.config import ExperimentConfig, apply_overrides, expand_group, experiment_id, parse_experiment
from dssk.data.collate import Collator
from dssk.data.dataset import CrossAttnDataset, check_context_ids
from dssk.errors import DamagedData, DsskError, Preempted
from dssk.hub.export import export
from dssk.hub.publish import check_repository, publish
from dssk.inference.auto import from_base, fused_config
from dssk.inference.loading import load_base_config
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from dssk.models.copy_init import check_copy_init, copy_init_
from dssk.models.modeling import CrossAttnForCausalLM
from dssk.models.shapes import window
from dssk.store import verify
from dssk.store.format import Manifest, check_model, load_manifest, load_rows
from dssk.training import estimate, state
from dssk.training.answers import AnswerScorer
from dssk.training.arguments import training_arguments
from dssk.training.callbacks import FuseEvery, MetricsFile, Progress
from dssk.training.flags import RunArgs
from dssk.training.resume import Start, differences, find_start
from dssk.training.status import reported
from dssk.training.stopping import StopOnSignal, StopRequest
from dssk.training.trainer import TRAINER_STATE_FILE, CrossAttnTrainer
from dssk.training.wandb_report import WandbReport, check_wandb
from dssk.utils.console import quiet_libraries
from dssk.utils.files import lock, make_folder, publish_json, remove_temps, size
from dssk.utils.flags import nearest

EXP_DICT = "exp_dict.json"


def train(run: RunArgs, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Train the experiment that `run` names and leave checkpoints and the fused model in its folder."""
    exp_dict = choose_experiment(run, groups)
    cfg = parse_experiment(exp_dict)
    savedir = Path(run.savedir_base) / experiment_id(exp_dict)
    quiet_libraries()
    data = check_inputs(cfg, run)
    check_wandb(run)
    if run.push_to_hub:
        check_repository(run.push_to_hub)
    if run.dry_run:
        print(estimate.report(cfg, run, exp_dict, data))
        return
    start = find_start(savedir, run, cfg, {"experiment": exp_dict, "data": data.checksum})
    arguments = training_arguments(cfg, run, savedir, start.skip_steps)  # joins the launcher's process group
    verify.check(run.data_path, arguments.process_index, arguments.world_size)
    with open_savedir(savedir, exp_dict, start.fresh), reported(savedir, arguments.process_index):
        with StopRequest() as stop:
            trainer = build_trainer(cfg, run, arguments, start.facts, stop)
            say(describe(trainer, savedir, start))
            if start.step < run.steps:
                trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
            if stop.obeyed_step is not None and stop.obeyed_step < run.steps:
                raise Preempted(
                    f"stopped at step {stop.obeyed_step}, saved: the same command goes on from there"
                )
        save_fused(trainer, savedir, run)


def choose_experiment(run: RunArgs, groups: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The stored experiment of `--exp_id`, or the first one of `--exp_group`, with the overrides of `--set`."""
    if run.exp_id is not None:
        return stored_experiment(Path(run.savedir_base), run.exp_id)
    if run.exp_group not in groups:
        raise DsskError(f"unknown experiment group {run.exp_group}{nearest(str(run.exp_group), groups)}")
    return apply_overrides(expand_group(groups[run.exp_group])[0], run.overrides)


def stored_experiment(savedir_base: Path, exp_id: str) -> dict[str, Any]:
    """The experiment that a job was submitted for; its content must still hash to its id."""
    if len(exp_id) != 32 or any(c not in "0123456789abcdef" for c in exp_id):
        raise DsskError(f"--exp_id is {exp_id!r}, want 32 hexadecimal digits")
    file = savedir_base / exp_id / EXP_DICT
    try:
        exp_dict = json.loads(file.read_text())
    except FileNotFoundError:
        raise DsskError(f"no experiment {exp_id} in {savedir_base}: {file} is missing") from None
    except ValueError as error:
        raise DamagedData(f"{file} is not JSON: {error}") from error
    if not isinstance(exp_dict, dict) or experiment_id(exp_dict) != exp_id:
        raise DamagedData(f"{file} is not the experiment of id {exp_id}: it was changed after submission")
    return exp_dict


def check_inputs(cfg: ExperimentConfig, run: RunArgs) -> Manifest:
    """Refuse what cannot work before anything is loaded: another model's encodings, an impossible layout.

    Returns what is known of the data.
    """
    manifest = load_manifest(run.data_path)
    check_model(manifest, cfg.model_path)
    check_context_ids(cfg, load_tokenizer(cfg.model_path))
    base = load_base_config(cfg.model_path)
    try:
        model = fused_config(base, **cross_attn_fields(cfg))
        if cfg.cross_attn_init == "copy":
            check_copy_init(model)
    except ValueError as error:
        raise DsskError(f"experiment: {error}") from None
    if cfg.context_size > window(base):
        raise DsskError(
            f"context_size is {cfg.context_size}, {cfg.model_path} reads at most {window(base)} tokens"
        )
    return manifest


def cross_attn_fields(cfg: ExperimentConfig) -> dict[str, Any]:
    """The fields of an experiment that describe the model; they have the same names in both configurations."""
    return {key: value for key, value in cfg.model_dump().items() if "cross_attn" in key}


def build_model(cfg: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> CrossAttnForCausalLM:
    """The base with new blocks. In mixed precision the frozen base is kept in half, the blocks in fp32."""
    dtype = torch.float16 if cfg.fp16 else torch.bfloat16 if cfg.bf16 else torch.float32
    model = from_base(cfg.model_path, dtype=dtype, **cross_attn_fields(cfg))
    model.cross_attn_blocks.float()
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_trainer(
    cfg: ExperimentConfig,
    run: RunArgs,
    arguments: TrainingArguments,
    facts: dict[str, Any],
    stop: StopRequest,
) -> CrossAttnTrainer:
    """Everything that is loaded: tokenizer, model and rows."""
    set_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model_path)
    model = build_model(cfg, tokenizer)
    rows = load_rows(run.data_path)
    if cfg.cross_attn_init == "copy":
        copy_init_(
            model.to(arguments.device),
            distinct_contexts(rows["train"], tokenizer, cfg.context_size),
            cfg.seed,
        )
    scorer = None
    if run.generation_eval_samples:
        scorer = AnswerScorer(rows["val"], tokenizer, cfg.test_batch_size, run.generation_eval_samples)
    trainer = CrossAttnTrainer(
        model=model,
        args=arguments,
        train_dataset=CrossAttnDataset(rows["train"], tokenizer, cfg, training=True),
        eval_dataset=CrossAttnDataset(rows["val"], tokenizer, cfg, training=False),
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[MetricsFile(), Progress(), StopOnSignal(stop)],
        cfg=cfg,
        facts=facts,
        keep_checkpoints=run.save_total_limit,
        score_answers=scorer,
    )
    trainer.remove_callback(PrinterCallback)  # Progress prints
    if "every" in run.save_fused:
        trainer.add_callback(FuseEvery())
    if run.wandb_project_name:
        trainer.add_callback(WandbReport(run, facts["experiment"], Path(arguments.output_dir), scorer))
    return trainer


def distinct_contexts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, context_size: int
) -> Iterator[list[int]]:
    """The tokens of each context, once, as they are encoded."""
    seen = set()
    for text in rows.select_columns("context")["context"]:
        if text not in seen:
            seen.add(text)
            yield tokenize_context(tokenizer, text)[:context_size]


@contextlib.contextmanager
def open_savedir(savedir: Path, exp_dict: dict[str, Any], fresh: bool) -> Iterator[None]:
    """Make the run's folder and be the only run in it; with `fresh`, what was there is moved to `deleted/`."""
    with contextlib.ExitStack() as stack:
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                make_folder(savedir.parent)
                stack.enter_context(lock(savedir.with_name(f".{savedir.name}.lock")))
                if fresh and savedir.exists():
                    move_aside(savedir)
                make_folder(savedir)
                remove_temps(savedir)
                write_experiment(savedir / EXP_DICT, exp_dict)
        yield


def move_aside(savedir: Path) -> None:
    """Move a run to `deleted/`, under a name of its own."""
    deleted = savedir.parent / "deleted"
    deleted.mkdir(exist_ok=True)
    name = f"{savedir.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    number = len(list(deleted.glob(f"{name}*")))
    savedir.rename(deleted / (f"{name}-{number}" if number else name))


def write_experiment(file: Path, exp_dict: dict[str, Any]) -> None:
    """Keep the experiment beside its checkpoints; one that is there already must be the same."""
    if not file.exists():
        publish_json(file, exp_dict)
        return
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise DamagedData(f"{file} is not JSON: {error}") from error
    if stored != json.loads(json.dumps(exp_dict)):
        raise DsskError(f"{file} is another experiment: {differences(stored, exp_dict)}")


def save_fused(trainer: CrossAttnTrainer, savedir: Path, run: RunArgs) -> None:
    """Write the fused models that `--save_fused` asks for, from the checkpoints, on one process."""
    if trainer.args.should_save:
        unset_hf_deepspeed_config()  # with ZeRO-3's, loading a model would wait for the other ranks
        last = latest_checkpoint(savedir)
        assert last is not None  # training ends with a checkpoint
        wanted = run.save_fused.split(",")
        best = json.loads((last / TRAINER_STATE_FILE).read_text())["best_global_step"]
        if "final" in wanted:
            export(last, savedir / FINAL)
        if "best" in wanted and best:
            export(savedir / f"checkpoint-{best}", savedir / BEST)
        made = [name for name in (FINAL, BEST) if (savedir / name).is_dir()]
        say(f"{savedir} ({', '.join([last.name, *made])})")
        if run.push_to_hub:
            say(publish(savedir, run.push_to_hub, data_path=run.data_path))
    trainer.accelerator.wait_for_everyone()


def describe(trainer: CrossAttnTrainer, savedir: Path, start: Start) -> str:
    """What is about to happen, on one screen."""
    model, args, data = trainer.unwrapped_model, trainer.args, trainer.train_dataset
    trained = sum(p.numel() for _, p in state.trained_parameters(trainer))
    layers = ", ".join(map(str, model.config.cross_attn_layers))
    side = "after" if model.config.cross_attn_final_layer else "before"
    lines = [
        ("experiment", savedir.name),
        ("folder", str(savedir)),
        ("training", f"{trained:,} parameters; {model.num_parameters() - trained:,} are frozen"),
        ("blocks", f"{side} decoder layers {layers}"),
        ("rows", f"{len(data):,} to train on, {len(trainer.eval_dataset):,} to evaluate"),
        (
            "step",
            f"{trainer.global_batch} rows: {args.train_batch_size} x {args.gradient_accumulation_steps} accumulated "
            f"x {args.world_size} ranks; at most {trainer.global_batch * trainer.cfg.context_size:,} tokens",
        ),
        (
            "checkpoint",
            f"about {size(trained * estimate.checkpoint_bytes(trainer.cfg))}, every {args.save_steps:.0f} steps",
        ),
        *(("skipped", reason) for reason in start.skipped),
        ("start", f"resuming from step {start.step}" if start.checkpoint else "starting at step 0"),
    ]
    return "\n".join(f"{name:11} {text}" for name, text in lines)


def say(text: str) -> None:
    """Tell the user, once for all ranks."""
    if PartialState().is_main_process:
        print(text, flush=True)
