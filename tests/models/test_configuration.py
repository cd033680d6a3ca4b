import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssk.inference.auto import CrossAttnGPTBigCodeConfig


def config(**fields) -> CrossAttnGPTBigCodeConfig:
    return CrossAttnGPTBigCodeConfig(**{"n_layer": 36, "n_embd": 32, "n_head": 4} | fields)


@pytest.mark.parametrize(
    ("num_layers", "stride", "expected"),
    [
        (6, 6, [35, 29, 23, 17, 11, 5]),
        (1, 9, [35]),
        (36, 1, list(range(35, -1, -1))),
        (8, 4, list(range(35, 4, -4))),
    ],
)
def test_the_stride_counts_back_from_the_last_layer(num_layers, stride, expected):
    layers = config(num_cross_attn_layers=num_layers, cross_attn_layers_stride=stride).cross_attn_layers
    assert layers == expected


@given(num_layers=st.integers(1, 40), stride=st.integers(1, 40), n_layer=st.integers(1, 40))
def test_a_layout_is_refused_exactly_when_it_would_need_a_layer_below_the_first(num_layers, stride, n_layer):
    fields = {"num_cross_attn_layers": num_layers, "cross_attn_layers_stride": stride, "n_layer": n_layer}
    if n_layer - 1 - stride * (num_layers - 1) >= 0:
        assert min(config(**fields).cross_attn_layers) >= 0
    else:
        with pytest.raises(ValueError, match="decoder layers"):
            config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cross_attn_hidden_size": 30}, "30 is not a multiple of cross_attn_num_attention_heads 4"),
        ({"cross_attn_num_key_value_heads": 3}, "4 is not a multiple of cross_attn_num_key_value_heads 3"),
        ({"cross_attn_shared_projections": True, "cross_attn_num_key_value_heads": 1}, "as many heads"),
        ({"cross_attn_dropout_prob": 1.0}, "want 0 <= p < 1"),
        ({"cross_attn_init": "ones"}, "want one of zero, normal, copy"),
        ({"num_cross_attn_layers": 0}, "at least 1"),
        ({"reader_replay": 1}, "reader_replay is 1, .* cross_attention reader has 0 layers to run again"),
        ({"reader": "merged", "encode_layer": []}, r"encode_layer is \[\], want at least one layer"),
        ({"reader": "merged", "reader_rank": 33}, "reader_rank is 33, more than the 32 values of a state"),
        ({"reader": "merged", "reader_replay": 1}, "from encode_layer last on .* want 0 to 0"),
        ({"reader": "merged", "encode_layer": 1, "reader_replay": 99}, "reader_replay is 99, .* want 0 to "),
        ({"reader": "merged", "encode_layer": 1, "reader_replay": -1}, "reader_replay is -1"),
    ],
)
def test_an_impossible_layout_is_refused_with_its_reason(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_old_name_of_the_number_of_layers_is_read(tmp_path):
    written = config(n_cross_attn_layers=3)
    written.save_pretrained(tmp_path)
    assert CrossAttnGPTBigCodeConfig.from_pretrained(tmp_path).num_cross_attn_layers == 3


def test_two_layers_are_a_list_or_what_the_commands_call_them():
    named, listed = (config(reader="merged", encode_layer=layers) for layers in ("1+last", [1, "last"]))
    assert named.encode_layers == listed.encode_layers == (1, named.num_hidden_layers)
    assert named.states_width == 2 * config().states_width == 64
    with pytest.raises(ValueError, match=r"encode_layer is 99, want .* a \+ joins two of them"):
        config(reader="merged", encode_layer="1+99")


def test_width_and_heads_default_to_the_decoders():
    made = config()
    assert (made.cross_attn_hidden_size, made.cross_attn_num_attention_heads) == (32, 4)
    assert made.cross_attn_num_key_value_heads == 4
