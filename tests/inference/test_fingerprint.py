"""A base is known again wherever and however it was saved, and one flipped bit makes it another."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import dssk
from dssk.errors import DamagedData, DsskError
from dssk.inference import fingerprint
from dssk.inference.fingerprint import fingerprint_v01, is_model, model_fingerprint
from tests.conftest import fused, make_base
from tests.families import tiny_base, tiny_config

V01 = Path(__file__).parent.parent / "v01"


def of(path) -> str:
    return model_fingerprint(path, AutoConfig.from_pretrained(path))


@pytest.fixture
def copy(base_path, tmp_path) -> Path:
    return shutil.copytree(base_path, tmp_path / "copy")


def test_a_model_saved_otherwise_is_the_same(base_path, copy, tmp_path):
    expected = of(base_path)
    assert expected.startswith("2:")
    assert of(copy) == expected
    model = AutoModelForCausalLM.from_pretrained(base_path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert of(tmp_path / "sharded") == expected
    for final_layer in (False, True):
        fused(base_path, cross_attn_final_layer=final_layer).save_pretrained(tmp_path / "fused")
        assert of(tmp_path / "fused") == expected


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_moe", "gemma3_text", "mpt", "mamba"])
def test_a_fused_model_of_every_family_is_its_base(tmp_path, name):
    base = tiny_base(name, tmp_path / "base")
    made = dssk.from_base(base, num_cross_attn_layers=1, cross_attn_layers_stride=1)
    made.save_pretrained(tmp_path / "fused")
    assert of(tmp_path / "fused") == of(base) == model_fingerprint(base, made.config)
    config = AutoConfig.from_pretrained(base)
    assert model_fingerprint(base, tiny_config(name, vocab_size=65)) != of(base)
    assert model_fingerprint(base, config) == of(base)


def test_files_of_the_hub_may_hold_what_can_be_computed_and_name_no_decoder(copy):
    expected = of(copy)
    tensors = load_file(copy / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value.clone() for name, value in tensors.items()}
    renamed["lm_head.weight"] = tensors["transformer.wte.weight"].clone()  # tied
    renamed["h.0.attn.masked_bias"] = tensors["transformer.wte.weight"][0, :1].clone()
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    assert of(copy) == expected


def test_every_bit_of_the_weights_counts(copy):
    expected = of(copy)
    path = copy / "model.safetensors"
    content = path.read_bytes()
    rng = random.Random(0)
    first = 8 + int.from_bytes(content[:8], "little")
    for position in [*(rng.randrange(first, len(content)) for _ in range(60)), first, len(content) - 1]:
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert of(copy) != expected
    path.write_bytes(content)
    assert of(copy) == expected


def test_damage_of_the_header_is_one_line(copy):
    expected = of(copy)
    path = copy / "model.safetensors"
    content = path.read_bytes()
    for position in range(0, 8 + int.from_bytes(content[:8], "little"), 11):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with contextlib.suppress(DamagedData):
            assert of(copy) != expected
    for cut in (0, 4, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(DamagedData, match="model.safetensors is damaged"):
            of(copy)


@pytest.mark.parametrize(
    "change", [{"n_inner": 64}, {"n_head": 2}, {"layer_norm_epsilon": 1e-6}, {"n_positions": 128}]
)
def test_settings_of_the_forward_pass_count(copy, change):
    expected = of(copy)
    config = AutoConfig.from_pretrained(copy)
    for name, value in change.items():
        setattr(config, name, value)
    assert model_fingerprint(copy, config) != expected


def test_bookkeeping_does_not(copy):
    expected = of(copy)
    config = AutoConfig.from_pretrained(copy)
    config.update({"pad_token_id": 4, "use_cache": False, "attn_pdrop": 0.5, "torch_dtype": "bfloat16"})
    config.inference_runner = 0  # such as StarCoder's file has: transformers does not know it
    config.save_pretrained(copy)
    assert of(copy) == expected


@pytest.mark.parametrize("names", [["../model.safetensors"], ["/etc/passwd"], [5]])
def test_an_index_that_names_files_elsewhere_is_refused(copy, names):
    shutil.move(copy / "model.safetensors", copy.parent / "model.safetensors")
    index = {"weight_map": dict.fromkeys("a", names[0])}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DsskError, match="names files outside its folder"):
        of(copy)


def test_a_weight_file_is_read_once(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dssk.utils.hashes._is_settled", lambda path: True)
    expected = of(copy)
    monkeypatch.setattr(fingerprint, "_tensor_sum", None)
    assert of(copy) == expected


def test_what_version_0_1_wrote_is_known_again(tmp_path):
    config = AutoConfig.from_pretrained(V01 / "base")
    wrote = json.loads((V01 / "store" / "manifest.json").read_text())["model_fingerprint"]
    assert fingerprint_v01(V01 / "base", config) == wrote
    assert is_model(wrote, V01 / "base", config)
    assert is_model(of(V01 / "base"), V01 / "base", config)
    other = make_base(tmp_path / "other", n_layer=2, n_inner=64, n_positions=128, seed=1)
    assert not is_model(wrote, other, config)
    assert not is_model(of(V01 / "base"), other, config)
