import copy
import pickle

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dssk import prompts
from dssk.config import parse_experiment
from dssk.data.collate import Collator
from dssk.data.dataset import CrossAttnDataset
from dssk.errors import DsskError
from dssk.inference.batching import length_mask, pad_states, pad_tokens
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.loss import IGNORED
from dssk.store.dataset import load_contexts, load_rows
from tests.conftest import byte_tokenizer, experiment, fused


@pytest.fixture(scope="module")
def rows(store_path):
    return load_rows(store_path)["train"]


@pytest.fixture(scope="module")
def tokenizer(base_path):
    return load_tokenizer(base_path)


@pytest.fixture
def make(rows, tokenizer, base_path):
    return lambda training=True, **changes: CrossAttnDataset(
        rows, tokenizer, parse_experiment(experiment(base_path, **changes)), training
    )


def test_a_question_row_is_the_prompt_the_answer_and_the_end_of_text(make, rows, tokenizer):
    example, row = make()[3], rows[3]
    text = f"question: {row['question']} \n answer: {row['answer']}<|endoftext|>"
    assert tokenizer.decode(example["input_ids"]) == text
    assert example["labels"] == example["input_ids"]
    prompt = tokenizer(prompts.question(row["question"]))["input_ids"]
    assert example["input_ids"][: len(prompt)] == prompt
    assert torch.equal(example["encoder_hidden_states"], row["encoder_hidden_states"])


def test_loss_on_answer_ignores_the_prompt_and_keeps_the_end_of_text(make, rows, tokenizer):
    example = make(loss_on="answer")[3]
    learned = [label for label in example["labels"] if label != IGNORED]
    assert tokenizer.decode(learned) == f" {rows[3]['answer']}<|endoftext|>"
    assert len(example["labels"]) == len(example["input_ids"])
    assert example["labels"][0] == IGNORED


def test_contexts_are_walked_after_the_questions_and_in_training_only(make, rows, tokenizer):
    dataset = make(include_context_ids=True)
    assert len(dataset) == 2 * len(rows)
    assert len(make(training=False, include_context_ids=True)) == len(rows)
    texts = [tokenizer.decode(dataset[len(rows) + i]["input_ids"]) for i in range(len(rows))]
    plain = [f"context: {row['context']}<|endoftext|>" for row in rows]
    whole = sum(text == expected for text, expected in zip(texts, plain, strict=True))
    assert 0.25 * len(rows) < whole < 0.75 * len(rows)
    for text, expected in zip(texts, plain, strict=True):
        if text != expected:  # suffix, prefix, middle
            suffix, _, rest = text.removeprefix("<fim_suffix>").partition("<fim_prefix>")
            prefix, _, middle = rest.removesuffix("<|endoftext|>").partition("<fim_middle>")
            assert f"{prefix}{middle}{suffix}<|endoftext|>" == expected
    example = dataset[len(rows)]
    assert torch.equal(example["encoder_hidden_states"], rows[0]["encoder_hidden_states"])


def test_repetition_tasks_follow_the_answer_in_training_only(make, rows, tokenizer):
    dataset = make(do_repetition_augmentations=True)
    heads = set()
    for i, row in enumerate(rows):
        plain, _, task = (
            tokenizer.decode(dataset[i]["input_ids"]).removesuffix("<|endoftext|>").partition("<|endoftext|>")
        )
        assert plain == f"question: {row['question']} \n answer: {row['answer']}"
        head, _, text = task.partition(": ")
        heads.add(head)
        expected = {
            "repeat question": row["question"],
            "repeat answer": row["answer"],
            "repeat context": row["context"],
        }
        assert text == expected.get(head, f"{row['question']} {row['answer']}")
    assert heads == {"repeat question", "repeat answer", "repeat both", "repeat context"}
    plain = make(training=False, do_repetition_augmentations=True)[0]["input_ids"]
    assert plain == make(training=False)[0]["input_ids"]


def test_an_example_depends_on_seed_epoch_and_index_alone(make, rows):
    index = len(rows) + 1
    examples = [make(include_context_ids=True, seed=seed) for seed in range(12)]
    first = [dataset[index]["input_ids"] for dataset in examples]
    assert first == [pickle.loads(pickle.dumps(dataset))[index]["input_ids"] for dataset in examples]
    assert len(set(map(tuple, first))) > 1
    for dataset in examples:
        dataset.set_epoch(1)
    assert [dataset[index]["input_ids"] for dataset in examples] != first


def test_text_and_states_are_cut_to_the_context_size(make):
    for index in range(40):
        example = make(include_context_ids=True, context_size=12)[index]
        assert len(example["input_ids"]) == len(example["labels"]) <= 12
        assert len(example["encoder_hidden_states"]) <= 12


@pytest.mark.parametrize("online", [False, True])
def test_a_text_behind_a_merged_context_has_the_positions_that_are_left(rows, tokenizer, base_path, online):
    model = fused(base_path, reader="merged", encode_layer=2)
    model.config.n_positions = 64
    cfg = parse_experiment(experiment(base_path, reader="merged", context_size=64, encode_online=online))
    for config, longest in ((model.config, 48), (None, 64)):
        dataset = CrossAttnDataset(rows, tokenizer, cfg, True, None, config)
        for row in rows.select(range(4)):
            row["context"], row["encoder_hidden_states"] = "a" * 41, torch.zeros(50, 32)
            dataset.rows = [row]
            example = dataset[0]
            read = len(example["context_input_ids" if online else "encoder_hidden_states"])
            assert read == min(50, longest)
            assert len(example["input_ids"]) == len(example["labels"])
            assert config is None or len(example["input_ids"]) <= 64 - read


def test_what_a_store_cut_off_is_neither_read_nor_taught(rows, tokenizer, base_path):
    """A store of `--truncate` has no states of the rest."""
    cfg = parse_experiment(experiment(base_path, train_on="documents", distill=True))
    dataset = CrossAttnDataset(rows, tokenizer, cfg, training=True)
    row = rows[0]
    row["encoder_hidden_states"] = row["encoder_hidden_states"][:20]
    dataset.rows = [row]
    example = dataset[0]
    read = len(example["context_input_ids"])
    assert len(example["encoder_hidden_states"]) == read
    assert read + len(example["input_ids"]) == 20


def test_a_cut_context_keeps_its_fill_in_the_middle_markers(make, rows):
    dataset = make(include_context_ids=True, context_size=12)
    moved = [dataset[len(rows) + i]["input_ids"] for i in range(len(rows))]
    moved = [ids for ids in moved if ids[0] == 3]
    assert moved
    assert all({1, 2, 3} <= set(ids) and ids[-1] == 0 for ids in moved)


@pytest.mark.parametrize("spelling", ["<fim-{}>", "<|fim_{}|>"])
def test_every_spelling_of_the_markers_serves(rows, base_path, spelling):
    tokenizer = byte_tokenizer(spelling)
    cfg = parse_experiment(experiment(base_path, include_context_ids=True))
    dataset = CrossAttnDataset(rows, tokenizer, cfg, training=True)
    texts = [tokenizer.decode(dataset[len(rows) + i]["input_ids"]) for i in range(len(rows))]
    moved = [text for text in texts if text.startswith(spelling.format("suffix"))]
    assert 0.25 * len(rows) < len(moved) < 0.75 * len(rows)
    assert all(spelling.format("prefix") in text and spelling.format("middle") in text for text in moved)


def test_online_examples_carry_the_tokens_that_would_be_encoded(make, rows, tokenizer):
    example = make(encode_online=True)[0]
    assert tokenizer.decode(example["context_input_ids"]) == f"context: {rows[0]['context']}"
    assert "encoder_hidden_states" not in example


def test_a_batch_is_padded_and_masked(make, tokenizer):
    dataset = make()
    examples = [dataset[i] for i in range(5)]
    batch = Collator(tokenizer.pad_token_id)(examples)
    assert tokenizer.pad_token_id == 4
    for row, example in enumerate(examples):
        length, states = len(example["input_ids"]), example["encoder_hidden_states"]
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert (batch["input_ids"][row, length:] == 4).all()
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert batch["attention_mask"][row].sum() == length
        assert torch.equal(batch["encoder_hidden_states"][row, : len(states)], states)
        assert not batch["encoder_hidden_states"][row, len(states) :].any()
        assert batch["encoder_attention_mask"][row].tolist() == [
            i < len(states) for i in range(len(batch["encoder_attention_mask"][row]))
        ]
    assert batch["encoder_hidden_states"].dtype == torch.bfloat16
    assert batch["attention_mask"].dtype == batch["encoder_attention_mask"].dtype == torch.bool


def test_padding_can_be_on_the_left():
    assert pad_tokens([[7], [8, 9]], 4, left=True).tolist() == [[4, 7], [8, 9]]
    assert length_mask([1, 2], left=True).tolist() == [[False, True], [True, True]]


def test_states_of_unequal_length_are_padded_with_zeros():
    padded, mask = pad_states([torch.ones(1, 3), torch.ones(2, 3)])
    assert padded[0].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert mask.tolist() == [[True, False], [True, True]]


@pytest.fixture(scope="module")
def llama_like(tokenizer):
    """The same tokenizer, but it wants a token first, as Llama's does, and has none for fill-in-the-middle."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("fim_", "x_"))
    end = "<|endoftext|>"
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<x_pad>", eos_token=end, pad_token=end
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<x_pad> $A", special_tokens=[("<x_pad>", made.bos_token_id)]
    )
    return made


def test_the_first_token_that_a_tokenizer_wants_stands_before_questions_and_contexts(make, rows, llama_like):
    for loss_on in ("all", "answer"):
        cfg = make(loss_on=loss_on, encode_online=True).cfg
        example = CrossAttnDataset(rows, llama_like, cfg, training=True)[3]
        for ids in (example["input_ids"], example["context_input_ids"]):
            assert ids[0] == llama_like.bos_token_id
            assert llama_like.bos_token_id not in ids[1:]
        assert example["labels"][-1] == llama_like.eos_token_id


def test_the_first_token_stays_first_in_a_context_with_its_middle_moved(make, rows, tokenizer):
    marked = copy.deepcopy(tokenizer)
    marked.backend_tokenizer.post_processor = TemplateProcessing(
        single="<fim_pad> $A", special_tokens=[("<fim_pad>", marked.pad_token_id)]
    )
    dataset = CrossAttnDataset(rows, marked, make(include_context_ids=True).cfg, training=True)
    texts = [marked.decode(dataset[len(rows) + i]["input_ids"]) for i in range(len(rows))]
    assert all(text.startswith("<fim_pad>") and text.count("<fim_pad>") == 1 for text in texts)
    assert any(text.startswith("<fim_pad><fim_suffix>") for text in texts)


def test_contexts_as_training_text_need_tokens_for_fill_in_the_middle(make, rows, llama_like):
    cfg = make(include_context_ids=True).cfg
    with pytest.raises(
        DsskError, match="include_context_ids is true, but the tokenizer of .* set .* to false"
    ):
        CrossAttnDataset(rows, llama_like, cfg, training=True)


def test_padding_with_the_end_of_text_keeps_it_in_the_loss(make, rows, llama_like):
    dataset = CrossAttnDataset(rows, llama_like, make().cfg, training=True)
    batch = Collator(llama_like.pad_token_id)([dataset[i] for i in range(4)])
    learned = (batch["labels"] == llama_like.eos_token_id).sum(-1)
    assert learned.tolist() == [1] * 4
    assert torch.equal(batch["labels"] != IGNORED, batch["attention_mask"])


# Several contexts a question


@pytest.fixture
def several(rows, store_path, tokenizer, base_path):
    def several(training=True, **changes):
        cfg = parse_experiment(experiment(base_path, **{"num_contexts": [1, 4], **changes}))
        return CrossAttnDataset(rows, tokenizer, cfg, training, load_contexts(store_path))

    return several


def test_a_question_reads_its_own_context_and_as_many_others_as_the_epoch_says(several, rows):
    dataset = several()
    counts = []
    for index in range(len(rows)):
        contexts = dataset[index]["contexts"]
        counts.append(len(contexts))
        assert len({number for number, _ in contexts}) == dataset.num_contexts[index] == len(contexts)
        own = rows[index]["encoder_hidden_states"]
        assert [torch.equal(states, own) for _, states in contexts] == [True, *[False] * (len(contexts) - 1)]
    assert set(counts) == {1, 2, 3, 4}
    dataset.set_epoch(1)
    assert counts != dataset.num_contexts.tolist()
    first = [number for number, _ in dataset[5]["contexts"]]
    assert first == [number for number, _ in pickle.loads(pickle.dumps(dataset))[5]["contexts"]]


def test_questions_without_their_context_are_not_answered(several, rows, store_path, tokenizer):
    dataset, contexts = several(gold_missing=0.5, num_contexts=3), load_contexts(store_path)
    missing = 0
    for index, row in enumerate(rows):
        example = dataset[index]
        texts = [contexts.text(number) for number, _ in example["contexts"]]
        answer = tokenizer.decode(example["labels"]).partition("answer: ")[2].removesuffix("<|endoftext|>")
        assert len(texts) == 3
        if row["context"] in texts:
            assert answer == row["answer"]
        else:
            missing += 1
            assert answer == "Answer not in context."
            assert not any(row["answer"] in text for text in texts)
    assert 0.25 * len(rows) < missing < 0.75 * len(rows)


def test_in_the_first_epochs_questions_may_read_their_own_contexts_alone(several, rows):
    settings = {"contexts_warmup": 1, "num_contexts": 3, "gold_missing": 0.9}
    dataset = several(**settings)
    for index, row in enumerate(rows):
        ((_, states),) = dataset[index]["contexts"]
        assert torch.equal(states, row["encoder_hidden_states"])
    dataset.set_epoch(1)
    assert {len(dataset[index]["contexts"]) for index in range(len(rows))} == {3}
    assert len(several(training=False, **settings)[0]["contexts"]) == 3


def test_contexts_of_a_batch_are_packed_and_each_is_there_once(several, tokenizer):
    dataset = several(num_contexts=4)
    examples = [dataset[index] for index in range(12)]
    batch = Collator(tokenizer.pad_token_id)(examples)
    named = {number: states for example in examples for number, states in example["contexts"]}
    assert len(batch["context_lengths"]) == len(named) < 12 * 4
    assert batch["encoder_hidden_states"].shape == (1, sum(map(len, named.values())), 32)
    packed = batch["encoder_hidden_states"][0].split(batch["context_lengths"].tolist())
    for group, example in zip(batch["context_groups"], examples, strict=True):
        for place, (_, states) in zip(group.tolist(), example["contexts"], strict=True):
            assert torch.equal(packed[place], states)


def test_distractors_of_the_batch_add_no_context_to_it(several, rows, tokenizer):
    dataset = several(num_contexts=3, distractors={"batch": 1.0})
    own = dataset.own_contexts[:8].tolist()
    assert len(set(own)) > 3
    loader = torch.utils.data.DataLoader(dataset, 8, collate_fn=lambda examples: examples)
    examples = next(iter(loader))
    for example, number in zip(examples, own, strict=True):
        read = [number for number, _ in example["contexts"]]
        assert (read[0], len(read)) == (number, 3)
        assert set(read) <= set(own)
    assert examples[3]["contexts"][0][0] == dataset[3]["contexts"][0][0]  # a row by itself has random ones


def test_packed_contexts_may_be_encoded_online(several, tokenizer):
    dataset = several(encode_online=True, num_contexts=2)
    batch = Collator(tokenizer.pad_token_id)([dataset[index] for index in range(4)])
    assert batch["context_input_ids"].shape == batch["context_attention_mask"].shape
    assert batch["context_groups"].shape == (4, 2)
    text = tokenizer.decode(batch["context_input_ids"][0][batch["context_attention_mask"][0]])
    assert text == f"context: {dataset.rows[0]['context']}"


def test_a_repeated_context_is_read_alone(several, rows, tokenizer):
    dataset = several(include_context_ids=True, num_contexts=4, gold_missing=0.9)
    example = dataset[len(rows) + 3]
    assert len(example["contexts"]) == 1
    assert torch.equal(example["contexts"][0][1], rows[3]["encoder_hidden_states"])
