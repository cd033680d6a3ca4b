"""ExperimentConfig + RunArgs -> TrainingArguments: the only place where names are translated."""

import os
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dssk.config import ExperimentConfig
from dssk.errors import DsskError
from dssk.training.deepspeed_config import load_deepspeed_config
from dssk.training.flags import RunArgs
from dssk.utils.flags import nearest

MAX_LOADER_WORKERS = 4


def check_loggers(report_to: str | None) -> None:
    """Refuse a logger of `--report_to` that transformers does not know, or whose package is missing."""
    known = sorted({*INTEGRATION_TO_CALLBACK, "all", "none"})
    for name in report_to.split(",") if report_to else ():
        if name not in known:
            raise DsskError(
                f"--report_to {name}: no such logger{nearest(name, known)}, want {', '.join(known)}"
            )
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            raise DsskError(f"--report_to {name} needs its package: pip install {name}")


def emulates_bfloat16() -> bool:
    """Whether training runs on an x86 CPU without bfloat16 units, where it takes several times as long as fp32."""
    if torch.cuda.is_available():
        return False
    cpu = torch.cpu.get_capabilities()
    return cpu["architecture"] == "x86_64" and not (cpu["avx512_bf16"] or cpu["amx_bf16"])


def training_arguments(
    cfg: ExperimentConfig, run: RunArgs, savedir: Path, skip_steps: int
) -> TrainingArguments:
    """The arguments of transformers' `Trainer` for one experiment and one call of `trainval.py`.

    `skip_steps` is the experiment's, or another one that keeps its global batch on another number of ranks.
    """
    on_gpu = torch.cuda.is_available()
    if cfg.fp16 and not on_gpu:
        raise DsskError(
            "fp16 is true and there is no GPU: use --set fp16=false (--set bf16=true works on a CPU)"
        )
    if cfg.bf16 and on_gpu and not torch.cuda.is_bf16_supported():
        raise DsskError("bf16 is true and this GPU has no bfloat16: use --set bf16=false --set fp16=true")
    arguments = TrainingArguments(
        output_dir=str(savedir),
        run_name=run.wandb_run_name,
        max_steps=run.steps,
        logging_steps=run.log_every,
        eval_strategy="steps",
        eval_steps=run.log_every,
        save_strategy="steps",
        save_steps=run.log_every,
        per_device_train_batch_size=cfg.train_batch_size,
        per_device_eval_batch_size=cfg.test_batch_size,
        gradient_accumulation_steps=skip_steps,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=cfg.lr_scheduler_type,
        warmup_steps=cfg.warmup_ratio,  # below 1 it is a share of all steps
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        adam_epsilon=cfg.adam_epsilon,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        fp16=cfg.fp16,
        bf16=cfg.bf16,
        activation_checkpointing=cfg.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=cfg.seed,
        metric_for_best_model="loss",  # what reduce_lr_on_plateau looks at; the trainer finds the best itself
        greater_is_better=False,
        prediction_loss_only=True,
        label_names=["labels"],  # guessed from our forward it would include label_smoothing
        logging_nan_inf_filter=False,  # it would log a NaN loss as zero
        remove_unused_columns=False,  # our collator names the model's inputs
        dataloader_num_workers=loader_workers(),
        ddp_find_unused_parameters=False,  # every batch has a context, so every trainable parameter is used
        use_cpu=not on_gpu,
        disable_tqdm=True,  # we have our own
        deepspeed=load_deepspeed_config(run.deepspeed, cfg, skip_steps) if run.deepspeed else None,
        report_to=run.report_to.split(",") if run.report_to else [],
    )
    if run.deepspeed:
        import deepspeed

        deepspeed.init_distributed()  # before the model is built: ZeRO-3 cuts it up while loading it
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for torchrun, not for torch's DataParallel
    return arguments


def loader_workers() -> int:
    """Data-loading processes for each rank: a share of this machine's cores, none where ranks use them all."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available():
        return 0  # the training step itself needs the cores
    return max(0, min(MAX_LOADER_WORKERS, cores // ranks - 1))
