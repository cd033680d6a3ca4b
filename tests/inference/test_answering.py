"""`model.answer`, whatever its contexts are given as."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dssk import prompts
from dssk.errors import DsskError
from dssk.evaluation.evaluate import CrossAttentionSystem
from dssk.evaluation.questions import load_questions
from dssk.inference import encoding
from dssk.inference.encoding import Encoder
from dssk.inference.generation import context_batch, generate_batch
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import fused

TEXTS = ["Mill 1 was built in 1701.", "The bridge of Aston is longer than the mill is high.", "Ann."]
QUESTIONS = ["when", "how long is the bridge", "who is it", "where does it lie"]


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(scope="module")
def model(base_path):
    return loud(base_path)


def loud(base_path):
    """Random blocks, but loud enough that every context changes the answer."""
    model = fused(base_path)
    with torch.no_grad():
        for block in model.cross_attn_blocks:
            block.attn.c_proj.weight.mul_(40)
            block.attn.q_attn.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def states(model, tokenizer):
    """Encoder states (S, d) of a text, encoded alone."""

    def states(text: str) -> torch.Tensor:
        ids = tokenizer(prompts.context(text), return_tensors="pt")["input_ids"]
        return model.encode(ids)[0][0].to(torch.bfloat16)

    return states


def one_by_one(model, tokenizer, questions, contexts: list) -> list[str]:
    """Reference: each question in a batch of its own, from states or None."""
    answers = []
    for question, context in zip(questions, contexts, strict=True):
        ids = tokenizer(prompts.question(question))["input_ids"]
        given = {} if context is None else context_batch(model, [context])
        answers += generate_batch(model, tokenizer, [ids], 32, **given)
    return answers


def test_texts_states_and_a_projection_give_the_same_answers(model, tokenizer, states):
    contexts = [states(text) for text in (TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2])]
    texts = [TEXTS[0], TEXTS[1], TEXTS[1], TEXTS[2]]
    expected = one_by_one(model, tokenizer, QUESTIONS, contexts)
    assert len(set(expected)) == 4
    assert model.answer(QUESTIONS, texts, tokenizer) == expected
    assert model.answer(QUESTIONS, contexts, tokenizer) == expected
    assert model.answer(QUESTIONS, contexts, tokenizer, batch_size=3) == expected
    of_one = one_by_one(model, tokenizer, QUESTIONS, [contexts[1]] * 4)
    assert of_one != expected
    projected = model.project_context(contexts[1][None])
    for shared in (TEXTS[1], contexts[1], projected):
        assert model.answer(QUESTIONS, shared, tokenizer) == of_one
        assert model.answer(QUESTIONS[2], shared, tokenizer) == of_one[2]


def test_without_a_context_it_is_the_base_even_beside_questions_that_have_one(model, base, tokenizer, states):
    ids = tokenizer(prompts.question(QUESTIONS[0]), return_tensors="pt")["input_ids"]
    output = base.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=4)[0, ids.shape[1] :]
    expected = tokenizer.decode(output, skip_special_tokens=True).strip().splitlines()[0].rstrip()
    assert model.answer(QUESTIONS[0], None, tokenizer) == expected
    mixed = model.answer(QUESTIONS, [[], TEXTS[0], TEXTS[1], None], tokenizer)
    assert mixed == one_by_one(model, tokenizer, QUESTIONS, [None, states(TEXTS[0]), states(TEXTS[1]), None])


def test_several_contexts_are_encoded_apart_and_attended_to_together(model, tokenizer, states):
    joined = torch.cat([states(TEXTS[0]), states(TEXTS[2])])
    expected = one_by_one(model, tokenizer, QUESTIONS[:1], [joined])
    assert expected != one_by_one(model, tokenizer, QUESTIONS[:1], [states(TEXTS[0])])
    assert model.answer(QUESTIONS[:1], [[TEXTS[0], states(TEXTS[2])]], tokenizer) == expected
    assert model.answer(QUESTIONS[0], [TEXTS[0], TEXTS[2]], tokenizer) == expected[0]


def test_a_text_is_encoded_once_and_projected_once_for_all_its_questions(model, tokenizer, monkeypatch):
    encoded, projected = [], []
    encode, project = encoding.encode, model.project_context
    monkeypatch.setattr(
        encoding,
        "encode",
        lambda model, ids, *rest: encoded.append(ids.shape[0]) or encode(model, ids, *rest),
    )
    monkeypatch.setattr(
        model,
        "project_context",
        lambda states, mask, lengths, groups: (
            projected.append(len(lengths)) or project(states, mask, lengths, groups)
        ),
    )
    model.answer([f"question {i}" for i in range(40)], TEXTS[0], tokenizer, max_new_tokens=2)
    assert sum(encoded) == 1
    assert projected == [1, 1]  # batches of 32 and 8
    encoded.clear(), projected.clear()
    model.answer(
        [f"question {i}" for i in range(40)], [TEXTS[i % 3] for i in range(40)], tokenizer, max_new_tokens=2
    )
    assert sum(encoded) == 3
    assert max(projected) <= 3


def test_the_tokenizer_is_found_where_the_model_was_loaded_from(model, tokenizer, base_path, tmp_path):
    expected = model.answer(QUESTIONS, TEXTS[1], tokenizer)
    assert model.answer(QUESTIONS, TEXTS[1]) == expected
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).answer(QUESTIONS, TEXTS[1]) == expected


def test_what_cannot_be_answered_is_said(model, tokenizer):
    with pytest.raises(DsskError, match="has 244 tokens, with 32 new ones more than the model's 256"):
        model.answer("x" * 224, TEXTS[0], tokenizer)
    with pytest.raises(ValueError, match="got 2 questions and contexts for 3"):
        model.answer(QUESTIONS[:2], TEXTS, tokenizer)
    with pytest.raises(ValueError, match="questions are texts"):
        model.answer([5], TEXTS[0], tokenizer)
    with pytest.raises(ValueError, match="one answer a question"):
        model.answer(QUESTIONS[0], TEXTS[0], tokenizer, num_return_sequences=2, num_beams=2)
    assert model.answer([], [], tokenizer) == []
    assert model.answer(QUESTIONS[0], TEXTS[0], tokenizer, num_beams=3)
    assert model.answer(QUESTIONS[0], "long " * 100, tokenizer)  # cut to the model's positions


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (5, "a context is int: want a text"),
        ([5], "a context is int"),
        (torch.ones(3), r"a context is a tensor \(3,\)"),
        (torch.ones(1, 3, 32), r"a context is a tensor \(1, 3, 32\)"),
        (torch.ones(3, 16), r"a tensor \(3, 16\): want a text, encoder states \(tokens, 32\)"),
        ({"a": "text"}, "a context is dict"),
    ],
)
def test_what_is_no_context_is_refused(model, tokenizer, contexts, message):
    with pytest.raises(ValueError, match=message):
        model.answer(QUESTIONS[0], contexts, tokenizer)


def test_contexts_of_several_questions_must_be_a_list(model, tokenizer):
    with pytest.raises(ValueError, match="contexts are dict"):
        model.answer(QUESTIONS[:2], {"a": "text"}, tokenizer)


@pytest.mark.parametrize("name", ["context", "encoder_hidden_states", "context_input_ids"])
def test_a_context_beside_the_contexts_is_refused(model, tokenizer, name):
    with pytest.raises(ValueError, match=f"got {name} as an argument of generate"):
        model.answer(QUESTIONS[0], TEXTS[0], tokenizer, **{name: torch.ones(1, 3, 32)})


def test_what_is_scored_is_what_a_user_gets(model, tokenizer, store_path):
    questions = load_questions(str(store_path), tokenizer, model.config)
    rows = list(range(len(questions)))
    scored = [row["with_context"][0] for row in CrossAttentionSystem(model, tokenizer, questions)(rows)]
    asked = [row.question for row in questions.rows]
    assert len(set(scored)) > 1
    assert model.answer(asked, [row.context for row in questions.rows], tokenizer) == scored
    assert model.answer(asked, questions.states(model, rows), tokenizer) == scored


def test_an_answer_is_one_line_for_a_user_as_for_a_score(model, tokenizer, monkeypatch):
    """A model that goes on with another question."""

    def talkative(input_ids, **kwargs):
        more = tokenizer(" Ann \nquestion: and", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, more.expand(len(input_ids), -1)], 1)

    monkeypatch.setattr(model, "generate", talkative)
    assert model.answer(QUESTIONS[:2], TEXTS[0], tokenizer) == ["Ann", "Ann"]


def test_answers_come_with_their_sources(model, tokenizer):
    long = " ".join(f"Mill number {i} stands by the river." for i in range(20))
    texts = [TEXTS[0], long]
    found = model.answer(QUESTIONS[0], texts, tokenizer, max_new_tokens=6, return_sources=True)
    assert found.answer == model.answer(QUESTIONS[0], texts, tokenizer, max_new_tokens=6)
    assert {source.context for source in found.sources} == {0, 1}
    assert len(found.sources) > 3
    assert sum(source.share for source in found.sources) == pytest.approx(1, abs=1e-2)
    for source in found.sources:
        start, end = source.span
        assert source.start <= start <= end <= source.end
        assert texts[source.context][start:end] == source.text
    (source,) = model.answer(
        QUESTIONS[:1], [long], tokenizer, max_new_tokens=6, return_sources=True, truncate=True
    )[0].sources
    assert (source.start, source.end) == (0, len(long))
    states = Encoder(model, tokenizer).encode(TEXTS[:1])[0]
    (source,) = model.answer(QUESTIONS[0], states, tokenizer, max_new_tokens=6, return_sources=True).sources
    assert (source.share, source.text) == (1.0, "")
    assert model.answer(QUESTIONS[0], None, tokenizer, max_new_tokens=6, return_sources=True).sources == []
    with pytest.raises(ValueError, match="sources of a projected context are not known"):
        model.answer(QUESTIONS[0], model.project_context(states[None]), tokenizer, return_sources=True)
