import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from dssk.inference.auto import from_base
from dssk.report.costs import BYTES_PER_VALUE, PUBLISHED, of_model
from exp_configs import EXP_GROUPS


@pytest.mark.parametrize("multi_query", [True, False])
def test_bytes_are_those_that_a_model_really_holds(multi_query, tmp_path):
    shape = {"n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    config = GPTBigCodeConfig(**shape, multi_query=multi_query)
    GPTBigCodeForCausalLM(config).save_pretrained(tmp_path)
    model = from_base(tmp_path, num_cross_attn_layers=1, dtype=torch.bfloat16)
    ids = torch.arange(1, 8)[None]
    cache = model(ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    found = of_model("a model", config)
    assert found.kv_cache_bytes == held / 7
    assert found.stored_bytes == model.encode(ids)[0].nbytes / 7
    assert model.dtype.itemsize == BYTES_PER_VALUE
    if not multi_query:
        assert found.ratio == found.multi_head_ratio


def test_starcoder_saves_1_7_to_3_3_times_not_64():
    ratios = {cache.model: round(cache.ratio, 1) for cache in PUBLISHED}
    assert min(ratios.values()) == ratios["bigcode/starcoder"] == 1.7
    assert max(ratios.values()) == ratios["bigcode/starcoderbase-3b"] == 3.3
    bases = {experiment["model_path"] for group in EXP_GROUPS.values() for experiment in group}
    assert {name for name in bases if "starcoder" in name and "starcoder2" not in name} <= set(ratios)
