"""The cost of an answer: seconds to its first token, tokens per second after it, bytes for each context token.

One question at a time, greedy, on a CPU with one thread: more of them make figures depend on what else the machine
does. Encodings and KV caches lie in one safetensors file for each context and are read from it every time. Systems
take turns and medians count, so that a busy machine is unfair to none.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dssk.inference.auto import family
from dssk.inference.encoding import Encoder
from dssk.inference.generation import context_batch, greedy
from dssk.inference.loading import FusedModel, device
from dssk.inference.rounding import DEFAULT_STORAGE, encoding_bytes
from dssk.inference.timing import Clock
from dssk.research.prompted import PrefixCache, Prompt, cache_bytes_per_token
from dssk.utils import files

NEW_TOKENS = 17
# A model of 124 million parameters, as large as answers in seconds on a CPU; blocks as in the base experiment.
MEDIUM: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "num_cross_attn_layers": 4,
    "cross_attn_layers_stride": 2,
    "cross_attn_shared_weights": True,
}
MEDIUM_CONTEXT, MEDIUM_QUESTION, MEDIUM_CONTEXTS = 1500, 16, 3

Asked = TypeVar("Asked")  # what all systems are asked alike: a prompt, or the number of a question
Generate = Callable[[Asked, BaseStreamer], Any]


def measure(systems: dict[str, Generate[Asked]], prompts: Sequence[Asked]) -> dict[str, dict[str, float]]:
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


def prompting(model: PreTrainedModel, before: Sequence[int] = ()) -> Generate[Prompt]:
    """Prefill of the whole prompt, after the tokens `before` it."""
    return lambda prompt, clock: stream(model, [*before, *prompt.tokens], clock)


def prefix_cached(model: PreTrainedModel, prompts: Sequence[Prompt], folder: Path) -> Generate[Prompt]:
    """Read the context's keys and values from disk, then the question."""
    cache = PrefixCache(model, folder)
    for prompt in prompts:
        cache.load([prompt.context])  # makes the file
    return lambda prompt, clock: stream(
        model, prompt.tokens, clock, past_key_values=cache.load([prompt.context])
    )


def cross_attending(model: FusedModel, prompts: Sequence[Prompt], folder: Path) -> Generate[Prompt]:
    """Read the context's encodings from disk, project them, then read the question."""
    files.make_folder(folder)
    paths = {}
    for number, prompt in enumerate(prompts):
        (states,) = Encoder(model).encode([""], input_ids=[prompt.context])
        paths[tuple(prompt.context)] = folder / f"{number}.safetensors"
        save_file({"states": states.cpu().contiguous()}, paths[tuple(prompt.context)])

    def generate(prompt: Prompt, clock: BaseStreamer) -> None:
        with torch.no_grad():
            states = load_file(paths[tuple(prompt.context)])["states"]
            context = context_batch(model, [states])
        stream(model, prompt.question, clock, **context)

    return generate


def stream(model: Any, tokens: list[int], clock: BaseStreamer, **kwargs: Any) -> None:
    """Answer one prompt with `NEW_TOKENS` tokens, each of which the clock sees."""
    ids = torch.tensor([tokens], device=model.device)
    how = greedy(NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0)  # one row: nothing is padded
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how, streamer=clock, **kwargs)


def medium(folder: Path) -> list[dict[str, Any]]:
    """The costs of a random model of 124 million parameters at contexts of 1500 tokens; `folder` holds what it caches.

    Its weights are random, so there is nothing to score.
    """
    torch.manual_seed(0)
    classes = family("gpt_bigcode")
    config = classes.config(**MEDIUM, bos_token_id=0, eos_token_id=0)
    model = classes.causal_lm(config).eval()
    model.to(device())
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
        "cross_attention": encoding_bytes(DEFAULT_STORAGE, model.config.hidden_size),
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
