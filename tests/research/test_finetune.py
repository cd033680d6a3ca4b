import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from dssk.evaluation.questions import Question
from dssk.inference.tokenizer import load_tokenizer
from dssk.research.finetune import FineTuning, _example, fine_tuned
from tests.conftest import question_rows

SETTINGS = FineTuning(
    method="full",
    base="b",
    data="d",
    loss_on="all",
    steps=3,
    batch_size=2,
    learning_rate=1e-2,
    lora_rank=2,
    seed=0,
)
QUESTIONS = [Question(r["id"], r["question"], r["context"], [r["answer"]]) for r in question_rows(8)]


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_the_context_is_read_and_not_learned(tokenizer, loss_on):
    example = _example(tokenizer, Question("0", "who", "the mill", ["Ann"]), 256, loss_on)
    assert tokenizer.decode(example["input_ids"]) == (
        "context: the mill \n question: who \n answer: Ann<|endoftext|>"
    )
    learned = [token for token in example["labels"] if token != -100]
    assert tokenizer.decode(learned) == (
        " \n question: who \n answer: Ann<|endoftext|>" if loss_on == "all" else " Ann<|endoftext|>"
    )
    assert example["input_ids"][-len(learned) :] == learned


def test_every_weight_or_only_adapters_are_trained_and_kept(base, base_path, tokenizer, tmp_path, capsys):
    def train(method, seed=0):
        settings = replace(SETTINGS, method=method, seed=seed)
        return fine_tuned(base_path, None, tokenizer, QUESTIONS, settings, tmp_path / method)

    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    full, count = train("full")
    assert count == sum(p.numel() for p in base.parameters())
    assert not torch.equal(full.transformer.wte.weight, base.transformer.wte.weight)
    lora, count = train("lora")
    # c_attn 32 -> 48, c_proj 32 -> 32, c_fc 32 -> 128, c_proj 128 -> 32, rank 2, in 4 layers
    assert count == 4 * 2 * (80 + 64 + 160 + 160)
    assert torch.equal(lora.transformer.wte.weight, base.transformer.wte.weight)
    assert not torch.equal(lora.transformer.h[0].attn.c_attn.weight, base.transformer.h[0].attn.c_attn.weight)
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == count  # noqa: SIM118 - not a dict
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert "lora  step 3/3  loss" in capsys.readouterr().out

    again, _ = train("lora")
    assert "step" not in capsys.readouterr().out  # equal settings: nothing is trained again
    for ours, theirs in zip(again.parameters(), lora.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    train("lora", seed=1)
    assert "step 3/3" in capsys.readouterr().out
    assert json.loads((tmp_path / "lora" / "settings.json").read_text())["settings"]["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "lora"]
