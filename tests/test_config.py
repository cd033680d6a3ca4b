import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

from dssk.config import (
    ExperimentConfig,
    apply_overrides,
    expand_group,
    experiment_id,
    parse_experiment,
)
from dssk.errors import DsskError
from dssk.inference.auto import family, fused_config
from dssk.models.shapes import window
from dssk.models.weights import is_cross_attn
from dssk.training.estimate import model_fields
from dssk.training.published import PUBLISHED, published_config, table
from exp_configs import BASE_CONFIG, EXP_GROUPS
from tests.conftest import REPOSITORY

# Layers and heads.
LOCAL_BASES = {"runs/demo/seed-0/base": (2, 4), "runs/merged/base": (4, 4), "runs/squad/base": (3, 4)}
EXPERIMENTS = [(group, exp) for group, exps in EXP_GROUPS.items() for exp in expand_group(exps)]


def test_every_key_of_the_base_configuration_is_known_and_none_is_missing():
    required = {name for name, field in ExperimentConfig.model_fields.items() if field.is_required()}
    assert set(BASE_CONFIG) == required


def test_the_experiments_of_version_0_1_keep_their_identity():
    """A new key in them would give their runs' folders other names, and their jobs would start afresh."""
    assert (
        experiment_id(expand_group(EXP_GROUPS["crossattn_starcoderbase-1b"])[0])
        == "98fe9274d2a59e9761766e7c66b50571"
    )
    assert parse_experiment(BASE_CONFIG).cross_attn_norm == "layer_norm"
    assert parse_experiment(BASE_CONFIG).cross_attn_mlp == "plain"


def base_config(path, **changes):
    """The configuration of an experiment's base; `changes` by their names of today."""
    if path in LOCAL_BASES:
        layers, heads = LOCAL_BASES[path]
        base = GPTBigCodeConfig(n_layer=layers, n_head=heads, n_embd=128, n_positions=512)
    else:
        base = published_config(path)
    for key, value in changes.items():
        setattr(base, key, value)
    return base


@pytest.mark.parametrize(("group", "exp_dict"), EXPERIMENTS)
def test_every_experiment_is_valid_and_fits_its_base_model(group, exp_dict):
    cfg = parse_experiment(exp_dict)
    base = base_config(cfg.model_path)
    model = fused_config(base, **model_fields(cfg))
    assert len(model.cross_attn_layers) == cfg.num_cross_attn_layers
    assert cfg.context_size <= window(base)


@pytest.mark.parametrize(("group", "exp_dict"), EXPERIMENTS)
def test_every_experiment_trains_at_its_real_depth_and_toy_widths(group, exp_dict, tokens):
    cfg = parse_experiment(exp_dict)
    fields = model_fields(cfg)
    if cfg.cross_attn_num_attention_heads is not None:
        fields["cross_attn_hidden_size"] = 2 * cfg.cross_attn_num_attention_heads
    heads = base_config(cfg.model_path).num_attention_heads
    toy = {
        "hidden_size": 4 * heads,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
        "vocab_size": 300,
    }
    base = base_config(cfg.model_path, **toy, head_dim=4, n_inner=16, bos_token_id=0, eos_token_id=0)
    model = family(base.model_type).causal_lm(fused_config(base, **fields)).train()
    ids = tokens(2, 6)
    model(ids, labels=ids, context_input_ids=tokens(2, 5)).loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == set(filter(is_cross_attn, dict(model.named_parameters())))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_add_up_to_the_published_size(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published_config(name))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == PUBLISHED[name].get("parameters", counted)


def test_the_table_of_what_a_run_needs_is_that_of_the_shipped_experiments():
    shown = (REPOSITORY / "docs" / "training.md").read_text()
    rows = table(EXP_GROUPS)
    assert len(rows) == sum(
        group.startswith("crossattn_") and exps[0]["model_path"] not in LOCAL_BASES
        for group, exps in EXP_GROUPS.items()
    )
    assert "\n".join(rows) in shown, "put the output of `table(EXP_GROUPS)` there"


def test_the_groups_of_experiments_are_these():
    names = (
        "tiny tiny_contexts small santacoder starcoder starcoderbase-1b starcoderbase-3b starcoderbase-7b "
        "starchat-alpha smollm2-135m qwen3-0.6b llama-3.2-1b gemma-2-2b starcoder2-3b starcoder2-7b mistral-7b "
        "llama-3.1-8b qwen3-8b starcoder2-15b"
    )
    merged = "tiny smollm2-135m replay_smollm2-135m replay_two_smollm2-135m"
    assert set(EXP_GROUPS) == {f"crossattn_{name}" for name in names.split()} | {
        f"merged_{name}" for name in merged.split()
    }


def test_an_unknown_key_is_refused_naming_the_nearest_known_one():
    with pytest.raises(DsskError, match="unknown key learning_rat, did you mean learning_rate?"):
        parse_experiment({**BASE_CONFIG, "learning_rat": 1e-3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip_steps": 0}, "skip_steps is 0"),
        ({"bf16": 1}, "bf16 is 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'"),
        ({"fp16": True, "bf16": True}, "at most one"),
        ({"cross_attn_dropout_prob": 1.0}, "cross_attn_dropout_prob is 1.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, input should be a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        (
            {"cross_attn_hidden_size": 10**400},
            "cross_attn_hidden_size is 1000.*0, input should be less than or",
        ),
        ({"skip_steps": 10**9}, "skip_steps is 1000000000, input should be less than or equal to 4096"),
        ({"seed": 5_000_000_000}, "seed is 5000000000, input should be less than 4294967296"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"evil\n\x1b[31mkey": 1}, r"unknown key 'evil\\n\\x1b\[31mkey'"),
    ],
)
def test_a_wrong_value_is_refused_by_key_and_value(change, message):
    with pytest.raises(DsskError, match=message):
        parse_experiment({**BASE_CONFIG, **change})


def test_all_faults_are_named_at_once_and_on_one_line():
    with pytest.raises(DsskError) as caught:
        parse_experiment({**BASE_CONFIG, "skip_steps": 0, "sed": 1, "bf16": "no"})
    message = str(caught.value)
    assert all(word in message for word in ("skip_steps", "did you mean seed", "bf16"))
    assert "\n" not in message


@pytest.mark.parametrize("key", BASE_CONFIG)
def test_a_missing_key_is_refused_by_name(key):
    with pytest.raises(DsskError, match=f"key {key} is missing"):
        parse_experiment({k: v for k, v in BASE_CONFIG.items() if k != key})


@pytest.mark.parametrize(("group", "exp_dict"), EXPERIMENTS)
def test_a_configuration_survives_json(group, exp_dict):
    cfg = parse_experiment(exp_dict)
    assert parse_experiment(json.loads(json.dumps(cfg.model_dump()))) == cfg


def test_a_list_as_a_value_stands_for_one_experiment_with_each_element():
    grid = expand_group([{"a": [1, 2], "b": 3, "c": ["x", "y"]}])
    assert grid == [{"a": a, "b": 3, "c": c} for a in (1, 2) for c in ("x", "y")]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(BASE_CONFIG)), st.one_of(st.none(), st.integers(), st.text(max_size=5))
    )
)
def test_the_id_of_an_experiment_depends_on_its_content_alone(exp_dict):
    shuffled = dict(reversed(exp_dict.items()))
    assert experiment_id(exp_dict) == experiment_id(shuffled)
    assert len(experiment_id(exp_dict)) == 32
    assert experiment_id({**exp_dict, "other": 0}) != experiment_id(exp_dict)


def test_the_id_is_the_one_that_haven_gives():
    haven_utils = pytest.importorskip(
        "haven.haven_utils", reason='haven-ai is not installed: pip install "dssk[haven]"'
    )
    for _, exp_dict in EXPERIMENTS:
        assert experiment_id(exp_dict) == haven_utils.hash_dict(exp_dict)


def test_overrides_are_json_or_plain_text():
    changed = apply_overrides(BASE_CONFIG, ["learning_rate=1e-4", "fp16=false", "model_path=a/b", "seed=3"])
    assert (changed["learning_rate"], changed["fp16"], changed["model_path"], changed["seed"]) == (
        1e-4,
        False,
        "a/b",
        3,
    )
    assert BASE_CONFIG["seed"] == 0
    with pytest.raises(DsskError, match="want key=value"):
        apply_overrides(BASE_CONFIG, ["seed"])


def test_a_message_stays_short_whatever_the_experiment_holds():
    hostile = {f"unknown_{i}": 0 for i in range(10_000)} | {"k" * 100_000: 1, "seed": "x" * 100_000}
    with pytest.raises(DsskError, match="and 9994 more") as caught:
        parse_experiment({**BASE_CONFIG, **hostile})
    assert len(str(caught.value)) < 2_000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000, '{"a":' * 50_000])
def test_a_value_that_no_parser_can_take_is_refused_in_one_line(value):
    with pytest.raises(DsskError, match="--set seed: its value is nested too deeply, or a number too long"):
        apply_overrides(BASE_CONFIG, [f"seed={value}"])


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_an_override_that_is_no_number_is_refused(text):
    with pytest.raises(DsskError, match="learning_rate is -?(inf|nan)"):
        parse_experiment(apply_overrides(BASE_CONFIG, [f"learning_rate={text}"]))


def test_what_is_no_text_is_refused_in_one_line():
    for exp_dict in ({"model_path": "base\ud800"}, {"\ud800": 1}):
        with pytest.raises(DsskError, match="half a surrogate pair.*ud800"):
            experiment_id(exp_dict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_contexts": [3, 2]}, r"num_contexts: \[3, 2\] is neither a number from 1 nor"),
        ({"num_contexts": 0}, "num_contexts: 0 is neither"),
        ({"distractors": {"random": 0.0}}, "distractors: .* are no weights"),
        ({"distractors": {"nearby": 1.0}}, "distractors.nearby"),
        ({"gold_missing": 1.0}, "gold_missing is 1.0"),
        ({"num_contexts": 2, "train_on": "both"}, "distill and train_on read one context"),
    ],
)
def test_several_contexts_are_a_number_or_a_range_from_known_sources(changes, message):
    with pytest.raises(DsskError, match=message):
        parse_experiment({**BASE_CONFIG, **changes})


def test_one_context_is_what_questions_read_unless_told_otherwise():
    assert not parse_experiment(BASE_CONFIG).several_contexts
    assert parse_experiment({**BASE_CONFIG, "num_contexts": [1, 3]}).contexts_range == (1, 3)
    assert parse_experiment({**BASE_CONFIG, "gold_missing": 0.1}).several_contexts
