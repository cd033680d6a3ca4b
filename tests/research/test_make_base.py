import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTBigCodeConfig

from dssk import prompts
from dssk.commands.base import main
from dssk.errors import DsskError, EnvironmentFault
from dssk.inference.loading import load_base
from dssk.inference.tokenizer import FIM_TOKENS, load_tokenizer
from dssk.research import make_base, toy
from dssk.research.make_base import (
    Page,
    Recall,
    build_base,
    last_tokens,
    make_documents,
    make_tokenizer,
    once_named,
    read_pages,
    subject_tokens,
)
from tests.conftest import NO_SHARED_DATA, SHARED_DATA

STARCODER_TOKENIZER = SHARED_DATA / "starcoder_tokenizer"


@pytest.fixture(scope="module")
def pages():
    return toy.pages(300, seed=0)


@pytest.fixture(scope="module")
def tokenizer(pages):
    return make_tokenizer([page.paragraph for page in pages], vocab_size=400)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The embedded default without its language modelling."""
    output = tmp_path_factory.mktemp("made") / "base"
    before = os.umask(0o022)
    main(["--output", str(output), "--steps", "0"])
    os.umask(before)
    return output


def structured(**fields):
    settings = {"vocab_size": 300, "n_positions": 128, "n_embd": 128, "n_layer": 2, "n_head": 4}
    return build_base(GPTBigCodeConfig(**settings | fields, attn_implementation="eager"), seed=0).eval()


@torch.no_grad()
def test_each_head_of_the_first_block_looks_one_token_further_back(tokens):
    model = structured()
    attention = model(tokens(2, 128), output_attentions=True).attentions[0]  # (B, H, T, T)
    for head in range(4):
        back = attention[:, head].diagonal(offset=-(head + 1), dim1=1, dim2=2)
        assert back.min() > 0.9


def test_states_of_an_untrained_base_tell_their_own_and_the_previous_token(tokens):
    """A linear probe finds both in the last hidden states; cross-attention is as linear as the probe."""
    ids = tokens(60, 100)
    states = structured().transformer(ids).last_hidden_state[:, 1:].detach()
    for back in (0, 1):
        x, y = states.flatten(0, 1), ids[:, 1 - back : 100 - back].flatten()
        probe = torch.zeros(128, 300, requires_grad=True)
        optimizer = torch.optim.Adam([probe], lr=0.05)
        for _ in range(80):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(x[:5000] @ probe, y[:5000]).backward()
            optimizer.step()
        assert ((x[5000:] @ probe).argmax(-1) == y[5000:]).float().mean() > 0.8  # a random base: below 0.1


def test_the_same_seed_makes_the_same_base_and_leaves_the_random_state_alone():
    made = []
    for state in (5, 6):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        made.append(structured().state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_training_is_reproducible_and_lowers_the_loss(tmp_path, capsys):
    losses, weights = [], []
    for name, steps in (("a", 2), ("b", 20), ("c", 20)):
        main(["--output", str(tmp_path / name), "--steps", str(steps), "--batch_size", "8"])
        losses.append(float(capsys.readouterr().out.split("loss ")[1].split()[0]))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert losses[1] < losses[0] - 0.3
    assert weights[1] == weights[2]


def test_a_memory_weight_leaves_the_previous_token_heads_as_they_were(tmp_path):
    weights = []
    for steps, weight in ((0, 0.3), (3, 0.3), (3, 0)):
        output = tmp_path / f"{steps}-{weight}"
        main(["--output", str(output), "--steps", str(steps), "--memory_weight", str(weight)])
        weights.append(load_base(output).state_dict())
    start, kept, plain = weights
    for name in ("wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"):
        assert torch.equal(start[f"transformer.{name}"], kept[f"transformer.{name}"])
        assert not torch.equal(start[f"transformer.{name}"], plain[f"transformer.{name}"])
    assert not torch.equal(start["transformer.wte.weight"], kept["transformer.wte.weight"])


@torch.no_grad()
def test_recall_is_perfect_where_a_reader_finds_each_token(tokens):
    ids = tokens(2, 10)
    one_hot = torch.nn.functional.one_hot(ids, 300).float()
    states = torch.cat(
        [one_hot.roll(back, dims=1) for back in range(3)], dim=-1
    )  # own, previous, the one before
    recall = Recall(hidden_size=900, num_tokens=3, seed=0)
    for back, reader in enumerate(recall.readers):
        reader.copy_(torch.eye(900).roll(-300 * back, dims=1))
    labels = ids.clone()
    labels[1, 6:] = -100
    lm_head = torch.nn.Linear(900, 300, bias=False)
    lm_head.weight.copy_(50 * torch.eye(300, 900))
    assert recall(states, last_tokens(labels), lm_head) < 1e-6
    assert recall(states.roll(1, dims=1), last_tokens(labels), lm_head) > 10


def test_states_keep_a_name_from_where_it_first_stands():
    labels = torch.tensor([[5, 7, 8, 6, 8], [7, 5, 9, 9, -100]])
    named = once_named(labels, torch.tensor([[7, 8], [5, 9]]))
    assert (named[..., 0] >= 0).tolist() == [
        [False, False, True, True, True],
        [False, False, True, True, False],
    ]
    assert named[0, 2:].unique(dim=0).tolist() == [[7, 8]]
    assert named[1, 2:4].unique(dim=0).tolist() == [[5, 9]]


@torch.no_grad()
def test_two_heads_look_at_the_first_name_of_a_text(pages):
    texts = [prompts.context(paragraph) for paragraph, _, _ in toy.pages(3000, seed=0)]
    # Each word of a name is a token, as in the embedded default.
    tokenizer = make_tokenizer(texts, vocab_size=768)
    subjects = [subject_tokens(page, tokenizer) for page in pages]
    assert tokenizer.decode(subjects[0]) == " " + " ".join(pages[0].subject.split()[:2])
    sizes = {"vocab_size": len(tokenizer), "n_embd": 160, "n_head": 5, "n_layer": 1, "n_positions": 256}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    config = GPTBigCodeConfig(**sizes, attn_implementation="eager")
    names = [sorted(set(words)) for words in zip(*subjects, strict=True)]
    first, plain = build_base(config, 0, names).eval(), build_base(config, 0).eval()
    found, back = [], []
    for page, (begin, end) in zip(pages, subjects, strict=True):
        ids = tokenizer(prompts.context(page.paragraph), return_tensors="pt")["input_ids"]
        weights = first(ids, output_attentions=True).attentions[0][0, :, -1]  # (H, T)
        found += [ids[0, weights[4].argmax()] == begin, ids[0, weights[3].argmax()] == end]
        back += [(weights[0] - plain(ids, output_attentions=True).attentions[0][0, 0, -1]).abs().max()]
    assert sum(found) / len(found) > 0.9
    assert max(back) < 0.1  # the others look back as before


def test_the_embedded_default_is_an_ordinary_small_checkpoint(made):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    assert type(model).__name__ == "GPTBigCodeForCausalLM"
    assert model.config.model_type == "gpt_bigcode"
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", *FIM_TOKENS, "<fim_pad>"]) == [0, 1, 2, 3, 4]
    assert sum(file.stat().st_size for file in made.iterdir()) < 4e6
    assert {file.stat().st_mode & 0o777 for file in made.iterdir()} == {0o644}
    load_base(made)
    assert load_tokenizer(made).pad_token_id == 4
    assert {file.name for file in made.parent.iterdir()} == {"base"}


def test_a_finished_base_is_reused_and_says_so(made, capsys):
    before = (made / "model.safetensors").stat().st_mtime_ns
    main(["--output", str(made), "--steps", "0"])
    assert "re-using it" in capsys.readouterr().out
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_a_base_of_other_settings_is_refused(made):
    with pytest.raises(DsskError, match="made with seed 0, not 1: choose another --output"):
        main(["--output", str(made), "--steps", "0", "--seed", "1"])


def test_a_folder_of_another_kind_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(DsskError, match="is no base made here"):
        main(["--output", str(tmp_path), "--steps", "0"])
    assert (tmp_path / "notes").read_text() == "mine"


def test_the_tokenizer_returns_every_text(tokenizer):
    for text in ("Amber Falls was founded in 1842 .", "ünïcode 日本 \n\t<P>", "<fim_middle> "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_splits_digits_as_starcoder_does(tokenizer):
    assert tokenizer.tokenize("1842") == ["1", "8", "4", "2"]


def test_a_lower_casing_tokenizer_reads_both_cases_alike(pages):
    tokenizer = make_tokenizer([page.paragraph for page in pages], vocab_size=400, lower_case=True)
    assert tokenizer("Amber FALLS")["input_ids"] == tokenizer("amber falls")["input_ids"]


def test_documents_hold_the_strings_the_decoder_will_read(pages, tokenizer):
    documents = [tokenizer.decode(ids) for ids in make_documents(pages, tokenizer, 10_000, seed=0)]
    repeats = []
    for document, (paragraph, questions, _) in zip(documents, pages, strict=True):
        for question, answer in questions:
            assert prompts.question(question) + prompts.answer(answer) + "<|endoftext|>" in document
        repeats.append(document.count(prompts.context(paragraph) + "<|endoftext|>"))
    assert set(repeats) == {0, 1, 2}


def test_documents_are_cut_to_the_window(pages, tokenizer):
    assert max(map(len, make_documents(pages, tokenizer, 50, seed=0))) == 50


def test_questions_about_one_context_share_a_page(tmp_path):
    rows = [
        {"context": "One .", "question": "a", "answers": {"text": ["x", "y"], "answer_start": [0, 1]}},
        {"context": "Two .", "question": "b", "answer": "z"},
        {"context": "One .", "question": "c", "answers": {"text": [], "answer_start": []}},
        {"question": "no context"},
    ]
    path = tmp_path / "qa.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_pages([path]) == [
        Page("One .", [("a", "x"), ("c", prompts.NOT_IN_CONTEXT)]),
        Page("Two .", [("b", "z")]),
    ]


def test_malformed_rows_are_left_out_and_named(tmp_path, capsys):
    rows = [
        {"context": "One .", "question": 5, "answer": "x"},
        {"context": "Two .", "question": "b", "answer": "z"},
    ]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    assert read_pages([path]) == [Page("Two .", [("b", "z")])]
    said = "dssk: 2 malformed rows are left out, the first qa.jsonl:1: question is int, want text\n"
    assert capsys.readouterr().err == said


def test_a_file_without_questions_is_refused(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text('{"text": "prose"}\n')
    with pytest.raises(
        DsskError, match="no usable row in .*qa.jsonl: want rows of context, question and answer"
    ):
        read_pages([path])


@pytest.mark.skipif(not STARCODER_TOKENIZER.exists(), reason=NO_SHARED_DATA)
def test_a_base_of_text_takes_a_tokenizer_that_exists(tmp_path):
    text = tmp_path / "qa.jsonl"
    text.write_text(json.dumps({"context": "One .", "question": "a", "answer": "x"}) + "\n")
    output = tmp_path / "base"
    sizes = ["--hidden_size", "32", "--heads", "2", "--layers", "1", "--positions", "64", "--steps", "1"]
    main(["--output", str(output), "--text", str(text), "--tokenizer", str(STARCODER_TOKENIZER), *sizes])
    assert load_base(output).config.vocab_size == 49_152
    assert load_tokenizer(output)("def print_hello")["input_ids"] == [589, 1459, 81, 7656]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer", "bpe"], "got 'bpe', want bpe:SIZE"),
        (["--tokenizer", "bpe:100"], "want bpe:SIZE from 261 to 1000000"),
        (["--tokenizer", "bpe:2000000000"], "want bpe:SIZE from 261 to 1000000"),
        (["--seed", "-1"], "got '-1', want a whole number from 0 to 4294967295"),
        (["--seed", "1" + "0" * 30], "want a whole number from 0 to 4294967295"),
        (["--steps", "-1"], "got '-1', want a whole number"),
        (["--hidden_sise", "64"], "did you mean --hidden_size?"),
        (["--text"], "expected at least one argument"),
    ],
)
def test_a_wrong_flag_exits_with_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        main(["--output", str(tmp_path / "base"), *flags])
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "130"], "--hidden_size 130 with --heads 4: want at least 2 heads, each an even"),
        (["--heads", "1"], "--hidden_size 128 with --heads 1: want at least 2 heads"),
        (
            ["--heads", "2", "--subject_weight", "1"],
            "--heads 2 of 64 units: two heads look at names, want two more",
        ),
        (["--hidden_size", "16", "--subject_weight", "1"], "--heads 4 of 4 units: .* at least 8 units each"),
        (["--subject_weight", "-1"], "--subject_weight -1.0: want a rate above 0, and none of them below 0"),
        (
            ["--memory_weight", "-1"],
            "--memory_weight -1.0, --subject_weight 0.0: want a rate above 0, and none of them below 0",
        ),
        (["--learning_rate", "nan"], "want a rate above 0"),
        (["--layers", "2000000000"], r"are 3.9e\+14 parameters: want at most 1e\+09"),
        (["--positions", "2000000000"], r"are 2.6e\+11 parameters: want at most 1e\+09"),
    ],
)
def test_an_impossible_shape_is_refused_in_words(tmp_path, flags, message):
    with pytest.raises(DsskError, match=message):
        main(["--output", str(tmp_path / "base"), *flags])
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, error):
    class Model:
        def save_pretrained(self, folder):
            (folder / "model.safetensors").touch()
            raise error

    with pytest.raises(EnvironmentFault, match="disk full at .*base"):
        make_base._save(tmp_path / "base", Model(), None, None)
    assert list(tmp_path.iterdir()) == []
