"""The classes that transformers' common tests run on: `transformers_common` starts them."""

import unittest

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
    MODEL_MAPPING_NAMES,
)
from transformers_suite.generation.test_utils import GenerationTesterMixin
from transformers_suite.test_modeling_common import ModelTesterMixin, ids_tensor

from dssk.inference.auto import family

FAMILIES: dict[str, dict] = {
    "gpt_bigcode": {"n_inner": 37},
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
}
VARIANTS = {
    "Plain": None,
    "Fused": {"num_cross_attn_layers": 1},
    "Reading": {
        "num_cross_attn_layers": 2,
        "cross_attn_shared_weights": True,
        "cross_attn_final_layer": True,
        "cross_attn_init": "normal",
    },
}
CONTEXT_TOKENS = 5


class Tester:
    """What the common tests ask for: sizes, a configuration, inputs."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 4, 7, 32, 2, 4
    is_training = True

    def __init__(self, parent, model_type, fields, reading):
        self.parent, self.model_type, self.fields, self.reading = parent, model_type, fields, reading
        self.config_class = CONFIG_MAPPING[model_type] if fields is None else family(model_type).config
        self.vocab_size = 99
        if (
            model_type == "gpt_bigcode"
        ):  # its attention has no other number, so it is left to the configuration
            return
        self.num_key_value_heads = 2

    def get_config(self):
        sizes = {
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size, "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers, "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        }  # fmt: skip
        if self.model_type != "gpt_bigcode":
            sizes["num_key_value_heads"] = self.num_key_value_heads
        plain = AutoConfig.for_model(self.model_type)
        known = {*plain.to_dict(), *plain.attribute_map}
        sizes = {name: value for name, value in sizes.items() if name in known}
        return self.config_class(**sizes, **FAMILIES[self.model_type], **(self.fields or {}))

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        inputs = {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}
        if self.reading:
            inputs["encoder_hidden_states"] = torch.randn(self.batch_size, CONTEXT_TOKENS, self.hidden_size)
        return self.get_config(), inputs


def _case(variant, model_type):
    fields = VARIANTS[variant]
    config_class = CONFIG_MAPPING[model_type]
    plain = (MODEL_MAPPING[config_class], MODEL_FOR_CAUSAL_LM_MAPPING[config_class])
    if fields is None:
        classes = plain
    else:
        classes = (family(model_type).backbone, family(model_type).causal_lm)
        # The tests tell by a class's name which inputs and labels it takes.
        MODEL_MAPPING_NAMES[f"dssk_{model_type}"] = classes[0].__name__
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"dssk_{model_type}"] = classes[1].__name__

    def set_up(self):
        self.model_tester = Tester(self, model_type, fields, variant == "Reading")

    attributes = {"all_model_classes": classes, "setUp": set_up, "__module__": __name__}
    return type(
        f"{variant}_{model_type}", (ModelTesterMixin, GenerationTesterMixin, unittest.TestCase), attributes
    )


for _variant in VARIANTS:
    for _model_type in FAMILIES:
        globals()[f"{_variant}_{_model_type}"] = _case(_variant, _model_type)
