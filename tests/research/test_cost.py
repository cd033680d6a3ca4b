from types import SimpleNamespace

import pytest
import torch

from dssk.inference.timing import Clock
from dssk.research import cost
from dssk.research.cost import cross_attending, measure, medium, prefix_cached, prompting
from dssk.research.prompted import Prompt
from tests.conftest import fused

PROMPTS = [Prompt(list(range(5, 5 + n)), list(range(50, 60)), False) for n in (40, 60)]


def test_medians_tell_the_first_token_from_those_after_it(monkeypatch):
    seconds = 0.0
    monkeypatch.setattr("dssk.inference.timing.time", SimpleNamespace(perf_counter=lambda: seconds))

    def generate(prompt, clock):
        nonlocal seconds
        clock.put(None)
        seconds += 0.04
        clock.put(None)
        for _ in range(4):
            seconds += 0.01
            clock.put(None)

    taken = measure({"slept": generate}, PROMPTS)["slept"]
    assert taken == {"first_token_s": pytest.approx(0.04), "tokens_per_s": pytest.approx(100)}


def test_every_system_generates_all_tokens_and_reads_what_it_should(base_path, tmp_path):
    model = fused(base_path)
    systems = {
        "prompted": prompting(model),
        "cached": prefix_cached(model, PROMPTS, tmp_path / "cache"),
        "cross": cross_attending(model, PROMPTS, tmp_path / "states"),
    }
    read: list[int] = []

    def count(module, args):
        read.append(args[0].shape[1])

    model.base_model.register_forward_pre_hook(count)
    for name, prompt_tokens in {"prompted": 70, "cached": 10, "cross": 10}.items():
        clock = Clock()
        systems[name](PROMPTS[1], clock)
        assert len(clock.seconds) == 1 + cost.NEW_TOKENS
        assert read == [prompt_tokens] + [1] * (cost.NEW_TOKENS - 1)
        read.clear()
    assert (tmp_path / "states" / "1.safetensors").stat().st_size == pytest.approx(60 * 32 * 2, abs=100)


def test_costs_of_a_random_model_need_nothing_but_a_folder(tmp_path, monkeypatch):
    small = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 256}
    monkeypatch.setattr(cost, "MEDIUM", cost.MEDIUM | small)
    monkeypatch.setattr(cost, "MEDIUM_CONTEXT", 100)
    state = torch.random.get_rng_state()
    rows = medium(tmp_path)
    torch.random.set_rng_state(state)
    assert [row["system"] for row in rows] == ["cross_attention", "prompted", "prompted_prefix_cache"]
    assert [row["bytes_per_context_token"] for row in rows] == [64, 0, 2 * 12 * 8 * 4]
    assert rows[0]["trained_parameters"] > rows[1]["trained_parameters"] == 0
    assert all(row["first_token_s"] > 0 and row["tokens_per_s"] > 0 for row in rows)
