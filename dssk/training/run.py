"""One training run, from an experiment to a fused model."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed

from dssk.checkpoint import FINAL, latest_checkpoint
from dssk.cli import RunArgs
from dssk.config import ExperimentConfig, apply_overrides, expand_group, experiment_id, parse_experiment
from dssk.console import quiet_libraries
from dssk.data.collate import Collator
from dssk.data.dataset import CrossAttnDataset
from dssk.data.store import check_model, load_manifest, load_rows
from dssk.errors import DamagedData, DsskError
from dssk.files import publish_json
from dssk.flags import nearest
from dssk.models.base import load_base_config
from dssk.models.configuration import CrossAttnGPTBigCodeConfig
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM
from dssk.tokenizer import load_tokenizer
from dssk.training.arguments import training_arguments
from dssk.training.callbacks import MetricsFile, StopOnNaN
from dssk.training.trainer import CrossAttnTrainer

EXP_DICT = "exp_dict.json"


def train(run: RunArgs, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Train the experiment that `run` names and leave checkpoints and the fused model in its folder."""
    exp_dict = choose_experiment(run, groups)
    cfg = parse_experiment(exp_dict)
    savedir = Path(run.savedir_base) / experiment_id(exp_dict)
    quiet_libraries()
    check_inputs(cfg, run)
    arguments = training_arguments(cfg, run, savedir)  # joins the process group of torchrun or deepspeed
    open_savedir(savedir, exp_dict, run.reset)
    set_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.model_path)
    model = build_model(cfg, tokenizer)
    trainer = build_trainer(model, tokenizer, cfg, run, arguments)
    say(f"{describe(model)}\n{savedir}")
    checkpoint = latest_checkpoint(savedir)
    say(f"resuming from step {checkpoint.name.split('-')[1]}" if checkpoint else "starting at step 0")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    save_final(trainer, savedir / FINAL)


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


def check_inputs(cfg: ExperimentConfig, run: RunArgs) -> None:
    """Refuse what cannot work before anything is loaded: another model's encodings, an impossible layout."""
    manifest = load_manifest(run.data_path)
    check_model(manifest, cfg.model_path)
    base = load_base_config(cfg.model_path)
    try:
        CrossAttnGPTBigCodeConfig(
            n_layer=base.n_layer, n_embd=base.n_embd, n_head=base.n_head, **cross_attn_fields(cfg)
        )
    except ValueError as error:
        raise DsskError(f"experiment: {error}") from None
    if cfg.context_size > base.n_positions:
        raise DsskError(
            f"context_size is {cfg.context_size}, {cfg.model_path} reads at most {base.n_positions} tokens"
        )


def cross_attn_fields(cfg: ExperimentConfig) -> dict[str, Any]:
    """The fields of an experiment that describe the model; they have the same names in both configurations."""
    return {key: value for key, value in cfg.model_dump().items() if "cross_attn" in key}


def build_model(cfg: ExperimentConfig, tokenizer: PreTrainedTokenizerBase) -> CrossAttnGPTBigCodeForCausalLM:
    """The base with new blocks. In mixed precision the frozen base is kept in half, the blocks in fp32."""
    dtype = torch.float16 if cfg.fp16 else torch.bfloat16 if cfg.bf16 else torch.float32
    model = CrossAttnGPTBigCodeForCausalLM.from_base(cfg.model_path, dtype=dtype, **cross_attn_fields(cfg))
    model.transformer.cross_attn.float()
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_trainer(
    model: CrossAttnGPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cfg: ExperimentConfig,
    run: RunArgs,
    arguments,
) -> CrossAttnTrainer:
    rows = load_rows(run.data_path)
    return CrossAttnTrainer(
        model=model,
        args=arguments,
        train_dataset=CrossAttnDataset(rows["train"], tokenizer, cfg, training=True),
        eval_dataset=CrossAttnDataset(rows["val"], tokenizer, cfg, training=False),
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[MetricsFile(), StopOnNaN()],
        label_smoothing=cfg.label_smoothing_factor,
    )


def open_savedir(savedir: Path, exp_dict: dict[str, Any], reset: bool) -> None:
    """Make the run's folder, on one process; with `reset`, what was there is moved to `deleted/`, never erased."""
    with PartialState().main_process_first():
        if not PartialState().is_main_process:
            return
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if reset and not restarted and savedir.exists():
            aside = (
                savedir.parent
                / "deleted"
                / f"{savedir.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
            )
            number = len(list(aside.parent.glob(f"{aside.name}*")))
            aside.parent.mkdir(exist_ok=True)
            savedir.rename(aside if not number else aside.with_name(f"{aside.name}-{number}"))
        savedir.mkdir(parents=True, exist_ok=True)
        publish_json(savedir / EXP_DICT, exp_dict)


def save_final(trainer: CrossAttnTrainer, folder: Path) -> None:
    """Write the fused model with its tokenizer: it loads with `AutoModelForCausalLM` after `import dssk`."""
    if trainer.args.should_save:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    say(f"the fused model is in {folder}")


def describe(model: CrossAttnGPTBigCodeForCausalLM) -> str:
    trainable, total = model.trainable_parameters()
    layers = ", ".join(map(str, model.config.cross_attn_layers))
    side = "after" if model.config.cross_attn_final_layer else "before"
    return f"training {trainable:,} of {total:,} parameters; cross-attention {side} decoder layers {layers}"


def say(text: str) -> None:
    """Tell the user, once for all ranks."""
    if PartialState().is_main_process:
        print(text, flush=True)
