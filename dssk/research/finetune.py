"""Fine-tuning a base on prompts that hold their context: what one would do without cached contexts.

transformers' Trainer on either all weights or LoRA's (peft); the result is kept in a folder and used again by a run
with the same settings.
"""

import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dssk.errors import Diverged, DsskError
from dssk.evaluation.questions import Question
from dssk.inference.batching import IGNORED
from dssk.inference.loading import load_base
from dssk.inference.tokenizer import tokenize_answer
from dssk.models.shapes import window
from dssk.research.prompted import make_prompt
from dssk.utils import files
from dssk.utils.console import watched
from dssk.utils.json_files import read_json

SETTINGS_FILE = "settings.json"
# Multiples of the rate that the blocks were trained at; the best of those tried on the toy.


@dataclass(frozen=True)
class FineTuning:
    """What is trained and how; two equal ones give the same model."""

    method: Literal["lora", "full"]
    base: str  # fingerprint
    data: str  # fingerprint of the training questions
    loss_on: Literal[
        "all", "answer"
    ]  # question and answer, as the cross-attention learns them, or the answer alone
    steps: int  # optimizer steps
    batch_size: int  # prompts a step
    learning_rate: float  # at its peak, after a twentieth of the steps; then falling to 0
    lora_rank: int
    seed: int


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
        base = load_base(base_path, revision, dtype=torch.float32)
        # Merged, the adapters cost nothing when answering.
        model = _peft().PeftModel.from_pretrained(base, folder).merge_and_unload()
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
    model = load_base(base_path, revision, dtype=torch.float32).requires_grad_(True)
    positions = window(model.config)
    if settings.method == "lora":
        rank = settings.lora_rank
        config = _peft().LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = _peft().get_peft_model(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    examples = [
        _example(tokenizer, question, positions, settings.loss_on)
        for question in tqdm(questions, desc="prompts", disable=None)
    ]
    trainer = _trainer(model, tokenizer, examples, settings, folder)
    loss = trainer.train().training_loss
    if not loss < float("inf"):
        raise Diverged(f"{settings.method}: the loss is {loss}: lower --learning_rate")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    facts = {"settings": asdict(settings), "trained_parameters": trained, "mean_loss": round(loss, 4)}
    files.publish_json(partial / SETTINGS_FILE, facts)
    files.remove(folder)
    partial.rename(folder)


def _example(
    tokenizer: PreTrainedTokenizerBase, question: Question, positions: int, loss_on: str
) -> dict[str, list[int]]:
    answer = tokenize_answer(tokenizer, question.answers[0])
    prompt = make_prompt(tokenizer, question, positions, len(answer))
    asked = prompt.question if loss_on == "all" else [IGNORED] * len(prompt.question)
    return {
        "input_ids": prompt.tokens + answer,
        "labels": [IGNORED] * len(prompt.context) + asked + answer,
    }


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, list[int]]],
    settings: FineTuning,
    folder: Path,
) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=0.05,  # of all steps
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=max(settings.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
        bf16=torch.cuda.is_available(),
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not watched(),
    )
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels, too
        train_dataset=examples,
        callbacks=[_Progress(settings)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):
    """A line for every tenth of the steps."""

    def __init__(self, settings: FineTuning):
        self.name = settings.method

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            line = f"{self.name:5} step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4f}"
            tqdm.write(line)
            sys.stdout.flush()  # into a log as well


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise DsskError(
            "lora_prompted needs peft: pip install 'dssk[compare]', or leave it out of --systems"
        ) from error
    # peft asks for the old name of a property that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    return peft
