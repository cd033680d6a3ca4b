import json

import numpy as np
import pytest
import torch

from dssk import prompts
from dssk.evaluation.questions import Question, load_questions
from dssk.inference.tokenizer import load_tokenizer
from dssk.research.prompted import (
    PrefixCache,
    PrefixCachedSystem,
    PromptedSystem,
    cache_bytes_per_token,
    few_shot,
    make_prompt,
)
from tests.conftest import fused, make_base


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture(scope="module")
def questions(base_path, tokenizer, store_path):
    return load_questions(str(store_path), tokenizer, fused(base_path).config)


def test_a_prompt_is_context_and_question(tokenizer):
    prompt = make_prompt(tokenizer, Question("0", "who", "the mill", ["x"]), 256, 8)
    assert tokenizer.decode(prompt.tokens) == "context: the mill \n question: who \n answer:"
    assert not prompt.was_cut


def test_worked_examples_stand_before_a_prompt_and_take_their_room(base, tokenizer, questions):
    example = Question("0", "who", "the mill", ["Ann"])
    assert (
        tokenizer.decode(few_shot(tokenizer, [example]))
        == "context: the mill \n question: who \n answer: Ann\n\n"
    )
    plain, shown = (
        PromptedSystem(base, tokenizer, questions, 6, examples) for examples in ([], [example] * 2)
    )
    assert tokenizer.decode(shown.prompts()[0].tokens) == (
        2 * "context: the mill \n question: who \n answer: Ann\n\n"
        + tokenizer.decode(plain.prompts()[0].tokens)
    )
    assert all(len(prompt.tokens) + 6 <= 256 for prompt in shown.prompts())


def test_a_context_that_does_not_fit_is_cut_at_its_end(tokenizer):
    asked = Question("0", "who", "abc" * 100, ["x"])
    whole = make_prompt(tokenizer, asked, 1000, 8)
    cut = make_prompt(tokenizer, asked, 100, 8)
    assert cut.was_cut
    assert cut.question == whole.question
    assert len(cut.tokens) == 92
    assert cut.context == whole.context[: len(cut.context)]


def test_several_contexts_stay_in_a_prompt_as_long_as_they_fit_and_the_right_one_always(tokenizer):
    asked = Question("0", "who", "the mill", ["x"])
    texts = ["a barn", "a farm", "the mill", "a lake"]
    all_tokens = 18 + 18 + 20 + 18  # that each adds to a prompt
    question = len(make_prompt(tokenizer, asked, 256, 8).question)

    def read(room, order=None, several=texts):
        prompt = make_prompt(tokenizer, asked, room + question + 8, 8, several, order)
        assert len(prompt.context) <= room
        kept = tokenizer.decode(prompt.context).split(" \n ")
        assert len(kept) + prompt.left_out == len(several)
        return [text.removeprefix("context: ") for text in kept], prompt.was_cut

    assert read(all_tokens) == (texts, False)
    assert read(all_tokens - 1) == (["a barn", "a farm", "the mill"], False)
    assert read(20 + 18) == (["a barn", "the mill"], False)
    assert read(20) == (["the mill"], False)
    assert read(14) == (["the m"], True)
    assert read(30, several=["a barn", "a lake"]) == (["a barn"], False)
    shuffled, _ = read(all_tokens - 1, np.random.default_rng(0))
    assert sorted(shuffled) == ["a barn", "a farm", "the mill"]
    assert shuffled != ["a barn", "a farm", "the mill"]
    one, alone = (make_prompt(tokenizer, asked, 256, 8, several) for several in (["the mill"], None))
    assert one == alone


def test_answers_are_those_of_each_prompt_alone(base, tokenizer, questions):
    system = PromptedSystem(base, tokenizer, questions, max_new_tokens=6)
    together = system(list(range(len(questions))))
    for row, asked in enumerate(questions.rows[:4]):
        text = prompts.context(asked.context) + prompts.question_after_context(asked.question)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = base.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=4)[0, ids.shape[1] :]
        answer, loss = together[row]["with_context"]
        assert answer == tokenizer.decode(tokens, skip_special_tokens=True).strip().split("\n")[0].rstrip()
        target = tokenizer(prompts.answer(asked.answers[0]) + "<|endoftext|>", return_tensors="pt")[
            "input_ids"
        ]
        labels = torch.cat([torch.full_like(ids, -100), target], 1)
        with torch.no_grad():
            assert loss == pytest.approx(
                base(torch.cat([ids, target], 1), labels=labels).loss.item(), abs=1e-4
            )


@pytest.mark.parametrize("config", [{}, {"multi_query": False}, {"n_positions": 90}])
def test_a_stored_cache_changes_no_answer(tmp_path, tokenizer, questions, config):
    model = fused(make_base(tmp_path / "base", **config))
    cold = PromptedSystem(model, tokenizer, questions, max_new_tokens=8)
    cached = PrefixCachedSystem(model, tokenizer, questions, tmp_path / "cache", max_new_tokens=8)
    rows = list(range(len(questions)))
    held = PrefixCachedSystem(model, tokenizer, questions, None, max_new_tokens=8)
    assert [answer["with_context"][0] for answer in held(rows)] == [a["with_context"][0] for a in cold(rows)]
    assert len(held.cache._held) == len({tuple(prompt.context) for prompt in cold.prompts()})
    for _ in range(2):  # first the files are made, then they are read
        for ours, theirs in zip(cached(rows), cold(rows), strict=True):
            assert ours["with_context"][0] == theirs["with_context"][0]
            assert ours["with_context"][1] == pytest.approx(theirs["with_context"][1], abs=1e-4)
    distinct = {tuple(prompt.context) for prompt in cold.prompts()}
    assert len(list((tmp_path / "cache").iterdir())) == len(distinct)
    assert (cold.num_cut > 0) == ("n_positions" in config)


def test_stored_caches_take_the_bytes_that_are_said(base, tmp_path, tokenizer):
    cache = PrefixCache(base, tmp_path)
    context = list(range(5, 105))
    cache.load([context])
    raw = cache.path(context).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    assert set(json.loads(raw[8 : 8 + header])) == {"keys", "values"}
    assert len(raw) - 8 - header == 100 * cache_bytes_per_token(base) == 100 * 2 * 4 * 8 * 4


def test_the_cache_is_read_from_disk_and_not_made_again(base, tmp_path):
    cache = PrefixCache(base, tmp_path)
    cache.load([[5, 6, 7]])
    cache.path([8, 9, 10]).write_bytes(cache.path([5, 6, 7]).read_bytes())
    first, swapped = (cache.load([ids]).layers[0].keys for ids in ([5, 6, 7], [8, 9, 10]))
    assert torch.equal(first, swapped)
