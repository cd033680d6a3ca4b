"""One training run, from an experiment to a fused model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy

from dssk.checkpoint import (
    BEST,
    FINAL,
    checkpoint_folder,
    checkpoint_step,
    latest_checkpoint,
    verify_checkpoint,
)
from dssk.config import (
    ExperimentConfig,
    apply_overrides,
    expand_group,
    experiment_id,
    merged_name,
    parse_experiment,
)
from dssk.data.collate import Collator
from dssk.data.dataset import CrossAttnDataset, check_context_ids
from dssk.errors import DsskError, Preempted
from dssk.hub.export import export
from dssk.hub.publish import check_repository, publish
from dssk.inference.auto import from_base, fused_config
from dssk.inference.base_init import base_init_, check_base_init
from dssk.inference.calibrate import fit_reader
from dssk.inference.fingerprint import model_fingerprint
from dssk.inference.loading import is_adapters, load_base_config, load_tuned
from dssk.inference.rounding import DEFAULT_STORAGE, StorageDtype
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from dssk.models.configuration import BASE, COPYING
from dssk.models.copy_init import check_copy_init, copy_init_
from dssk.models.layers import layers_name
from dssk.models.modeling import CrossAttnForCausalLM
from dssk.models.shapes import window
from dssk.run_folder import move_aside, stored_experiment, write_experiment
from dssk.store import verify
from dssk.store.dataset import load_contexts, load_rows
from dssk.store.manifest import Manifest
from dssk.store.opening import check_model, load_manifest
from dssk.training import estimate, state
from dssk.training.answers import AnswerScorer
from dssk.training.arguments import check_loggers, emulates_bfloat16, training_arguments
from dssk.training.budget import CpuBudget, StopAtBudget
from dssk.training.callbacks import FuseEvery, MetricsFile, Progress
from dssk.training.distill import Teacher
from dssk.training.flags import RunArgs, resuming_command
from dssk.training.resume import Start, find_start
from dssk.training.status import reported
from dssk.training.stopping import LeaveTraining, StopEarly, StopOnSignal, StopRequest
from dssk.training.trainer import CrossAttnTrainer
from dssk.training.wandb_report import WandbReport, check_wandb
from dssk.utils.console import quiet_libraries
from dssk.utils.files import make_folder, only_writer, remove_temps, size
from dssk.utils.flags import nearest
from dssk.utils.ranks import Ranks, launched


def train(run: RunArgs, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Train the experiment that `run` names and leave checkpoints and the fused model in its folder."""
    # `launched` also refuses what only looks like a launcher's environment.
    if launched() > 1 and run.minutes is not None:
        raise DsskError(
            "--minutes counts the CPU of one process, and a launcher started several: give --steps"
        )
    exp_dict = choose_experiment(run, groups)
    cfg = parse_experiment(exp_dict)
    savedir = Path(run.savedir_base) / experiment_id(exp_dict)
    quiet_libraries()
    data = check_inputs(cfg, run)
    if run.dry_run:
        print(estimate.report(cfg, run, exp_dict, data))
        return
    arguments = training_arguments(cfg, run, savedir, cfg.skip_steps)  # joins the launcher's process group
    ranks = Ranks(arguments.process_index, arguments.world_size, arguments.local_process_index)
    with ranks.first_holds(only_writer(savedir)):
        verify.check(run.data_path, ranks.rank, ranks.size)
        start = ranks.from_first(lambda: open_savedir(savedir, run, cfg, exp_dict, data))
        if start.skip_steps != cfg.skip_steps:
            arguments = training_arguments(cfg, run, savedir, start.skip_steps)
        with reported(savedir, ranks.rank):
            if start.finished:
                say("\n".join([str(savedir), *start.skipped, start.finished]))
            else:
                train_from(start, cfg, run, arguments)
            save_fused(savedir, run, ranks)


def choose_experiment(run: RunArgs, groups: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The stored experiment of `--exp_id`, or the first one of `--exp_group`; says so if there are others."""
    first, *others = chosen_experiments(run, groups)
    if others:
        grid = sorted(key for key in first if any(other.get(key) != first[key] for other in others))
        values = ", ".join(f"{key}={first[key]}" for key in grid)
        say(
            f"{run.exp_group} has {len(others) + 1} experiments: this trains the first ({values}); --set KEY=VALUE "
            "chooses another, -j submits them all"
        )
    return first


def chosen_experiments(run: RunArgs, groups: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The experiments of `--exp_group`, with the overrides of `--set`, each once; or the stored one of `--exp_id`."""
    if run.exp_id is not None:
        return [stored_experiment(Path(run.savedir_base), run.exp_id)]
    if run.exp_group not in groups:
        raise DsskError(f"unknown experiment group {run.exp_group}{nearest(str(run.exp_group), groups)}")
    experiments = [apply_overrides(e, run.overrides) for e in expand_group(groups[run.exp_group])]
    if not experiments:
        raise DsskError(f"the experiment group {run.exp_group} is empty")
    return list({experiment_id(exp_dict): exp_dict for exp_dict in experiments}.values())


def check_inputs(cfg: ExperimentConfig, run: RunArgs) -> Manifest:
    """Refuse what cannot work before anything is loaded or made: another model's encodings, an impossible layout.

    Returns what is known of the data.
    """
    check_wandb(run)
    check_loggers(run.report_to)
    if run.push_to_hub:
        check_repository(run.push_to_hub)
    if cfg.distill and run.deepspeed:
        raise DsskError("distill needs the whole base on each process: train without --deepspeed")
    manifest = load_manifest(run.data_path)
    if manifest.storage_dtype is None and not cfg.encode_online:
        raise DsskError(
            f"{run.data_path} holds texts and no encodings: --set encode_online=true encodes them in training, "
            "dssk preproc without --text_only once and for all"
        )
    if not manifest.counts.rows["val"]:
        check_without_val(cfg)
    if cfg.include_context_ids:
        check_context_ids(cfg, load_tokenizer(cfg.model_path))
    base = load_base_config(cfg.model_path)
    try:
        model = fused_config(base, **estimate.model_fields(cfg))
        check_model(manifest, cfg.model_path, None, layers_name(model.encode_layers, model.num_hidden_layers))
        if block_start(cfg) in COPYING:
            check_copy_init(model)
        if block_start(cfg) == BASE:
            check_base_init(estimate.meta_model(cfg, base))
    except ValueError as error:
        raise DsskError(f"experiment: {error}") from None
    if cfg.several_contexts:
        load_contexts(run.data_path)
    if isinstance(cfg.distill, str):
        check_teacher(cfg.distill, base)
    if cfg.context_size > window(base):
        raise DsskError(
            f"context_size is {cfg.context_size}, {cfg.model_path} reads at most {window(base)} tokens"
        )
    return manifest


def block_start(cfg: ExperimentConfig) -> str | None:
    """The initialization of blocks; None without blocks."""
    return cfg.cross_attn_init if cfg.reader == "cross_attention" else None


def check_teacher(folder: str, base: PreTrainedConfig) -> None:
    """Refuse a folder that holds no tuned base, or one of another vocabulary."""
    if is_adapters(folder):
        return
    tokens = load_base_config(folder).vocab_size
    if tokens != base.vocab_size:
        raise DsskError(
            f"distill: {folder} knows {tokens} tokens, {base.name_or_path} knows {base.vocab_size}: want a teacher "
            "that was tuned from that base"
        )


def check_without_val(cfg: ExperimentConfig) -> None:
    """Refuse what needs evaluations: there are none without rows in `val`."""
    needing = {
        "lr_scheduler_type reduce_lr_on_plateau": cfg.lr_scheduler_type == "reduce_lr_on_plateau",
        "early_stopping_patience": cfg.early_stopping_patience is not None,
    }
    if found := next((name for name, needed in needing.items() if needed), None):
        raise DsskError(
            f"{found} looks at the loss on val, and the data have no rows there: set another one, or preprocess "
            "with --val_dataset or a larger --val_fraction"
        )


def build_model(cfg: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> CrossAttnForCausalLM:
    """The base with new blocks. In mixed precision the frozen base is kept in half, the blocks in fp32."""
    dtype = torch.float16 if cfg.fp16 else torch.bfloat16 if cfg.bf16 else torch.float32
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": cfg.attn_implementation}
    model = from_base(cfg.model_path, **how, **estimate.model_fields(cfg))
    for module in model.trained_modules:
        module.float()
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_trainer(
    cfg: ExperimentConfig,
    run: RunArgs,
    arguments: TrainingArguments,
    start: Start,
    stop: StopRequest,
) -> CrossAttnTrainer:
    """Everything that is loaded: tokenizer, model and rows."""
    set_seed(cfg.seed)
    budget = CpuBudget(run.minutes)
    tokenizer = load_tokenizer(cfg.model_path)
    model = build_model(cfg, tokenizer)
    rows = load_rows(run.data_path)
    if start.checkpoint is None:  # a checkpoint holds all that this gives
        texts = distinct_contexts(rows["train"], tokenizer, cfg.context_size)
        stored = None if cfg.encode_online else load_manifest(run.data_path).storage_dtype
        start_reader(model.to(arguments.device), cfg, texts, stored or DEFAULT_STORAGE)
    teacher = None
    if cfg.distill:
        model.to(arguments.device)  # before the teacher shares its weights
        teacher = Teacher(find_teacher(cfg, model))
    contexts = load_contexts(run.data_path) if cfg.several_contexts else None
    if not len(rows["val"]):
        arguments.eval_strategy = IntervalStrategy.NO
    scorer = None
    if run.generation_eval_samples and len(rows["val"]):
        scorer = AnswerScorer(rows["val"], tokenizer, cfg.test_batch_size, run.generation_eval_samples)
    trainer = CrossAttnTrainer(
        model=model,
        args=arguments,
        train_dataset=CrossAttnDataset(rows["train"], tokenizer, cfg, True, contexts, model.config),
        eval_dataset=CrossAttnDataset(rows["val"], tokenizer, cfg, False, contexts, model.config),
        data_collator=Collator(tokenizer.pad_token_id, share_contexts=cfg.questions_per_context > 1),
        processing_class=tokenizer,
        callbacks=[MetricsFile(), Progress(budget), StopAtBudget(budget), StopOnSignal(stop)],
        cfg=cfg,
        facts=start.facts,
        keep_checkpoints=run.save_total_limit,
        score_answers=scorer,
        budget=budget,
        teacher=teacher,
    )
    trainer.remove_callback(PrinterCallback)  # Progress prints
    if cfg.early_stopping_patience is not None:
        trainer.add_callback(StopEarly(cfg.early_stopping_patience))
    if "every" in run.save_fused:
        trainer.add_callback(FuseEvery())
    if run.wandb_project_name:
        trainer.add_callback(WandbReport(run, start.facts["experiment"], Path(arguments.output_dir), scorer))
    return trainer


def start_reader(
    model: CrossAttnForCausalLM,
    cfg: ExperimentConfig,
    contexts: Iterator[list[int]],
    storage_dtype: StorageDtype = DEFAULT_STORAGE,
) -> None:
    """Give a reader the start that its experiment asks for, on contexts of the training set as they are stored."""
    if block_start(cfg) in COPYING:
        copy_init_(model, contexts, cfg.seed)
    if block_start(cfg) == BASE:
        base_init_(model, contexts, storage_dtype)
    if cfg.reader == "merged":
        fit_reader(model, contexts, storage_dtype)


def find_teacher(cfg: ExperimentConfig, model: CrossAttnForCausalLM) -> PreTrainedModel:
    """The base of a model, whose weights it shares, or the tuned one that the experiment names."""
    if not isinstance(cfg.distill, str):
        return model.plain_base()
    return load_tuned(cfg.distill, cfg.model_path, dtype=model.dtype, device=model.device)


def distinct_contexts(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, context_size: int
) -> Iterator[list[int]]:
    """The tokens of each context, once, as they are encoded."""
    seen = set()
    for text in rows.select_columns("context")["context"]:
        if text not in seen:
            seen.add(text)
            yield tokenize_context(tokenizer, text)[:context_size]


def open_savedir(
    savedir: Path, run: RunArgs, cfg: ExperimentConfig, exp_dict: dict[str, Any], data: Manifest
) -> Start:
    """Decide under the lock where to start, and make the run's folder. Nothing is made or moved before that."""
    base = model_fingerprint(cfg.model_path, load_base_config(cfg.model_path))
    facts = {"experiment": exp_dict, "data": data.checksum, "base_fingerprint": base}
    start = find_start(savedir, run, cfg, facts)
    if start.fresh:
        move_aside(savedir)
    make_folder(savedir)
    remove_temps(savedir)
    write_experiment(savedir, exp_dict)
    return start


def train_from(start: Start, cfg: ExperimentConfig, run: RunArgs, arguments: TrainingArguments) -> None:
    """Train from `start` to the last step, or until a stop is asked for: then everything is saved."""
    with StopRequest() as stop:
        trainer = build_trainer(cfg, run, arguments, start, stop)
        say(describe(trainer, Path(arguments.output_dir), start))
        with contextlib.suppress(LeaveTraining):
            trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
    if stop.obeyed_step is not None and stop.obeyed_step < run.steps:
        raise Preempted(f"stopped at step {stop.obeyed_step}, saved: {resuming_command(run)}")


def save_fused(savedir: Path, run: RunArgs, ranks: Ranks) -> None:
    """Write the fused models that `--save_fused` asks for, from the checkpoints, on one process."""
    if ranks.rank == 0:
        unset_hf_deepspeed_config()  # with ZeRO-3's, loading a model would wait for the other ranks
        last = latest_checkpoint(savedir)
        assert last is not None  # training ends with a checkpoint
        wanted = run.save_fused.split(",")
        best = state.load_trainer_state(last)["best_global_step"]
        if "final" in wanted:
            fuse(last, savedir / FINAL)
        if "best" in wanted and best:
            fuse(checkpoint_folder(savedir, best), savedir / BEST)
        made = [name for name in (FINAL, BEST) if (savedir / name).is_dir()]
        say(f"{savedir} ({', '.join([last.name, *made])})")
        if run.push_to_hub:
            say(publish(savedir, run.push_to_hub, data_path=run.data_path))
    ranks.wait()


def fuse(checkpoint: Path, output: Path) -> None:
    """Write the fused model of a checkpoint, unless it is there and whole."""
    with contextlib.suppress(DsskError):
        if verify_checkpoint(output).get("step") == checkpoint_step(checkpoint):
            return
    export(checkpoint, output)


def describe(trainer: CrossAttnTrainer, savedir: Path, start: Start) -> str:
    """A summary of the run, printed before it starts."""
    model, args, data = trainer.unwrapped_model, trainer.args, trainer.train_dataset
    trained = sum(p.numel() for _, p in state.trained_parameters(trainer))
    layers = ", ".join(map(str, model.config.cross_attn_layers))
    side = "after" if model.config.cross_attn_final_layer else "before"
    reader = f"blocks {side} decoder layers {layers}"
    if model.config.reader == "merged":
        reader = merged_name(trainer.cfg.encode_layer, trainer.cfg.reader_replay)
    if lora := model.config.decoder_lora:
        reader += f", and adapters of rank {lora['rank']} in the decoder"
    lines = [
        ("experiment", savedir.name),
        ("folder", str(savedir)),
        ("training", f"{trained:,} parameters; {model.num_parameters() - trained:,} are frozen"),
        ("reader", reader),
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
    if args.bf16 and emulates_bfloat16():
        lines.insert(-1, ("bf16", "this processor emulates it: --set bf16=false is faster"))
    return "\n".join(f"{name:11} {text}" for name, text in lines)


def say(text: str) -> None:
    """Tell the user, once for all ranks."""
    if PartialState().is_main_process:
        print(text, flush=True)
