"""What an answer costs: seconds to its first token, tokens a second after it, bytes kept for each context token.

One question at a time, greedy, on a CPU with one thread: more of them make figures depend on what else the machine
does. Encodings and KV caches lie in one safetensors file for each context and are read from it every time. Systems
take turns and medians count, so that a busy machine is unfair to none.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import GPTBigCodeForCausalLM
from transformers.generation.streamers import BaseStreamer

from dssk.models.configuration import CrossAttnGPTBigCodeConfig
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM
from dssk.research.prompted import PrefixCache, Prompt, cache_bytes_per_token
from dssk.utils import files

NEW_TOKENS = 17
# A model of 124 million parameters, as large as answers in seconds on a CPU; blocks as in the base experiment.
MEDIUM: dict[str, Any] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "vocab_size": 49152,
    "n_positions": 2048,
    "num_cross_attn_layers": 4,
    "cross_attn_layers_stride": 2,
    "cross_attn_shared_weights": True,
}
MEDIUM_CONTEXT, MEDIUM_QUESTION, MEDIUM_CONTEXTS = 1500, 16, 3

Generate = Callable[[Prompt, BaseStreamer], Any]


class Clock(BaseStreamer):
    """When each token came, in seconds since the clock was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter() - self.start)  # the first call is with the prompt

    def end(self) -> None:
        pass

    @property
    def first_token(self) -> float:
        """Seconds to the first new token."""
        return self.seconds[1]

    @property
    def tokens_per_second(self) -> float:
        """The rate of those after it."""
        return (len(self.seconds) - 2) / (self.seconds[-1] - self.seconds[1])


def measure(systems: dict[str, Generate], prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """Medians over `prompts` of each system, which take turns; the first prompt warms up as well."""
    clocks: dict[str, list[Clock]] = {name: [] for name in systems}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, prompt in enumerate(tqdm([prompts[0], *prompts], desc="cost", disable=None)):
            for name, generate in systems.items():
                clock = Clock()
                generate(prompt, clock)
                if number:
                    clocks[name].append(clock)
    finally:
        torch.set_num_threads(threads)
    return {
        name: {
            "first_token_s": round(median(clock.first_token for clock in taken), 6),
            "tokens_per_s": round(median(clock.tokens_per_second for clock in taken), 2),
        }
        for name, taken in clocks.items()
    }


def prompting(model: GPTBigCodeForCausalLM) -> Generate:
    """Read the whole prompt."""
    return lambda prompt, clock: _generate(model, prompt.tokens, clock)


def prefix_cached(model: GPTBigCodeForCausalLM, prompts: Sequence[Prompt], folder: Path) -> Generate:
    """Read the context's keys and values from disk, then the question."""
    cache = PrefixCache(model, folder)
    for prompt in prompts:
        cache.load([prompt.context])  # makes the file
    return lambda prompt, clock: _generate(
        model, prompt.tokens, clock, past_key_values=cache.load([prompt.context])
    )


def cross_attending(
    model: CrossAttnGPTBigCodeForCausalLM, prompts: Sequence[Prompt], folder: Path
) -> Generate:
    """Read the context's encodings from disk, project them, then read the question."""
    files.make_folder(folder)
    paths = {}
    for number, prompt in enumerate(prompts):
        states, _ = model.encode(torch.tensor([prompt.context], device=model.device))
        paths[tuple(prompt.context)] = folder / f"{number}.safetensors"
        save_file({"states": states.to(torch.bfloat16).cpu().contiguous()}, paths[tuple(prompt.context)])

    def generate(prompt: Prompt, clock: BaseStreamer) -> None:
        with torch.no_grad():
            states = load_file(paths[tuple(prompt.context)])["states"].to(model.device)
            context = model.project_context(states)
        _generate(model, prompt.question, clock, context=context)

    return generate


def _generate(model: Any, tokens: list[int], clock: BaseStreamer, **kwargs: Any) -> None:
    ids = torch.tensor([tokens], device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=model.config.eos_token_id,
        streamer=clock,
        **kwargs,
    )


def medium(folder: Path) -> list[dict[str, Any]]:
    """The costs of a random model of 124 million parameters at contexts of 1500 tokens; `folder` holds what it caches.

    Its weights are random, so there is nothing to score.
    """
    torch.manual_seed(0)
    config = CrossAttnGPTBigCodeConfig(**MEDIUM, bos_token_id=0, eos_token_id=0)
    model = CrossAttnGPTBigCodeForCausalLM(config).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    context, question = (
        torch.randint(5, config.vocab_size, (MEDIUM_CONTEXTS, count)).tolist()
        for count in (MEDIUM_CONTEXT, MEDIUM_QUESTION)
    )
    prompts = [Prompt(*parts, was_cut=False) for parts in zip(context, question, strict=True)]
    systems = {
        "cross_attention": cross_attending(model, prompts, folder / "states"),
        # Without a context the model is its base.
        "prompted": prompting(model),
        "prompted_prefix_cache": prefix_cached(model, prompts, folder / "prefix_cache"),
    }
    costs = measure(systems, prompts)
    num_bytes = {
        "cross_attention": model.config.n_embd * torch.bfloat16.itemsize,
        "prompted": 0,
        "prompted_prefix_cache": cache_bytes_per_token(model),
    }
    trained, _ = model.trainable_parameters()
    settings = {
        **MEDIUM,
        "context_tokens": MEDIUM_CONTEXT,
        "question_tokens": MEDIUM_QUESTION,
        "weights": "random",
    }
    settings |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    return [
        {
            "system": name,
            "trained_parameters": trained if name == "cross_attention" else 0,
            "bytes_per_context_token": num_bytes[name],
            **costs[name],
            "settings": settings,
        }
        for name in systems
    ]
