"""Configurations of published bases, written down: what a run of a shipped experiment needs is known without a network.

Source: `config.json` of each at huggingface.co/<name>, without what changes neither a shape nor a size. `parameters`,
where its authors or the Hub state it, is the number of distinct weights that the shapes must add up to.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dssk.config import expand_group, parse_experiment
from dssk.inference.rounding import encoding_bytes
from dssk.models.shapes import kv_cache_values, projected_values
from dssk.training.estimate import CACHE_BYTES, Estimate, estimate, meta_model
from dssk.utils.files import size

_LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
_QWEN_3 = {
    "model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128, "rms_norm_eps": 1e-6
}  # fmt: skip
_STARCODER_2 = {
    "model_type": "starcoder2", "vocab_size": 49152, "max_position_embeddings": 16384, "sliding_window": 4096,
    "use_bias": True, "norm_epsilon": 1e-5,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_STARCODER = {
    "model_type": "gpt_bigcode", "vocab_size": 49152, "n_positions": 8192, "multi_query": True,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "TabbyML/SantaCoder-1B": {
        **_STARCODER, "vocab_size": 49280, "n_positions": 2048, "n_layer": 24, "n_embd": 2048, "n_head": 16,
        "parameters": 1_124_886_528,
    },
    "bigcode/starcoderbase-1b": {
        **_STARCODER, "n_layer": 24, "n_embd": 2048, "n_head": 16, "parameters": 1_137_207_296,
    },
    "bigcode/starcoderbase-3b": {
        **_STARCODER, "n_layer": 36, "n_embd": 2816, "n_head": 22,
    },
    "bigcode/starcoderbase-7b": {
        **_STARCODER, "n_layer": 42, "n_embd": 4096, "n_head": 32,
    },
    "bigcode/starcoder": {
        **_STARCODER, "n_layer": 40, "n_embd": 6144, "n_head": 48, "parameters": 15_517_456_384,
    },
    "HuggingFaceH4/starchat-alpha": {
        **_STARCODER, "vocab_size": 49156, "n_layer": 40, "n_embd": 6144, "n_head": 48, "parameters": 15_517_480_960,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "parameters": 134_515_008,
    },
    "meta-llama/Llama-3.2-1B": {
        **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "parameters": 1_235_814_400,
    },
    "meta-llama/Llama-3.1-8B": {
        **_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "parameters": 8_030_261_248,
    },
    "Qwen/Qwen3-0.6B": {
        **_QWEN_3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "tie_word_embeddings": True, "parameters": 596_049_920,
    },
    "Qwen/Qwen3-8B": {
        **_QWEN_3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "parameters": 8_190_735_360,
    },
    "mistralai/Mistral-7B-v0.3": {
        "model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "sliding_window": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "parameters": 7_248_023_552,
    },
    "bigcode/starcoder2-3b": {
        **_STARCODER_2, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
        "num_attention_heads": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "parameters": 3_030_371_328,
    },
    "bigcode/starcoder2-7b": {
        **_STARCODER_2, "hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32,
        "num_attention_heads": 36, "num_key_value_heads": 4, "tie_word_embeddings": True, "parameters": 7_173_923_840,
    },
    "bigcode/starcoder2-15b": {
        **_STARCODER_2, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 40,
        "num_attention_heads": 48, "num_key_value_heads": 4, "tie_word_embeddings": False,
        "parameters": 15_957_889_024,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192, "hidden_size": 2304,
        "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "sliding_window": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "parameters": 2_614_341_888,
    },
}  # fmt: skip


def published_config(name: str) -> PreTrainedConfig:
    """The configuration of a published base; raises `KeyError` for one that is not written down."""
    fields = {key: value for key, value in PUBLISHED[name].items() if key != "parameters"}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def table(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Memory and disk of the first experiment of each group with blocks on a published base, as rows of a table.

    It stands in docs/training.md.
    """
    rows = []
    for group, experiments in groups.items():
        cfg = parse_experiment(expand_group(experiments)[0])
        if cfg.model_path in PUBLISHED and cfg.reader == "cross_attention":
            base = published_config(cfg.model_path)
            model = meta_model(cfg, base)
            rows.append(_row(group, base, model.config, estimate(cfg, model)))
    return rows


def _row(group: str, base: PreTrainedConfig, fused: Any, need: Estimate) -> str:
    stored = encoding_bytes("bf16", base.hidden_size)
    cached, resident = (CACHE_BYTES * values for values in (kv_cache_values(base), projected_values(fused)))
    cells = [
        f"`{group}`",
        f"{', '.join(map(str, reversed(fused.cross_attn_layers)))} of {base.num_hidden_layers}",
        size(need.frozen),
        f"{need.trained_parameters / 1e6:,.0f} M",
        size(need.trained + need.gradients + need.optimizer),
        size(need.per_rank("ddp", 1)),
        size(need.per_rank("zero3", 8)),
        size(need.checkpoint),
        f"{stored:,}",
        f"{resident:,}",
        f"{cached:,} ({cached / stored:.1f} x)",
    ]
    return f"| {' | '.join(cells)} |"
