import pytest
import torch
from transformers import GenerationConfig

from dssk import prompts
from dssk.inference.generation import answer_in, context_batch, generate_batch, nll_batch
from dssk.inference.tokenizer import load_tokenizer, tokenize_answer, tokenize_question
from dssk.store.dataset import load_rows
from tests.conftest import fused


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(scope="module")
def rows(store_path):
    return load_rows(store_path)["val"]


@pytest.mark.parametrize("with_context", [True, False])
def test_the_likelihood_is_that_of_the_answers_tokens_alone(base_path, tokenizer, rows, with_context):
    model = fused(base_path)
    prompted = [tokenize_question(tokenizer, question) for question in rows["question"]]
    targets = [tokenize_answer(tokenizer, answer) for answer in rows["answer"]]
    contexts = rows["encoder_hidden_states"]
    context = context_batch(model, contexts if with_context else [])
    losses = nll_batch(model, tokenizer, prompted, targets, **context)
    for i, loss in enumerate(losses):
        prompt = tokenizer(prompts.question(rows["question"][i]), return_tensors="pt")["input_ids"]
        target = tokenizer(prompts.answer(rows["answer"][i]) + "<|endoftext|>", return_tensors="pt")[
            "input_ids"
        ]
        labels = torch.cat([torch.full_like(prompt, -100), target], 1)
        states = {"encoder_hidden_states": contexts[i][None]} if with_context else {}
        with torch.no_grad():
            expected = model(torch.cat([prompt, target], 1), labels=labels, **states).loss
        assert loss == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(
    ("generated", "answer"),
    [(" Ann \nquestion: and", "Ann"), ("\n\n Ann", "Ann"), (" Ann\t\n", "Ann"), ("", ""), (" \n ", "")],
)
def test_an_answer_is_the_first_line_that_is_not_empty(generated, answer):
    assert answer_in(generated) == answer


def test_what_is_generated_is_cut_to_the_answer(tokenizer):
    class Talkative:
        device = "cpu"

        def generate(self, input_ids, **kwargs):
            more = tokenizer(" Ann \nquestion: and", return_tensors="pt")["input_ids"]
            return torch.cat([input_ids, more], 1)

    assert generate_batch(Talkative(), tokenizer, [[5, 6]], 8) == ["Ann"]


@pytest.mark.parametrize("reader", ["cross_attention", "merged"])
@pytest.mark.parametrize(
    "theirs",
    [
        {"repetition_penalty": 9.0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"suppress_tokens": list(range(20, 200))},
        {"bos_token_id": {"text": 0}},
    ],
)
def test_answers_are_greedy_whatever_the_base_comes_with(base_path, tokenizer, rows, theirs, reader):
    model = fused(base_path, reader=reader)
    prompted = [tokenize_question(tokenizer, question) for question in rows["question"]]
    context = context_batch(model, rows["encoder_hidden_states"])
    plain = generate_batch(model, tokenizer, prompted, 8, **context)
    model.generation_config = GenerationConfig(**theirs)
    assert generate_batch(model, tokenizer, prompted, 8, **context) == plain


@pytest.mark.parametrize("form", ["keyword", "configuration"])
def test_settings_that_are_asked_for_are_heeded(base_path, tokenizer, rows, form):
    model = fused(base_path)
    prompted = [tokenize_question(tokenizer, question) for question in rows["question"]]
    context = context_batch(model, rows["encoder_hidden_states"])
    plain = generate_batch(model, tokenizer, prompted, 8, **context)
    asked = {"suppress_tokens": [*range(20, 200)]}
    how = asked if form == "keyword" else {"generation_config": GenerationConfig(**asked)}
    assert generate_batch(model, tokenizer, prompted, 8, **how, **context) != plain


def test_a_context_that_nothing_would_read_is_refused(base, base_path, tokenizer):
    model = fused(base_path)
    context = context_batch(model, [torch.randn(3, 32)])
    for call in (
        lambda **context: generate_batch(base, tokenizer, [[5]], 2, **context),
        lambda **context: nll_batch(base, tokenizer, [[5]], [[6]], **context),
    ):
        with pytest.raises(ValueError, match="context for a GPTBigCodeForCausalLM, which has no blocks"):
            call(**context)
        with pytest.raises(ValueError, match="encoder_hidden_states for a GPTBigCode"):
            call(encoder_hidden_states=torch.randn(1, 3, 32))
    with pytest.raises(ValueError, match="want one of them"):
        generate_batch(model, tokenizer, [[5]], 2, encoder_hidden_states=torch.randn(1, 3, 32), **context)
