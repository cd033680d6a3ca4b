"""What version 0.1 wrote (`make.py`) is read as 0.1 read it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dssk.commands import preproc
from dssk.errors import DsskError
from dssk.inference.loading import load_model
from dssk.store import verify
from dssk.store.dataset import load_rows
from dssk.store.library import ContextLibrary
from dssk.store.opening import check_model, load_manifest
from tests.conftest import VOCAB_SIZE

V01 = Path(__file__).parent


@pytest.fixture
def v01(tmp_path) -> Path:
    """A copy of the folders, so that nothing is written beside the tracked ones."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    return shutil.copytree(V01, tmp_path / "v01", ignore=ignored)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(V01 / "expected.safetensors")


def test_a_store(v01, expected):
    for split, table in load_rows(v01 / "store").items():
        assert len(table) == {"train": 8, "val": 4}[split]
        for row in table:
            town = row["context"].split()[0]
            assert row["id"].startswith(town)
            assert row["answers"] == [row["answer"]]
            assert row["answer"] in row["context"]
            assert torch.equal(row["encoder_hidden_states"], expected[f"store/{split}/{row['context']}"])
    verify.check(v01 / "store")
    check_model(load_manifest(v01 / "store"), v01 / "base")


def test_a_finished_store_is_used_again_and_another_model_refused(v01, monkeypatch, capsys):
    (v01 / "processed_data").mkdir()
    shutil.move(v01 / "store", v01 / "processed_data" / "base")
    monkeypatch.chdir(v01)
    flags = "--dataset rows.jsonl --embedding_model base --data_cache_path . --maximum_input_length 64"
    flags += " --val_fraction 0.3 --shard_rows 4"
    preproc.main(flags.split())
    assert "used again" in capsys.readouterr().out
    model = load_file(v01 / "base" / "model.safetensors")
    model["transformer.wte.weight"][VOCAB_SIZE // 2] += 1  # covered by what 0.1 looked at
    save_file(model, v01 / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DsskError, match="model_fingerprint"):
        preproc.main(flags.split())


def test_a_store_that_is_opened_as_a_library(v01, expected):
    library = ContextLibrary(v01 / "store", model=v01 / "base")
    (hit,) = library.search("the bridge of frome")
    context = library.get(hit.id)
    assert context.text.startswith("Frome")
    states = (states for name, states in expected.items() if name.endswith(context.text))
    assert torch.equal(context.encoder_hidden_states, next(states))


def test_a_library(v01, expected):
    library = ContextLibrary(v01 / "library", model=v01 / "base")
    assert list(library) == ["mill", "bridge"]
    assert library.get("mill").title == "A mill"
    assert library.get("mill").text == "The mill of Aston was built in 1701."
    assert [hit.id for hit in library.search("who built the bridge of Ely")] == ["bridge"]
    library.verify()
    library.add(["The tower of Frome."], ids=["tower"])
    library.remove("mill")
    for opened in (library, ContextLibrary(v01 / "library", model=v01 / "base")):
        assert list(opened) == ["bridge", "tower"]
        assert torch.equal(opened.get("bridge").encoder_hidden_states, expected["library/bridge"])
        assert [hit.id for hit in opened.search("the tower of Frome or the mill", 5)] == ["tower"]
        opened.verify()


def test_a_fused_model(v01, expected):
    model, tokenizer = load_model(v01 / "final")
    prompt = tokenizer("question: how many mills has Ely \n answer: ", return_tensors="pt")["input_ids"]
    states = expected["library/bridge"][None].float()
    with torch.no_grad():
        none = model(prompt).logits[0, -1]
        bridge = model(prompt, encoder_hidden_states=states).logits[0, -1]
        generated = model.generate(
            prompt, encoder_hidden_states=states, max_new_tokens=8, do_sample=False, pad_token_id=4
        )
    torch.testing.assert_close(none, expected["logits/none"])
    torch.testing.assert_close(bridge, expected["logits/bridge"])
    assert not torch.allclose(none, bridge, atol=1e-2)
    assert torch.equal(generated, expected["generated/bridge"])
