import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import Trainer

from dssk.data.collate import Collator
from dssk.errors import DsskError
from dssk.evaluation.questions import Question
from dssk.inference.loading import load_base
from dssk.inference.tokenizer import load_tokenizer
from dssk.research.finetune import FineTuning, _example, fine_tuned, prefix_loss, whole
from tests.conftest import question_rows
from tests.families import tiny_base

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
    example = whole(_example(tokenizer, Question("0", "who", "the mill", ["Ann"]), 256, loss_on))
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


def test_adapters_train_in_fp32_on_a_base_in_bfloat16(base_path, tokenizer, tmp_path, monkeypatch):
    seen = set()
    step = Trainer.training_step

    def looked_at(self, model, *args, **kwargs):
        seen.update((parameter.requires_grad, parameter.dtype) for parameter in model.parameters())
        seen.add(model.config._attn_implementation)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", looked_at)
    settings = replace(SETTINGS, method="lora", bf16=True)
    model, _ = fine_tuned(base_path, None, tokenizer, QUESTIONS, settings, tmp_path / "lora")
    assert seen == {(True, torch.float32), (False, torch.bfloat16), "sdpa"}
    assert model.dtype == torch.float32


def test_prompts_that_share_their_context_learn_as_whole_ones_do(tokenizer, tmp_path):
    """Rotary positions: whatever is wrong with where a text goes on shows."""
    tiny_base("llama", tmp_path, vocab_size=len(tokenizer), max_position_embeddings=256)
    model = load_base(tmp_path, dtype=torch.float32)
    examples = [_example(tokenizer, question, 256, "answer") for question in QUESTIONS[:4]]
    batch = Collator(tokenizer.pad_token_id, share_contexts=True)(examples)
    assert len(batch["context_input_ids"]) == 2
    labels = sum(len(example["labels"]) - example["labels"].count(-100) for example in examples)
    total = 0.0
    for example in examples:
        ids, wanted = (torch.tensor([whole(example)[name]]) for name in ("input_ids", "labels"))
        total += model(ids, labels=wanted).loss * (wanted != -100).sum()
    loss = prefix_loss(model, batch)
    assert loss.item() == pytest.approx((total / labels).item(), abs=1e-5)


def test_shared_contexts_are_trained_on_until_the_minutes_are_over(
    base_path, tokenizer, tmp_path, monkeypatch, capsys
):
    ticks = itertools.count()
    monkeypatch.setattr("dssk.training.budget.time", SimpleNamespace(process_time=lambda: float(next(ticks))))
    settings = replace(
        SETTINGS, method="lora", steps=1000, questions_per_context=2, batch_size=4, minutes=2.5
    )
    fine_tuned(base_path, None, tokenizer, QUESTIONS, settings, tmp_path / "lora")
    facts = json.loads((tmp_path / "lora" / "settings.json").read_text())
    assert 150 <= facts["cpu_seconds"] < 160
    assert 8 <= facts["questions"] < 500
    told = re.findall(r"^lora  step \d+, (\d\.\d) of 2\.5 CPU minutes  loss", capsys.readouterr().out, re.M)
    assert [minutes[0] for minutes in told] == ["1", "2", "2"]  # each minute, and at the end


class Killed(BaseException):
    """What no code catches, as a kill."""


def stopped_after(step, monkeypatch, train):
    """Run a fine-tuning that ends like a kill after `step` steps; each is saved."""
    original = Trainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("dssk.research.finetune.SAVED_SECONDS", 0)
        patched.setattr(Trainer, "training_step", dying)
        with pytest.raises(Killed):
            train()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_fine_tuning_that_was_stopped_equals_one_that_was_not(
    method, base_path, tokenizer, tmp_path, monkeypatch, capsys
):
    # Two steps an epoch: the second start begins in the middle of one.
    settings = replace(SETTINGS, method=method, steps=5, batch_size=4, questions_per_context=2)

    def train(name):
        return fine_tuned(base_path, None, tokenizer, QUESTIONS, settings, tmp_path / name)[0]

    stopped_after(3, monkeypatch, lambda: train("stopped"))
    assert [path.name for path in (tmp_path / "stopped.training").iterdir()] == ["checkpoint-3"]
    steps = []
    original = Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *args: steps.append(args) or original(self, *args)
    )
    again = train("stopped")
    assert len(steps) == 2
    assert re.search(rf"^{method:5} goes on from .*checkpoint-3$", capsys.readouterr().out, re.M)
    for ours, theirs in zip(again.parameters(), train("whole").parameters(), strict=True):
        assert torch.equal(ours, theirs)
    facts = [json.loads((tmp_path / name / "settings.json").read_text()) for name in ("stopped", "whole")]
    assert facts[0]["questions"] == facts[1]["questions"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_fine_tuning_goes_on_only_from_its_own_checkpoints(
    base_path, tokenizer, tmp_path, monkeypatch, capsys
):
    def train(**changes):
        settings = replace(SETTINGS, method="lora", steps=5, **changes)
        return fine_tuned(base_path, None, tokenizer, QUESTIONS, settings, tmp_path / "lora")

    stopped_after(2, monkeypatch, train)
    train(seed=1)
    assert "goes on" not in capsys.readouterr().out
    stopped_after(2, monkeypatch, train)
    (weights,) = tmp_path.glob("lora.training/checkpoint-2/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DsskError, match="lora.training is whole: remove it to start this fine-tuning afresh"):
        train()


def test_the_minutes_of_a_fine_tuning_count_over_all_its_starts(
    base_path, tokenizer, tmp_path, monkeypatch, capsys
):
    ticks = itertools.count()
    monkeypatch.setattr("dssk.training.budget.time", SimpleNamespace(process_time=lambda: float(next(ticks))))
    settings = replace(SETTINGS, method="lora", steps=1000, minutes=2.5)

    def train(name):
        fine_tuned(base_path, None, tokenizer, QUESTIONS, settings, tmp_path / name)
        return json.loads((tmp_path / name / "settings.json").read_text())

    stopped_after(20, monkeypatch, lambda: train("stopped"))
    stopped, whole = train("stopped"), train("whole")
    assert "goes on from" in capsys.readouterr().out
    assert 150 <= stopped["cpu_seconds"] < 160
    # A start and each of the saves take a few ticks themselves.
    assert 20 * 2 < stopped["questions"] <= whole["questions"] + 4
