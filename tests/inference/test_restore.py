"""A merged context as a file, read by plain transformers."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from dssk.errors import DamagedData, DsskError
from dssk.inference.restore import load_cache, save_cache
from dssk.models.merged import MergedReader, arguments, read_context
from tests.models.test_merged import S, T, ids, make_model, mask_of


def make_context(model):
    torch.manual_seed(1)
    reader = MergedReader(model.base_model)
    with torch.no_grad():
        return read_context(reader, model.base_model, torch.randn(2, S, 64), mask_of([S, 4]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_bigcode", "gpt_neox"])
def test_a_plain_model_goes_on_from_the_file(tmp_path, family):
    model, text = make_model(family), ids(2, T)
    context = make_context(model)
    want = model(text, **arguments(model, context, None, 2, T)).logits
    save_cache(context, tmp_path / "cache.safetensors", base="somewhere")
    # From here on nothing of dssk: this is what the documentation tells others to do.
    plain, file = make_model(family), load_file(tmp_path / "cache.safetensors")
    cache = DynamicCache(config=plain.config)
    for layer in range(plain.config.num_hidden_layers):
        cache.update(file[f"keys.{layer}"], file[f"values.{layer}"], layer)
    got = plain(
        text,
        past_key_values=cache,
        attention_mask=torch.cat([file["mask"].long(), torch.ones_like(text)], 1),
        position_ids=file["lengths"][:, None] + torch.arange(T),
    ).logits
    assert torch.equal(got, want)


def test_what_was_written_is_read(tmp_path):
    context = make_context(make_model("llama"))
    save_cache(context, tmp_path / "cache.safetensors")
    read = load_cache(tmp_path / "cache.safetensors")
    pairs = zip(context.keys + context.values, read.keys + read.values, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(read.mask, context.mask)
    assert torch.equal(read.lengths, context.lengths)
    save_cache(context, tmp_path / "half.safetensors", torch.bfloat16)
    assert load_cache(tmp_path / "half.safetensors").nbytes * 2 == context.nbytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.safetensors", "half.safetensors"]


def test_other_files_and_damaged_ones_are_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(DsskError, match="is not a KV cache of version 1 that dssk restore wrote"):
        load_cache(other)
    whole = tmp_path / "whole.safetensors"
    save_cache(make_context(make_model("llama")), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(DamagedData, match="restore it again"):
        load_cache(cut)
    tensors = load_file(whole)
    del tensors["values.1"]
    save_file(tensors, cut, {"format": "dssk-kv-cache", "version": "1"})
    with pytest.raises(DamagedData, match="does not hold keys and values of every layer"):
        load_cache(cut)
    with pytest.raises(DsskError, match="no file"):
        load_cache(tmp_path / "missing.safetensors")
