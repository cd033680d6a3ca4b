"""A base that was tuned to answer from its prompt, with its KV cache shrunk by kvpress, beside states that dssk stored.

    python -m venv peers
    peers/bin/pip install -r benchmarks/peers/requirements.txt
    peers/bin/python benchmarks/peers/kv_presses.py --base BASE --adapters COMPARE/lora_prompted \\
        --questions xquad.jsonl --stored merged=1152=RUN/predictions.jsonl

Each context is read once, its cache is shrunk without a question in sight (but for SnapKV, which looks from the last
tokens of what it gets: the context's own), and all questions about it are answered from what is left, greedily, by the
answer rule of dssk. `--stored NAME=BYTES=FILE` sets predictions of `dssk evaluate` beside it, on the same questions.

Rows go to benchmarks/results/kv_presses.json: {system, compression, n, em, em_low, em_high, f1, f1_low, f1_high,
bytes_per_context_token}; the bytes are those of 16-bit keys and values that are left. KVzip drops other tokens for
each head and does so by masking: its bytes are nominal, no memory becomes free. kv_presses.png beside them draws it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, KVzipPress, RandomPress, SnapKVPress, StreamingLLMPress
from matplotlib.figure import Figure
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from dssk.evaluation import metrics
from dssk.evaluation.scores import with_interval
from dssk.inference.generation import answer_in
from dssk.inference.tokenizer import load_tokenizer, tokenize_context, tokenize_question_after_context
from dssk.models.shapes import kv_cache_values
from dssk.utils.defaults import MAX_NEW_TOKENS

RESULTS = Path(__file__).resolve().parent.parent / "results" / "kv_presses.json"
PRESSES: dict[str, Any] = {
    "SnapKV": partial(SnapKVPress, window_size=32),  # its own 64 are more than the shortest contexts have
    "ExpectedAttention": ExpectedAttentionPress,
    "KVzip": KVzipPress,
    "StreamingLLM": StreamingLLMPress,
    "random": RandomPress,
}
NOMINAL = {"KVzip"}  # masks what it drops
VALUE_BYTES = 2

Row = dict[str, Any]


def chosen(path: Path, count: int, together: int) -> dict[str, list[Row]]:
    """About `count` questions by context: up to `together` of contexts spread evenly over the file."""
    by_context: dict[str, list[Row]] = defaultdict(list)
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        by_context[row["context"]].append(row)
    contexts = list(by_context)
    wanted = min(len(contexts), max(1, count // together))
    places = [len(contexts) * place // wanted for place in range(wanted)]
    return {contexts[place]: by_context[contexts[place]][:together] for place in places}


@torch.no_grad()
def read(model: PreTrainedModel, context: Sequence[int], press: Any) -> DynamicCache:
    """The cache of a context, shrunk by a press (None: whole)."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None  # of the context before
    cache = DynamicCache()
    tokens = torch.tensor([context])
    if press is None:
        model.model(input_ids=tokens, past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=tokens, past_key_values=cache)
    return cache


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: DynamicCache,
    position: int,
    question: Sequence[int],
) -> str:
    """A greedy answer to a question at a position; the cache is left as it was."""
    kept = cache.get_seq_length()
    tokens, new = list(question), []
    for _ in range(MAX_NEW_TOKENS):
        positions = torch.arange(position, position + len(tokens))[None]
        logits = model(
            torch.tensor([tokens]), past_key_values=cache, position_ids=positions, logits_to_keep=1
        )
        position += len(tokens)
        tokens = [int(logits.logits[0, -1].argmax())]
        if tokens[0] == tokenizer.eos_token_id:
            break
        new += tokens
        text = tokenizer.decode(new)
        if "\n" in text.lstrip():
            break
    cache.crop(kept)
    return answer_in(tokenizer.decode(new, skip_special_tokens=True))


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[str, list[Row]],
    press: Any,
    name: str,
) -> Iterator[tuple[Row, str]]:
    for context, rows in tqdm(asked.items(), desc=name, disable=None):
        tokens = tokenize_context(tokenizer, context)
        cache = read(model, tokens, press)
        for row in rows:
            question = tokenize_question_after_context(tokenizer, row["question"])
            yield row, answer(model, tokenizer, cache, len(tokens), question)


def scored(
    system: str, given: Sequence[tuple[Row, str]], bytes_per_token: float, compression: float | None
) -> Row:
    """A row of the results."""
    rows = [{"context": row["context"]} for row, _ in given]
    em = [metrics.exact_match(text, row["answers"]["text"]) for row, text in given]
    f1 = [metrics.f1(text, row["answers"]["text"]) for row, text in given]
    return {
        "system": system,
        "compression": compression,
        "n": len(given),
        **with_interval("em", em, rows),
        **with_interval("f1", f1, rows),
        "bytes_per_context_token": round(bytes_per_token),
    }


def stored(entry: str, asked: dict[str, list[Row]]) -> Row:
    """The row of `--stored`: what dssk's predictions say to the same questions."""
    name, size, path = entry.split("=", 2)
    predictions = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    texts = {
        (row["context"], row["question"]): row["with_context"]["prediction"]
        for row in predictions
        if "with_context" in row
    }
    rows = [row for several in asked.values() for row in several]
    if missing := [row["id"] for row in rows if (row["context"], row["question"]) not in texts]:
        sys.exit(f"{path} has no prediction for {len(missing)} of the questions, the first is {missing[0]}")
    return scored(name, [(row, texts[row["context"], row["question"]]) for row in rows], float(size), None)


def draw(rows: Sequence[Row], path: Path) -> None:
    """F1 against bytes a token."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    whole = next(row for row in rows if row["system"] == "whole")
    for name in PRESSES:
        line = [whole, *(row for row in rows if row["system"] == name)]
        sizes, f1 = [row["bytes_per_context_token"] for row in line], [row["f1"] for row in line]
        label = f"{name} (nominal)" if name in NOMINAL else name
        axes.plot(
            sizes, f1, marker="o", markersize=3.5, linestyle="--" if name in NOMINAL else "-", label=label
        )
    for row in rows:
        if row["compression"] is None and row is not whole:
            errors = [[row["f1"] - row["f1_low"]], [row["f1_high"] - row["f1"]]]
            place = row["bytes_per_context_token"], row["f1"]
            axes.errorbar(
                *place,
                yerr=errors,
                marker="*",
                markersize=11,
                linestyle="none",
                label=f"dssk: {row['system']}",
            )
    axes.set_xscale("log")
    axes.set_xlabel("bytes a context token, at rest")
    axes.set_ylabel(f"F1, {whole['n']} questions")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument(
        "--adapters", type=Path, help="LoRA that dssk compare trained (none: the base itself)"
    )
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines in the layout of SQuAD")
    parser.add_argument("--count", type=int, default=150, help="questions asked, about (150)")
    parser.add_argument("--together", type=int, default=3, help="questions a context, at most (3)")
    parser.add_argument("--compressions", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--stored", action="append", default=[], help="NAME=BYTES=PREDICTIONS, repeatable")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.base)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.base, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    )
    if args.adapters:
        model = PeftModel.from_pretrained(model, args.adapters).merge_and_unload()
    model.eval()
    asked = chosen(args.questions, args.count, args.together)
    whole_bytes = VALUE_BYTES * kv_cache_values(model.config)
    rows = [stored(entry, asked) for entry in args.stored]
    rows.append(scored("whole", list(answers(model, tokenizer, asked, None, "whole")), whole_bytes, None))
    for name, press in PRESSES.items():
        for compression in args.compressions:
            torch.manual_seed(0)
            shrunk = press(compression_ratio=compression)
            given = list(answers(model, tokenizer, asked, shrunk, f"{name} {compression:g}"))
            rows.append(scored(name, given, (1 - compression) * whole_bytes, compression))
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
