"""States of any layer, from the preprocessing command and a library to the model that reads them."""

import pytest
import torch

import dssk
from dssk.errors import DsskError
from dssk.evaluation.questions import check_encodings
from dssk.inference.tokenizer import load_tokenizer, tokenize_context
from dssk.store.library import ContextLibrary
from dssk.store.opening import load_manifest
from tests.conftest import encode_rows, question_rows

TEXT = "Mill 3 was built in 1703 by Ann 3."


def prepare(base_path, folder, layer: str):
    folder.mkdir()
    return encode_rows(base_path, folder, question_rows(8), "--encode_layer", layer)


@pytest.fixture(scope="module")
def merged_path(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    dssk.from_base(base_path, reader="merged", encode_layer=2).save_pretrained(folder)
    load_tokenizer(base_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flag", "layers", "name"), [("2", [2], "2"), ("0.5", [2], "2"), ("1+last", [1, 4], "1+last")]
)
def test_the_preprocessing_command_stores_the_layer_that_is_asked_for(
    base_path, tmp_path, hidden_states, flag, layers, name
):
    store = encode_rows(
        base_path, tmp_path, question_rows(8), "--encode_layer", flag, "--storage_dtype", "fp32"
    )
    manifest = load_manifest(store)
    assert manifest.encode_layer == name
    assert manifest.hidden_size == 32 * len(layers)
    context = ContextLibrary(store).get(next(iter(ContextLibrary(store))))
    want = hidden_states(context.text)
    got = context.encoder_hidden_states
    torch.testing.assert_close(got, torch.cat([want[layer] for layer in layers], -1), atol=1e-5, rtol=1e-5)


@pytest.fixture
def hidden_states(base, base_path):
    """What enters each layer for a context, and at last what leaves the final norm, from transformers itself."""
    tokenizer = load_tokenizer(base_path)

    @torch.no_grad()
    def find(text):
        ids = torch.tensor([tokenize_context(tokenizer, text)])
        return [states[0] for states in base(ids, output_hidden_states=True).hidden_states]

    return find


def test_a_store_of_another_layer_is_refused(base_path, merged_path, tmp_path):
    for flag, wrong in (("last", "last"), ("1", "1")):
        store = prepare(base_path, tmp_path / flag, flag)
        with pytest.raises(DsskError, match=f"encoded by layer {wrong}, the model reads layer 2"):
            check_encodings(str(store), merged_path)
    check_encodings(str(prepare(base_path, tmp_path / "right", "2")), merged_path)


def test_another_layer_is_not_taken_for_a_finished_store(base_path, tmp_path):
    encode_rows(base_path, tmp_path, question_rows(8))
    with pytest.raises(DsskError):
        encode_rows(base_path, tmp_path, question_rows(8), "--encode_layer", "2")


def test_a_library_keeps_what_its_model_reads(base_path, merged_path, tmp_path, hidden_states):
    library = ContextLibrary(tmp_path / "library", model=merged_path, storage_dtype="fp32")
    library.add([TEXT], ids=["mill"])
    assert library.manifest.encode_layer == "2"
    torch.testing.assert_close(
        library.get("mill").encoder_hidden_states, hidden_states(TEXT)[2], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(DsskError, match="encoded by layer 2, the model reads layer last"):
        ContextLibrary(tmp_path / "library", model=base_path)


def test_a_layer_that_the_model_lacks_is_refused_at_once(base_path, tmp_path):
    for flag, message in (
        ("5", "layer from 1 to 4"),
        ("0", "layer from 1 to 4"),
        ("first", "layer from 1 to 4"),
        ("1.5", "share of the depth"),
    ):
        with pytest.raises(DsskError, match=message):
            prepare(base_path, tmp_path / flag, flag)
