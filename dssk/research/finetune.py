"""Fine-tuning a base on prompts that hold their context, the alternative to cached contexts.

transformers' Trainer on either all weights or LoRA's (peft); the result is kept in a folder and used again by a run
with the same settings. One that was stopped goes on from its last checkpoint, in `<folder>.training`.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dssk.checkpoint import load_manifest, newest_checkpoint
from dssk.data.collate import Collator
from dssk.errors import DamagedData, Diverged, DsskError
from dssk.evaluation.questions import Question
from dssk.inference.loading import load_base, load_tuned, peft
from dssk.inference.tokenizer import tokenize_answer
from dssk.models.loss import IGNORED, next_token_loss, shifted
from dssk.models.shapes import window
from dssk.research.prompted import make_prompt
from dssk.training.budget import CpuBudget, StopAtBudget
from dssk.training.resumable import ResumableTrainer, SaveEvery
from dssk.training.sampler import EpochSampler
from dssk.utils import files
from dssk.utils.console import watched
from dssk.utils.json_files import read_json

SETTINGS_FILE = "settings.json"
FACT = "fine_tuning"  # in a checkpoint's manifest
LOGGED_SECONDS = 60  # between logs of a training that minutes end
SAVED_SECONDS = 300  # between checkpoints


@dataclass(frozen=True)
class FineTuning:
    """Settings of a fine-tuning; equal settings give the same model."""

    method: Literal["lora", "full"]
    base: str  # fingerprint
    data: str  # fingerprint of the training questions
    # Labels: question and answer, as for cross-attention, or the answer alone.
    loss_on: Literal["all", "answer"]
    steps: int  # optimizer steps, at most
    batch_size: int  # prompts a step
    learning_rate: float  # at its peak, after a twentieth of the steps; then falling to 0
    lora_rank: int
    seed: int
    questions_per_context: int = 1  # prompts of a step that share their context, which is then read once
    minutes: float | None = None  # CPU minutes after which training ends, with the learning rate come down
    bf16: bool = False  # LoRA in mixed precision: the frozen base in bfloat16


def fine_tuned(
    base_path: str | Path,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: FineTuning,
    folder: Path,
) -> tuple[PreTrainedModel, int]:
    """The model trained by `settings`, from `folder` if it is there, and how many parameters were trained."""
    file = folder / SETTINGS_FILE
    if not file.is_file() or read_json(file, dict).get("settings") != asdict(settings):
        _train(base_path, revision, tokenizer, questions, settings, folder)
    facts = read_json(file, dict)
    if settings.method == "full":
        model = load_base(folder, dtype=torch.float32)
    else:
        model = load_tuned(folder, base_path, revision=revision, dtype=torch.float32)
    return model.eval().requires_grad_(False), facts["trained_parameters"]


def _train(
    base_path: str | Path,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    settings: FineTuning,
    folder: Path,
) -> None:
    print(
        f"{settings.method:5} {settings.steps} steps x {settings.batch_size} prompts, at {settings.learning_rate:g}",
        flush=True,
    )
    set_seed(settings.seed)
    dtype = torch.bfloat16 if settings.bf16 and settings.method == "lora" else torch.float32
    # Never attention that is written out, whatever the experiment has: prompts are long, and its memory grows with
    # their square (21 GB at 16 prompts of some hundred tokens).
    model = load_base(base_path, revision, dtype=dtype).requires_grad_(True)
    positions = window(model.config)
    if settings.method == "lora":
        rank = settings.lora_rank
        config = peft().LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft().get_peft_model(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    budget = CpuBudget(settings.minutes)
    examples = [
        _example(tokenizer, question, positions, settings.loss_on)
        for question in tqdm(questions, desc="prompts", disable=None)
    ]
    unfinished = folder.with_name(f"{folder.name}.training")
    checkpoint = _last_checkpoint(unfinished, settings)
    trainer = _trainer(model, tokenizer, examples, settings, unfinished, budget)
    loss = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).training_loss
    if not loss < float("inf"):
        raise Diverged(f"{settings.method}: the loss is {loss}: lower --learning_rate")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    facts = {
        "settings": asdict(settings),
        "trained_parameters": trained,
        "mean_loss": round(loss, 4),
        "cpu_seconds": round(budget.used, 1),
        "questions": trainer.state.global_step * settings.batch_size,
    }
    files.write_json(partial / SETTINGS_FILE, facts)
    files.remove(folder)
    partial.rename(folder)
    files.remove(unfinished)


def _last_checkpoint(folder: Path, settings: FineTuning) -> Path | None:
    """Where a fine-tuning with these settings was stopped; checkpoints of others are removed."""
    try:
        checkpoint, _ = newest_checkpoint(folder)
    except DamagedData:
        raise DsskError(
            f"no checkpoint in {folder} is whole: remove it to start this fine-tuning afresh"
        ) from None
    if checkpoint is None or load_manifest(checkpoint).get(FACT) != asdict(settings):
        files.remove(folder)
        return None
    print(f"{settings.method:5} goes on from {checkpoint}", flush=True)
    return checkpoint


def _example(
    tokenizer: PreTrainedTokenizerBase, question: Question, positions: int, loss_on: str
) -> dict[str, Any]:
    """A prompt in its two parts: what is read alone, and what is learned after it."""
    answer = tokenize_answer(tokenizer, question.answers[0])
    prompt = make_prompt(tokenizer, question, positions, len(answer))
    asked = prompt.question if loss_on == "all" else [IGNORED] * len(prompt.question)
    return {
        "context": question.context,
        "context_input_ids": prompt.context,
        "input_ids": prompt.question + answer,
        "labels": asked + answer,
    }


def whole(example: dict[str, Any]) -> dict[str, list[int]]:
    """An example as one text."""
    context = example["context_input_ids"]
    return {
        "input_ids": context + example["input_ids"],
        "labels": [IGNORED] * len(context) + example["labels"],
    }


class PrefixTrainer(ResumableTrainer):
    """Trainer whose batches hold contexts (C, S) and B texts after them, B / C after each; it reads each once."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "context_input_ids" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return prefix_loss(model, inputs)


def prefix_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of texts (B, T) that follow contexts (C, S), each padded on the right; gradients reach both."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask = batch["context_attention_mask"].long()
    read = plain.base_model(batch["context_input_ids"], attention_mask=mask, use_cache=True)
    rows, tokens = batch["input_ids"].shape
    repeats = rows // len(mask)
    read.past_key_values.batch_repeat_interleave(repeats)
    before = mask.sum(-1).repeat_interleave(repeats)
    hidden = plain.base_model(
        batch["input_ids"],
        past_key_values=read.past_key_values,
        attention_mask=torch.cat([mask.repeat_interleave(repeats, 0), batch["attention_mask"].long()], 1),
        position_ids=before[:, None] + torch.arange(tokens, device=mask.device),
        use_cache=True,
    ).last_hidden_state
    head = plain.get_output_embeddings()
    return next_token_loss(hidden, head, shifted(batch["labels"]), plain.config.vocab_size)


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    settings: FineTuning,
    folder: Path,
    budget: CpuBudget,
) -> PrefixTrainer:
    together = settings.questions_per_context > 1
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=0.05,  # of all steps
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_strategy="steps" if budget.limit is None else "no",
        logging_steps=max(settings.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        bf16=torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not watched(),
        remove_unused_columns=not together,
    )
    assert tokenizer.pad_token_id is not None
    trainer = PrefixTrainer(
        model,
        args,
        data_collator=Collator(tokenizer.pad_token_id, share_contexts=True)
        if together
        else DataCollatorForSeq2Seq(tokenizer),  # pads labels, too
        train_dataset=examples if together else [whole(example) for example in examples],
        callbacks=[_Progress(settings.method, budget), StopAtBudget(budget), SaveEvery(SAVED_SECONDS)],
        facts={FACT: asdict(settings)},
        budget=budget,
    )
    if together:
        trainer.sampler = _sampler(examples, settings)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _sampler(examples: list[dict[str, Any]], settings: FineTuning) -> EpochSampler:
    """Lets the questions of a context follow one another."""
    numbers = {text: number for number, text in enumerate({example["context"]: 0 for example in examples})}
    contexts = np.array([numbers[example["context"]] for example in examples])
    lengths = np.array([len(example["context"]) for example in examples])
    together = settings.questions_per_context
    return EpochSampler(
        len(examples), settings.batch_size, settings.seed, lambda epoch: lengths, contexts, together
    )


class _Progress(TrainerCallback):
    """A line for every tenth of the steps, or for every minute of the budget."""

    def __init__(self, method: str, budget: CpuBudget):
        self.method, self.budget = method, budget

    def on_train_begin(self, args, state, control, **kwargs):
        self._next = self.budget.used + LOGGED_SECONDS

    def on_step_end(self, args, state, control, **kwargs):
        if self.budget.limit is not None and self.budget.used >= self._next:
            self._next = self.budget.used + LOGGED_SECONDS
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            place = self.budget.place(state.global_step, state.max_steps)
            tqdm.write(f"{self.method:5} step {place}  loss {float(logs['loss']):.4f}")
            sys.stdout.flush()  # into a log as well
