"""One rule for special tokens: which stand first, which pads, which are for fill-in-the-middle."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dssk import prompts
from dssk.errors import DamagedData, DsskError
from dssk.inference.passages import Splitter
from dssk.inference.tokenizer import (
    fim_ids,
    leading_ids,
    load_tokenizer,
    template_version,
    tokenize_context,
    tokenize_contexts,
    tokenize_question,
    tokenize_question_after_context,
)
from tests.conftest import NO_SHARED_DATA, SHARED_DATA, byte_tokenizer


def made(tmp_path, special=(), leading=(), trailing=(), **named):
    """A tokenizer of single bytes, saved to a folder and loaded as a base's would be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(dict.fromkeys([*special, *named.values()])))
    if leading or trailing:
        used = [*leading, *trailing]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*leading, "$A", *trailing]),
            special_tokens=[(token, backend.token_to_id(token)) for token in used],
        )
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.fixture
def llama(tmp_path):
    return made(tmp_path, leading=["<s>"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_bos_stands_first_in_contexts_and_before_questions_and_nowhere_else(llama):
    bos = llama.bos_token_id
    assert leading_ids(llama) == [bos]
    for ids in (
        tokenize_context(llama, "a b"),
        tokenize_question(llama, "a b"),
        *tokenize_contexts(llama, ["a", ""]),
    ):
        assert ids[0] == bos
        assert bos not in ids[1:]
    assert llama.decode(tokenize_context(llama, "a b")[1:]) == prompts.context("a b")
    assert bos not in tokenize_question_after_context(llama, "a b")
    assert tokenize_question(llama, "a b", "merged") == tokenize_question_after_context(llama, "a b")


def test_every_leading_token_counts_and_no_trailing_one(tmp_path):
    glm = made(
        tmp_path,
        leading=["[gMASK]", "<sop>"],
        trailing=["<eos>"],
        eos_token="<eos>",
        special=["[gMASK]", "<sop>"],
    )
    assert leading_ids(glm) == glm.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert glm.eos_token_id not in tokenize_context(glm, "a")


def test_a_tokenizer_without_leading_tokens_keeps_the_first_template_version(tmp_path, llama):
    plain = made(tmp_path / "plain", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert leading_ids(plain) == []
    assert template_version(plain) == prompts.TEMPLATE_VERSION == 1
    assert template_version(llama) != template_version(plain)
    assert plain.decode(tokenize_context(plain, "a b")) == prompts.context("a b")


@pytest.mark.parametrize(
    ("named", "pad"),
    [
        ({"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"}, "<pad>"),  # Gemma
        ({"eos_token": "<|endoftext|>"}, "<|endoftext|>"),  # GPT-2
        (
            {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<unk>"},
            "<|im_end|>",
        ),  # SmolLM2
        ({"eos_token": "<|endoftext|>", "additional": "<fim_pad>"}, "<fim_pad>"),  # StarCoder
        ({"eos_token": "<|endoftext|>", "additional": "<fim-pad>"}, "<fim-pad>"),  # SantaCoder
        ({"eos_token": "<e>", "pad_token": "<e>", "additional": "<|fim_pad|>"}, "<|fim_pad|>"),  # Qwen
        ({"eos_token": "<e>", "pad_token": "<p>", "additional": "<fim_pad>"}, "<p>"),
    ],
)
def test_which_token_pads(tmp_path, named, pad):
    additional = named.pop("additional", None)
    tokenizer = made(tmp_path, special=[additional] if additional else [], **named)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id == tokenizer.get_vocab()[pad]


@pytest.mark.parametrize("spelling", ["<fim_{}>", "<fim-{}>", "<|fim_{}|>"])
def test_fill_in_the_middle_ids_in_every_spelling(tmp_path, spelling):
    markers = [spelling.format(name) for name in ("prefix", "middle", "suffix")]
    tokenizer = made(tmp_path, special=markers, eos_token="<e>")
    assert fim_ids(tokenizer) == tuple(tokenizer.get_vocab()[marker] for marker in markers)


@pytest.mark.parametrize(
    "markers", [[], ["<fim_prefix>", "<fim_middle>"], ["<fim_prefix>", "<fim-middle>", "<fim_suffix>"]]
)
def test_without_all_markers_there_are_no_ids_not_those_of_unknown_tokens(tmp_path, markers):
    assert fim_ids(made(tmp_path, special=markers, eos_token="<e>", unk_token="<unk>")) is None


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    with pytest.raises(DsskError, match="no end-of-text token: set eos_token"):
        made(tmp_path, unk_token="<unk>")


@pytest.mark.parametrize("name", ["starcoder_tokenizer", "starcoder2_tokenizer"])
def test_the_real_starcoder_tokenizers(name):
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(NO_SHARED_DATA)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.eos_token_id, fim_ids(tokenizer)) == ("<fim_pad>", 0, (1, 2, 3))
    assert leading_ids(tokenizer) == []
    assert template_version(tokenizer) == 1


def test_half_a_character_is_no_text(llama):
    for tokens in (tokenize_question, tokenize_context, Splitter(64).split):
        with pytest.raises(DsskError, match="half a surrogate pair at "):
            tokens(llama, "a \udcff")


@pytest.mark.parametrize(
    ("setting", "what"), [({"\ud800": "a"}, "surrogates"), ({"model_max_length": "long"}, "TypeError")]
)
def test_settings_that_were_altered_are_refused(tmp_path, setting, what):
    byte_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    with pytest.raises(DamagedData, match=f"the tokenizer at .* cannot be loaded: .*{what}"):
        load_tokenizer(tmp_path)
