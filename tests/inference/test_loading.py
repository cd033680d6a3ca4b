"""The one way to load: what is found, what is refused, and damage in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dssk.checkpoint import write_checkpoint
from dssk.errors import DamagedData, DsskError, EnvironmentFault
from dssk.inference import loading
from dssk.inference.fingerprint import model_fingerprint
from dssk.inference.loading import find_encoder, load, load_base, load_base_config, load_model
from dssk.inference.tokenizer import load_tokenizer
from dssk.models.weights import is_cross_attn
from tests.conftest import byte_tokenizer, fused, make_base


@pytest.fixture
def base_copy(base_path, tmp_path):
    """A base that a test may damage."""
    return shutil.copytree(base_path, tmp_path / "base")


@pytest.fixture
def checkpoint(base_copy, tmp_path):
    """A checkpoint as training writes it, with the fingerprint of its base."""
    model, tokenizer = fused(base_copy), load_tokenizer(base_copy)
    facts = {"step": 1, "base_fingerprint": model_fingerprint(base_copy, load_base_config(base_copy))}
    (tmp_path / "run").mkdir()
    with write_checkpoint(tmp_path / "run" / "checkpoint-1", facts, 1) as writer:
        weights = {name: p.detach() for name, p in model.named_parameters() if is_cross_attn(name)}
        writer.model(model, tokenizer, weights)
    return tmp_path / "run" / "checkpoint-1"


def edit_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


# --- finding -----------------------------------------------------------------------------------------------------


def test_a_base_a_checkpoint_a_run_and_a_fused_folder_are_loaded_alike(base_copy, checkpoint, tmp_path):
    expected = fused(base_copy).state_dict()
    load_model(checkpoint)[0].save_pretrained(tmp_path / "fused")
    byte_tokenizer().save_pretrained(tmp_path / "fused")
    for path in (checkpoint, checkpoint.parent, checkpoint.parent.parent / "run", tmp_path / "fused"):
        for loaded in (load, load_model):
            model, tokenizer = loaded(path)
            assert not model.training
            assert tokenizer.pad_token_id is not None
            assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    plain, _ = load(base_copy)
    assert type(plain) is type(load_base(base_copy))
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_the_base_of_a_checkpoint_encodes_and_a_fused_model_itself(base_copy, checkpoint, tmp_path):
    assert find_encoder(checkpoint.parent) == (str(base_copy.resolve()), None)
    fused(base_copy).save_pretrained(tmp_path / "fused")
    assert find_encoder(tmp_path / "fused") == (str((tmp_path / "fused").resolve()), None)
    assert find_encoder(base_copy) == (str(base_copy.resolve()), None)


@pytest.mark.parametrize(
    "name", ["./models/base", "/nowhere/base", "models/base/", "a/b/c", "gpt2", "~/base", ""]
)
def test_what_is_no_name_on_the_hub_is_never_looked_up_there(name, monkeypatch):
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("looked up"))
    with pytest.raises(DsskError, match="USER/NAME|no model at") as error:
        load(name)
    assert error.value.exit_code == 2


def test_a_mistyped_path_below_a_folder_that_is_here_is_never_looked_up(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("looked up"))
    for call in (load, load_model, load_base, load_tokenizer, find_encoder):
        with pytest.raises(DsskError, match="models is here and holds no base; if it is a name on the Hub"):
            call("models/base")


def test_a_name_on_the_hub_that_is_out_of_reach_is_the_machines_fault():
    with pytest.raises(
        EnvironmentFault, match="no folder someone/base here, and the Hub is out of reach"
    ) as e:
        load_base("someone/base")
    one_line(e)


def test_fetching_is_said(monkeypatch, capsys):
    monkeypatch.setattr(loading.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        loading.PreTrainedConfig,
        "get_config_dict",
        lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no")),
    )
    with pytest.raises(EnvironmentFault):
        load_base("someone/never-fetched")
    assert "no folder someone/never-fetched here: fetching it from the Hub" in capsys.readouterr().err


# --- refusing ----------------------------------------------------------------------------------------------------


def test_a_base_and_a_fused_model_are_not_taken_for_each_other(base_copy, checkpoint):
    with pytest.raises(
        DsskError, match="is a base model without cross-attention blocks: want a checkpoint"
    ) as error:
        load_model(base_copy)
    one_line(error)
    with pytest.raises(DsskError, match="is a fused model, want a base"):
        load_base(checkpoint)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_that_a_configuration_names_is_refused(base_copy, key, nested):
    edit_config(base_copy, **({"text_config": {key: "evil/kernel"}} if nested else {key: "evil/kernel"}))
    with pytest.raises(DsskError, match="which is code from elsewhere") as error:
        load_base(base_copy)
    one_line(error)


def test_an_implementation_that_is_built_in_is_taken(base_copy):
    edit_config(base_copy, _attn_implementation="eager")
    assert load_base(base_copy).config._attn_implementation in ("eager", "sdpa")


def test_a_base_that_was_replaced_is_refused(base_copy, checkpoint, tmp_path):
    load_model(checkpoint)
    other = make_base(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", base_copy / "model.safetensors")
    with pytest.raises(DsskError, match="is not the base that .*checkpoint-1 was trained on") as error:
        load_model(checkpoint)
    one_line(error)
    with pytest.raises(DsskError, match="other is not the base"):
        load_model(checkpoint, base_model=other)


def test_a_base_that_is_gone_or_moved_is_said_and_can_be_named(base_copy, checkpoint, tmp_path):
    moved = base_copy.rename(tmp_path / "moved")
    with pytest.raises(DsskError, match="the base of .*checkpoint-1.*--base_model says where it is now"):
        load_model(checkpoint)
    load_model(checkpoint, base_model=moved)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("transformer.h.1.ln_1.weight"),
        lambda weights: weights.update(more=torch.zeros(1)),
        lambda weights: weights.update(
            {"transformer.h.1.ln_9.weight": weights.pop("transformer.h.1.ln_1.weight")}
        ),
    ],
)
def test_weights_that_are_missing_or_left_over_are_refused(base_copy, change):
    edit_weights(base_copy, change)
    with pytest.raises(DamagedData, match="are missing or left over, such as") as error:
        load_base(base_copy)
    one_line(error)


def test_weights_that_are_a_pickle_are_not_read(base_path, tmp_path):
    folder = shutil.copytree(base_path, tmp_path / "base")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DsskError, match="model.safetensors"):
        load_base(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"n_layer": 6},
        {"n_layer": 3},
        {"n_embd": 64},
        {"n_embd": "x"},
        {"n_head": 0},
        {"dtype": "floatx"},
        {"activation_function": "nope"},
        {"model_type": ["gpt_bigcode"]},
        {"n_positions": 10**12},
    ],
    ids=str,
)
def test_a_configuration_that_was_altered_is_one_line(base_copy, values):
    edit_config(base_copy, **values)
    with pytest.raises(DsskError) as error:
        load(base_copy)
    one_line(error)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff{", b"[]", b"[" * 100_000, b"\x10" * 100])
def test_a_file_of_a_base_that_is_something_else_is_one_line(base_copy, file, content):
    (base_copy / file).write_bytes(content)
    with pytest.raises(DamagedData, match="cannot be loaded") as error:
        load(base_copy)
    assert str(base_copy) in one_line(error)


def test_one_flipped_byte_of_a_checkpoint_is_found(checkpoint):
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedData, match=r"checkpoint-1/model.safetensors is damaged"):
        load_model(checkpoint)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    assert loading.device() == torch.device("cpu")
    assert loading.device(3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.device(1) == torch.device("cuda:1")
    with pytest.raises(DsskError, match="process 2 of this node has no GPU: start at most 2"):
        loading.device(2)
