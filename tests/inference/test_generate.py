import pytest
import torch

from dssk import prompts
from dssk.inference.generate import answer_nll, generate_answers, generate_batch
from dssk.inference.tokenizer import load_tokenizer
from dssk.store.format import load_rows
from tests.conftest import fused


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(scope="module")
def rows(store_path):
    return load_rows(store_path)["val"]


def test_answers_of_a_batch_are_those_one_by_one(base_path, tokenizer, rows):
    model = fused(base_path)
    questions, contexts = rows["question"], rows["encoder_hidden_states"]

    def states(i):
        return contexts[i]

    together = generate_answers(model, tokenizer, questions, states, batch_size=5, max_new_tokens=8)
    for i, question in enumerate(questions):
        (single,) = generate_answers(
            model, tokenizer, [question], lambda _, i=i: contexts[i], 1, max_new_tokens=8
        )
        assert together[i] == single


def test_the_context_decides_the_answer(base_path, tokenizer, rows):
    model = fused(base_path)
    questions = [rows[0]["question"]] * len(rows)
    contexts = rows["encoder_hidden_states"]
    answers = generate_answers(model, tokenizer, questions, lambda i: contexts[i], 4, max_new_tokens=8)
    assert len(set(answers)) > 1
    assert len(set(generate_answers(model, tokenizer, questions, lambda i: None, 4, max_new_tokens=8))) == 1


@pytest.mark.parametrize("with_context", [True, False])
def test_the_likelihood_is_that_of_the_answers_tokens_alone(base_path, tokenizer, rows, with_context):
    model = fused(base_path)
    contexts = rows["encoder_hidden_states"] if with_context else [None] * len(rows)
    questions, answers = rows["question"], rows["answer"]
    losses = answer_nll(model, tokenizer, questions, answers, lambda i: contexts[i], batch_size=5)
    for i, loss in enumerate(losses):
        prompt = tokenizer(prompts.question(questions[i]), return_tensors="pt")["input_ids"]
        target = tokenizer(prompts.answer(answers[i]) + "<|endoftext|>", return_tensors="pt")["input_ids"]
        labels = torch.cat([torch.full_like(prompt, -100), target], 1)
        states = {} if contexts[i] is None else {"encoder_hidden_states": contexts[i][None]}
        with torch.no_grad():
            expected = model(torch.cat([prompt, target], 1), labels=labels, **states).loss
        assert loss == pytest.approx(expected.item(), abs=1e-4)


def test_an_answer_is_the_first_line(tokenizer):
    class Talkative:
        device = "cpu"

        def generate(self, input_ids, **kwargs):
            return torch.cat(
                [input_ids, tokenizer(" Ann \nquestion: and", return_tensors="pt")["input_ids"]], 1
            )

    assert generate_batch(Talkative(), tokenizer, [[5, 6]], 8) == ["Ann"]
