"""Maps in closed form on tiny models, for which the right answer is known."""

import pytest
import torch

import dssk
from dssk.errors import Diverged, DsskError
from dssk.inference.calibrate import (
    SHORTEST_TEXT,
    continuation_nll,
    divided,
    encode,
    first_tokens,
    fit,
    fit_reader,
    load_maps,
    reader_for,
    scan,
)
from dssk.inference.encoding import Encoder
from dssk.models.merged import arguments, read_context
from tests.models.test_merged import ids, make_model

FAMILIES = ["llama", "gpt_neox"]


def texts(count: int, tokens: int = SHORTEST_TEXT) -> list[list[int]]:
    return [row.tolist() for row in ids(count, tokens, seed=3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_reads_its_own_input_as_it_is(family):
    """From the state that enters a layer its keys and values are a linear map, but for the norm: R2 near one."""
    model = make_model(family, max_position_embeddings=256)
    reader = reader_for(model, (1,))
    equations = fit(model, reader, texts(24), [(1,)], "fp32")[(1,)]
    load_maps(reader, equations)
    explained = equations.explained(reader.up.weight.detach(), reader.up.bias.detach())
    own = sum(width for width, _ in reader.widths[: len(reader.widths) // 3])
    assert explained[own : 2 * own].mean() > 0.95
    assert explained[:own].mean() < 0.9
    assert explained[2 * own :].mean() < 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_names_its_best_layer_and_keeps_its_maps(family):
    model, documents = make_model(family, max_position_embeddings=256), texts(30)
    heard = []
    found = scan(
        model,
        documents[:26],
        documents[26:],
        [(1,), (2,), (3,), (1, 3)],
        report=heard.append,
    )
    assert [score.layers for score in heard] == [(1,), (2,), (3,), (1, 3)]
    assert found.best == min(heard, key=lambda score: score.nll)
    assert found.to_dict()["recommended"] == list(found.best.layers)
    # The reader that is handed over holds the maps of the best layer.
    states = [
        encode(model, text[:-64], [found.best.layers], "bf16")[found.best.layers] for text in documents[26:]
    ]
    with torch.no_grad():
        contexts = [read_context(found.reader, model.base_model, s[None]) for s in states]
    again = continuation_nll(model, contexts, [text[-64:] for text in documents[26:]])
    assert again == pytest.approx(found.best.nll)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_in_closed_form_come_closer_to_the_prompt_than_reading_nothing(family):
    # Weights so small that a layer adds little to what it is given: one state then tells of all layers.
    model, documents = make_model(family, max_position_embeddings=256, initializer_range=0.07), texts(30)
    reader = reader_for(model, (2,))
    load_maps(reader, fit(model, reader, documents[:28], [(2,)])[(2,)])
    errors = {"read": 0.0, "unread": 0.0}
    for document in documents[28:]:
        before, rest = document[:64], torch.tensor([document[64:]])
        context = read_context(reader, model.base_model, encode(model, before, [(2,)], "bf16")[(2,)][None])
        want = model(torch.tensor([document])).logits[:, 64:]
        errors["read"] += (
            (model(rest, **arguments(model, context, None, 1, 64)).logits - want).square().mean().item()
        )
        errors["unread"] += (model(rest).logits - want).square().mean().item()
    assert errors["read"] < 0.8 * errors["unread"]


def test_many_passes_fit_what_one_does(monkeypatch):
    model = make_model("llama", max_position_embeddings=256)
    documents, candidates = texts(8), [(1,), (2,), (3,)]
    once = scan(model, documents[:6], documents[6:], candidates)
    monkeypatch.setattr("dssk.inference.calibrate.MEMORY_BYTES", 1)
    many = scan(model, documents[:6], documents[6:], candidates)
    assert [s.nll for s in once.scores] == pytest.approx([s.nll for s in many.scores])


def test_sums_do_not_grow_with_the_text():
    model = make_model("llama", max_position_embeddings=256)
    reader = reader_for(model, (2,))
    sizes = [
        sum(t.numel() for t in vars(fit(model, reader, texts(count), [(2,)])[(2,)]).values())
        for count in (2, 20)
    ]
    assert sizes[0] == sizes[1]


def test_a_low_rank_explains_less():
    model = make_model("llama", max_position_embeddings=256)
    equations = fit(model, reader_for(model, (2,)), texts(24), [(2,)])[(2,)]
    full = reader_for(model, (2,))
    explained_by_full = load_maps(full, equations)
    states = torch.randn(1, 50, 64)
    errors, explained = [], []
    for rank in (2, 16, 64):
        reader = reader_for(model, (2,), rank)
        explained.append(load_maps(reader, equations))
        errors.append((reader.maps(states) - full.maps(states)).square().mean().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
    assert explained[0] < explained[1] < explained[2] == pytest.approx(explained_by_full, abs=1e-4)


def test_a_base_that_gives_no_likelihood_is_refused():
    model = make_model("llama", max_position_embeddings=256)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match="no finite likelihood|finite likelihood"):
        scan(model, texts(6), texts(2), [(1,)])


def test_texts_are_held_out_and_too_few_are_refused():
    documents = texts(10) + [[1, 2, 3]] * 5
    fitted, held_out = divided(documents, 3)
    assert len(held_out) == 3
    assert len(fitted) + len(held_out) == len(documents)
    assert all(len(text) >= SHORTEST_TEXT for text in held_out)
    with pytest.raises(DsskError, match="got 5 texts, of them 0 with 128 tokens or more"):
        divided([[1, 2, 3]] * 5, 3)


def test_states_are_fitted_as_they_are_stored():
    model = make_model("llama", max_position_embeddings=256)
    maps = {}
    for dtype in ("fp32", "int8"):
        reader = reader_for(model, (2,))
        load_maps(reader, fit(model, reader, texts(6), [(2,)], dtype)[(2,)])
        maps[dtype] = reader.up.weight.detach().clone()
    assert not torch.equal(maps["fp32"], maps["int8"])


def test_states_of_two_layers_are_scored_as_a_store_keeps_them():
    """In int8 they share a scale: rounded each by itself they would look better than they are."""
    model = make_model("llama", max_position_embeddings=256)
    with torch.no_grad():  # so that the second state is the larger one by far
        model.model.layers[1].mlp.down_proj.weight.mul_(100)
    (text,) = texts(1)
    kept = Encoder(model, storage_dtype="int8", layers=(1, 2)).encode([""], input_ids=[text])[0]
    assert torch.equal(encode(model, text, [(1, 2)], "int8")[(1, 2)], kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_fitted_as_the_base_alone_is(family, tmp_path):
    plain = make_model(family, max_position_embeddings=256)
    plain.save_pretrained(tmp_path)
    model = dssk.from_base(tmp_path, reader="merged", encode_layer=2)
    explained = fit_reader(model, texts(20), num_tokens=1000)
    assert 0 < explained < 1
    reader = reader_for(plain, (2,))
    load_maps(reader, fit(plain, reader, first_tokens(texts(20), 1000), [(2,)])[(2,)])
    for name, value in reader.state_dict().items():
        torch.testing.assert_close(model.cross_attn_blocks[0].state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_maps_are_fitted_for_the_layers_that_are_not_run_again_alone(tmp_path):
    make_model("llama", max_position_embeddings=256).save_pretrained(tmp_path)
    models = [dssk.from_base(tmp_path, reader="merged", encode_layer=1, reader_replay=n) for n in (0, 2)]
    whole, fewer = (model.cross_attn_blocks[0] for model in models)
    for model in models:
        fit_reader(model, texts(20), num_tokens=1000)
    rows = len(fewer.up.weight)
    assert rows * 3 == len(whole.up.weight)
    torch.testing.assert_close(fewer.up.weight, whole.up.weight[:rows], atol=1e-3, rtol=1e-3)


def test_first_tokens_cut_the_last_text():
    assert first_tokens([[1, 2, 3], [4, 5, 6], [7]], 5) == [[1, 2, 3], [4, 5]]
    assert first_tokens([[1, 2, 3]], 9) == [[1, 2, 3]]


def test_the_best_layer_is_fitted_again_on_all_texts(monkeypatch):
    model, documents = make_model("llama", max_position_embeddings=256), texts(12)
    monkeypatch.setattr("dssk.inference.calibrate.SCAN_TOKENS", 300)
    found = scan(model, documents[:10], documents[10:], [(1,), (2,)])
    whole = reader_for(model, found.best.layers)
    load_maps(whole, fit(model, whole, documents[:10], [found.best.layers])[found.best.layers])
    torch.testing.assert_close(found.reader.up.weight, whole.up.weight)
    few = reader_for(model, found.best.layers)
    load_maps(few, fit(model, few, first_tokens(documents, 300), [found.best.layers])[found.best.layers])
    assert not torch.allclose(found.reader.up.weight, few.up.weight, atol=1e-3)
