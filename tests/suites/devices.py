"""What the CPU does, done on one other device and on two, with the same results.

    python -m tests.suites.devices

In a process of its own, as a device that is not there is one for a whole process (`elsewhere`).
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from transformers import TrainingArguments

from dssk.commands import calibrate, evaluate, preproc, train
from dssk.evaluation import evaluate as scoring
from dssk.inference import loading
from dssk.inference.auto import from_base
from dssk.inference.encoding import Encoder
from dssk.inference.generation import context_batch, contexts_together, generate_batch, nll_batch
from dssk.models.layers import find_layers
from tests.conftest import byte_tokenizer, experiment, make_base, question_rows
from tests.families import tiny_base
from tests.suites.elsewhere import ELSEWHERE, pretending

FAMILIES = ["llama", "gpt_bigcode"]
BLOCKS = {"num_cross_attn_layers": 2, "cross_attn_layers_stride": 1, "cross_attn_init": "normal"}
READERS: list[dict[str, Any]] = [
    BLOCKS,
    {**BLOCKS, "encode_layer": 2, "decoder_lora": {"rank": 4}},
    {"reader": "merged", "encode_layer": [1, 2]},
    {"reader": "merged", "encode_layer": 2, "reader_replay": 1, "decoder_lora": {"rank": 4}},
]
CONTEXTS, QUESTIONS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]], [[20, 21], [22, 23, 24, 25]]
TARGETS = [[30, 31], [32, 33, 34]]


def fused(folder: Path, **fields: Any) -> Any:
    torch.manual_seed(1)
    model = from_base(folder, **fields).eval()
    if model.config.reader == "merged":
        torch.nn.init.normal_(model.cross_attn_blocks[0].up.weight, std=0.3)
    return model


def results(model: Any) -> Iterator[Any]:
    """Answers and likelihoods without a context, with one a row, with several, and by beams."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    states = Encoder(model).encode(["", ""], input_ids=CONTEXTS)
    for read in (
        dict,
        lambda: context_batch(model, states),
        lambda: contexts_together(model, [states, states[:1]]),
    ):
        yield generate_batch(model, tokenizer, QUESTIONS, 4, **read())
        yield [round(value, 3) for value in nll_batch(model, tokenizer, QUESTIONS, TARGETS, **read())]
    yield generate_batch(model, tokenizer, QUESTIONS, 4, num_beams=2, **context_batch(model, states))


def divide(model: Any) -> Any:
    """The model on two devices, as `device_map="auto"` lays it out: the upper half of its layers on the second."""
    layers = find_layers(model.base_model, model.config.num_hidden_layers)[1]
    number = {layer: index for index, layer in enumerate(layers)}
    places: dict[str, str] = {}

    def place(name: str, module: torch.nn.Module) -> None:
        if module in number or not any(inner in number for inner in module.modules()):
            places[name] = f"elsewhere:{int(number.get(module, 0) >= len(layers) // 2)}"
            return
        for child, inner in module.named_children():
            place(f"{name}.{child}" if name else child, inner)

    place("", model)
    return dispatch_model(model, places, main_device="elsewhere:0", force_hooks=True)


def check_models(folder: Path) -> None:
    for family in FAMILIES:
        base = tiny_base(family, folder / family)
        for fields in READERS:
            expected = list(results(fused(base, **fields)))
            for name, move in (("one", lambda model: model.to(ELSEWHERE)), ("two", divide)):
                model = fused(base, **fields)
                with pretending():
                    found = list(results(move(model)))
                assert found == expected, (family, fields, name, found, expected)


def check_commands(folder: Path) -> None:
    """Training with all that is computed on the way, from its closed form to its answers; scores; calibration."""
    base, rows, texts = make_base(folder / "base"), folder / "rows.jsonl", folder / "texts.jsonl"
    questions = question_rows(16)
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions))
    texts.write_text("".join(json.dumps({"context": row["context"] * 4}) + "\n" for row in questions[::2]))
    run(preproc, "--dataset", rows, "--embedding_model", base, "--data_cache_path", folder, "--encode_layer", 2,
        "--maximum_input_length", 128, "--val_fraction", 0.25)  # fmt: skip
    store = folder / "processed_data" / base.name
    reader = {"reader": "merged", "encode_layer": 2, "reader_replay": 2, "decoder_lora": {"rank": 4}}
    settings = experiment(base, **reader, adam_moments="bf16", distill=True, train_on="both")
    (folder / "experiments.py").write_text(f"EXP_GROUPS = {{'elsewhere': [{settings}]}}")
    run(train, "--exp_configs", folder / "experiments.py", "-e", "elsewhere", "--data_path", store,
        "-sb", folder / "runs", "--steps", 2, "--log_every", 2, "--generation_eval_samples", 2)  # fmt: skip
    run(evaluate, "--checkpoint", folder / "runs", "--data_path", store, "--max_questions", 2, "--num_contexts", 2,
        "--controls", "with_context,wrong_context", "--max_new_tokens", 4)  # fmt: skip
    run(calibrate, "--base", base, "--text", texts, "--encode_layer", 2, "--output", folder / "calibrated")


def run(command: Any, *argv: object) -> None:
    command.main([*map(str, argv)])


def use_elsewhere() -> list[int]:
    """Let commands find the device, as they find a GPU; returns the list of what they will have asked for."""
    asked: list[int] = []

    def device(index: int = 0) -> torch.device:
        asked.append(index)
        return ELSEWHERE

    loading.device = scoring.device = device
    TrainingArguments.device = property(lambda self: ELSEWHERE)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(ELSEWHERE)
    on_cpu = torch.Generator
    torch.Generator = lambda device="cpu": on_cpu()  # type: ignore[misc,assignment]
    return asked


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_models(Path(folder))
        asked = use_elsewhere()
        with pretending():
            check_commands(Path(folder))
        assert asked == [0, 0, 0], asked  # preprocessing, evaluation, calibration; training has its own way


if __name__ == "__main__":
    sys.exit(main())
