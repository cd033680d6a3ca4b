"""How fast the fused model answers and trains: `make bench-model`, at most ten minutes, `results/model.json`."""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from common import SIZES, Results, interleaved, random_base
from original import Original
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from dssk.inference.auto import from_base
from dssk.inference.generation import greedy
from dssk.inference.loading import load_base
from dssk.models.modeling import CrossAttnForCausalLM
from dssk.models.shapes import kv_cache_values


class Layout(NamedTuple):
    """Blocks in a random base of a size."""

    size: str
    num_cross_attn_layers: int
    cross_attn_layers_stride: int
    cross_attn_shared_weights: bool = True
    cross_attn_final_layer: bool = False
    cross_attn_num_key_value_heads: int | None = None
    cross_attn_hidden_size: int | None = None


# "small" and "medium" have the four blocks with shared weights of BASE_CONFIG, after their layers as the larger
# experiments have them (six layers cannot hold four blocks at stride 2). "narrow" blocks are narrower than the decoder,
# as those of crossattn_starcoderbase-3b and -7b are. The others vary one thing or two.
LAYOUTS = {
    "small": Layout("SMALL", 4, 1, cross_attn_final_layer=True),
    "small_narrow": Layout("SMALL", 4, 1, cross_attn_final_layer=True, cross_attn_hidden_size=64),
    "small_before": Layout("SMALL", 4, 1),
    "small_unshared": Layout("SMALL", 3, 2, cross_attn_shared_weights=False),
    "small_multi_query": Layout(
        "SMALL", 3, 2, cross_attn_shared_weights=False, cross_attn_num_key_value_heads=1
    ),
    "medium": Layout("MEDIUM", 4, 2, cross_attn_final_layer=True),
    "medium_unshared": Layout("MEDIUM", 3, 3, cross_attn_shared_weights=False),
    "small_llama": Layout("SMALL_LLAMA", 4, 1, cross_attn_final_layer=True),
}
GENERATION = ("small_narrow", "small", "small_llama", "small_multi_query", "medium")
TRAINING = ("small", "small_llama", "small_before", "small_unshared", "medium", "medium_unshared")
# Measured with both numbers of labels, the others with an answer's alone.
DENSE = ("small", "small_llama", "medium")
QUESTION_TOKENS, NEW_TOKENS = 16, 24
TRAIN_ROWS, TRAIN_CONTEXT, TRAIN_TOKENS = 4, 512, 64
TRAIN_LABELS = (64, 16)  # labelled tokens of a row: all of them, as `loss_on: all` has it, or an answer's


def fused(folder: Path, layout: str, implementation: str = "sdpa") -> CrossAttnForCausalLM:
    torch.manual_seed(1)
    fields = LAYOUTS[layout]._asdict()
    base = folder / fields.pop("size")
    return from_base(base, cross_attn_init="normal", attn_implementation=implementation, **fields).eval()


def tokens(model, *shape: int) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, shape)


class Latencies(BaseStreamer):
    """Seconds to the first token and to each later one of `generate`, over several calls."""

    def __init__(self):
        self.first: list[float] = []
        self.later: list[float] = []

    def measure(self, model, ids: torch.Tensor, **context) -> None:
        self._stamps = [time.perf_counter()]
        how = greedy(NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=4)
        model.generate(ids, streamer=self, generation_config=how, **context)
        _, _, *tokens_ = self._stamps  # the start, the prompt, then every new token
        self.first.append(tokens_[0] - self._stamps[0])
        self.later += [after - before for before, after in pairwise(tokens_)]

    def put(self, value) -> None:
        self._stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def pass_through(model: CrossAttnForCausalLM) -> CrossAttnForCausalLM:
    """Let the blocks hand their input on: what is left is all that a context costs besides its arithmetic."""
    for block in model.cross_attn_blocks:
        block.forward = lambda hidden_states, *context: hidden_states
    return model


def in_turns(latencies: list[tuple[Latencies, Callable[[Latencies], None]]], rounds: int) -> None:
    """Let all measure in turns; the first round warms up and does not count."""
    for round_number in range(rounds + 1):
        for measured, call in latencies:
            call(measured)
            if not round_number:
                measured.first.clear()
                measured.later.clear()


@torch.no_grad()
def bench_later_tokens(
    results: Results, folder: Path, layout: str, context_tokens: int, batch: int, rounds: int
):
    """A later token's cost in two parts: everything besides the blocks' arithmetic, and that arithmetic.

    The first is that of the same model with blocks that hand their input on, against the bare base.
    """
    base = load_base(folder / LAYOUTS[layout].size)
    model, empty = fused(folder, layout), pass_through(fused(folder, layout))
    ids = tokens(model, batch, QUESTION_TOKENS)
    context = model.project_context(*model.encode(tokens(model, batch, context_tokens)))
    bare, ours, besides = Latencies(), Latencies(), Latencies()
    in_turns(
        [
            (bare, lambda measured: measured.measure(base, ids)),
            (besides, lambda measured: measured.measure(empty, ids, context=context)),
            (ours, lambda measured: measured.measure(model, ids, context=context)),
        ],
        rounds,
    )
    whole, rest, reference = median(ours.later), median(besides.later), median(bare.later)
    results.add(
        "later_token_over_base",
        1e3 * rest,
        1e3 * reference,
        rest / reference,
        "ms/token besides the blocks",
        layout=layout,
        context=context_tokens,
        batch=batch,
        blocks_ms=round(1e3 * (whole - rest), 4),
        whole_ms=round(1e3 * whole, 4),
    )


@torch.no_grad()
def bench_against_prompt(
    results: Results, folder: Path, layout: str, rounds: int, context_tokens: int = 1500
) -> None:
    """First and later tokens, against the base with the context in its prompt (later tokens: cached)."""
    base, model = load_base(folder / LAYOUTS[layout].size), fused(folder, layout)
    context_ids, ids = tokens(model, 1, context_tokens), tokens(model, 1, QUESTION_TOKENS)
    prompt = torch.cat([context_ids, ids], 1)
    states, mask = model.encode(context_ids)
    context = model.project_context(states, mask)
    stored = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    prompted, ours, from_states = Latencies(), Latencies(), Latencies()
    in_turns(
        [
            (prompted, lambda measured: measured.measure(base, prompt)),
            (ours, lambda measured: measured.measure(model, ids, context=context)),
            (from_states, lambda measured: measured.measure(model, ids, **stored)),
        ],
        rounds,
    )
    settings = {"layout": layout, "context": context_tokens, "batch": 1}
    for row, mine, reference in (
        ("later_token_vs_prompt_1500", ours.later, prompted.later),
        ("first_token_vs_prompt_1500", ours.first, prompted.first),
        ("first_token_from_states_1500", from_states.first, prompted.first),
    ):
        results.add(
            row,
            1e3 * median(mine),
            1e3 * median(reference),
            median(reference) / median(mine),
            "ms",
            **settings,
        )


def train_step(model, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(
        batch["input_ids"],
        labels=batch["labels"],
        encoder_hidden_states=batch["states"],
        encoder_attention_mask=batch["mask"],
    ).loss.backward()


def original_step(model, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(batch["input_ids"], batch["states"], batch["mask"], batch["labels"]).backward()


def training_batch(model, num_labels: int) -> dict[str, torch.Tensor]:
    """4 rows of 512 context and 64 decoder tokens, the last of them labelled; one context is a quarter padding."""
    torch.manual_seed(2)
    ids = tokens(model, TRAIN_ROWS, TRAIN_TOKENS)
    labels = ids.clone()
    labels[:, : TRAIN_TOKENS - num_labels] = -100
    mask = torch.ones(TRAIN_ROWS, TRAIN_CONTEXT, dtype=torch.bool)
    mask[-1, -TRAIN_CONTEXT // 4 :] = False
    states = torch.randn(TRAIN_ROWS, TRAIN_CONTEXT, model.config.hidden_size)
    return {"input_ids": ids, "labels": labels, "states": states, "mask": mask}


def training_models(folder: Path, layout: str):
    return fused(folder, layout).train(), Original(fused(folder, layout, "eager").train())


def training_flops(model, num_labels: int) -> float:
    """Floating-point operations of one of our training steps: products of matrices, forward and backward.

    Frozen layers have no weight gradient, those below the lowest block no backward pass at all.
    """
    config = model.config
    d, tokens_, contexts = config.hidden_size, TRAIN_ROWS * TRAIN_TOKENS, TRAIN_ROWS * TRAIN_CONTEXT
    width = config.cross_attn_hidden_size
    kv = kv_cache_values(config) // config.num_hidden_layers
    mlp = 2 * tokens_ * 8 * d * d
    layer = 2 * tokens_ * (d * (d + kv) + d * d) + mlp + 4 * tokens_ * TRAIN_TOKENS * d
    layers_with_backward = (
        config.num_hidden_layers - min(config.cross_attn_layers) - config.cross_attn_final_layer
    )
    distinct = len(model.cross_attn_blocks)
    kv_width = width // config.cross_attn_num_attention_heads * config.cross_attn_num_key_value_heads
    attention = 4 * tokens_ * TRAIN_CONTEXT * width  # scores and weighted values
    projections = 2 * contexts * d * 2 * kv_width  # keys and values: no gradient with respect to the states
    block = 2 * tokens_ * (2 * d * width + 8 * d * width)
    head = 2 * TRAIN_ROWS * num_labels * d * config.vocab_size
    return (
        layer * (config.num_hidden_layers + layers_with_backward)
        + 2 * distinct * projections
        + 3 * config.num_cross_attn_layers * (block + attention)
        + 2 * head
    )


def bench_training(results: Results, folder: Path, layout: str, num_labels: int, rounds: int) -> None:
    model, original = training_models(folder, layout)
    batch = training_batch(model, num_labels)
    loss = model(
        batch["input_ids"],
        labels=batch["labels"],
        encoder_hidden_states=batch["states"],
        encoder_attention_mask=batch["mask"],
    ).loss
    torch.testing.assert_close(
        loss,
        original(batch["input_ids"], batch["states"], batch["mask"], batch["labels"]),
        atol=1e-4,
        rtol=1e-4,
    )
    d = model.config.hidden_size
    left, right = torch.randn(1024, d), torch.randn(d, 4 * d)
    seconds = interleaved(
        {
            "ours": partial(train_step, model, batch),
            "original": partial(original_step, original, batch),
            "matmul": lambda: [left @ right for _ in range(8)],
        },
        rounds,
    )
    settings = {
        "layout": layout,
        "rows": TRAIN_ROWS,
        "context": TRAIN_CONTEXT,
        "tokens": TRAIN_TOKENS,
        "labels": num_labels,
    }
    ours, reference = seconds["ours"], seconds["original"]
    results.add(f"train_step_{layout}", 1e3 * ours, 1e3 * reference, reference / ours, "ms/step", **settings)
    rate, peak = (
        training_flops(model, num_labels) / ours,
        8 * 2 * left.numel() * right.shape[1] / seconds["matmul"],
    )
    results.add(
        "train_flops_share",
        rate / 1e9,
        peak / 1e9,
        rate / peak,
        "GFLOP/s, of a plain matrix product",
        **settings,
    )
    memory = {which: peak_memory(folder, layout, num_labels, which) for which in ("ours", "original")}
    results.add(
        f"train_peak_memory_{layout}",
        memory["ours"],
        memory["original"],
        memory["ours"] / memory["original"],
        "MB above the loaded model",
        **settings,
    )


def peak_memory(folder: Path, layout: str, num_labels: int, which: str) -> float:
    """MB by which three training steps raise the peak of a fresh process."""
    command = [sys.executable, __file__, "--peak_memory", which, "--layout", layout, "--folder", str(folder)]
    command += ["--labels", str(num_labels)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(folder: Path, layout: str, num_labels: int, which: str) -> None:
    model = fused(folder, layout, "sdpa" if which == "ours" else "eager").train()
    batch = training_batch(model, num_labels)
    step, model = (train_step, model) if which == "ours" else (original_step, Original(model))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_status("VmRSS")
    for _ in range(3):
        step(model, batch)
    print(json.dumps((memory_status("VmHWM") - before) / 1024))


def memory_status(field: str) -> int:
    """kB of a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed rounds, of which the median counts (%(default)s)"
    )
    parser.add_argument("--only", choices=["generation", "training"], help="one half of the rows")
    parser.add_argument("--peak_memory", choices=["ours", "original"], help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    if args.peak_memory:
        return print_peak_memory(args.folder, args.layout, args.labels, args.peak_memory)

    start = time.perf_counter()
    results = Results("model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in SIZES:
            random_base(size, folder)
        if args.only != "training":
            for layout in GENERATION:
                for context_tokens, batch in itertools.product((512, 1500), (1, 8)):
                    bench_later_tokens(results, folder, layout, context_tokens, batch, args.rounds)
                bench_against_prompt(results, folder, layout, args.rounds)
        if args.only != "generation":
            for layout in TRAINING:
                for num_labels in TRAIN_LABELS if layout in DENSE else TRAIN_LABELS[-1:]:
                    bench_training(results, folder, layout, num_labels, args.rounds)
    results.write()
    print(f"{time.perf_counter() - start:.0f} s")
    return None


if __name__ == "__main__":
    main()
