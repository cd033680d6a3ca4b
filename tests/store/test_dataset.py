"""Reading a store: rows with their encodings, and refusals before anything is read wrongly."""

import json
import pickle
import random
import re
import shutil

import datasets
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from dssk.errors import DamagedData, DsskError
from dssk.inference.encoding import encode
from dssk.inference.rounding import quantize
from dssk.inference.tokenizer import load_tokenizer, tokenize_contexts
from dssk.store import verify
from dssk.store.dataset import load_rows
from dssk.store.library import ContextLibrary
from dssk.store.manifest import FileInfo
from dssk.store.opening import check_model, load_manifest
from tests.conftest import make_base
from tests.faults.mutations import reseal_store

FIELDS = ["id", "context", "question", "answer", "answers", "encoder_hidden_states"]


@pytest.fixture(scope="module")
def states_of(base, base_path):
    """The states of a context as the model gives them for it alone: (n_tokens, hidden_size)."""
    tokenizer = load_tokenizer(base_path)

    def states(context: str) -> torch.Tensor:
        ids = torch.tensor(tokenize_contexts(tokenizer, [context]))
        return encode(base, ids, torch.ones_like(ids))[0]

    return states


def test_rows_have_the_four_fields_and_the_states_of_their_own_context(finished, states_of):
    rows = load_rows(finished)
    assert isinstance(rows, datasets.DatasetDict)
    assert list(rows) == ["train", "val"]
    for split in rows:
        assert rows[split].column_names == FIELDS
        for row in rows[split]:
            states = row["encoder_hidden_states"]
            expected = states_of(row["context"])
            assert states.dtype == torch.bfloat16
            assert states.shape == expected.shape
            torch.testing.assert_close(states.float(), expected, rtol=0.01, atol=0.01)


def test_selecting_shuffling_and_slicing_keep_rows_whole(finished):
    rows = load_rows(finished)["train"]
    whole = {row["id"]: row["encoder_hidden_states"] for row in rows}

    def check(part):
        for row in part:
            assert torch.equal(row["encoder_hidden_states"], whole[row["id"]])

    check(rows.select(range(5, 20, 3)))
    check(rows.shuffle(seed=1, keep_in_memory=True))
    check(rows.filter(lambda row: row["id"].endswith("1"), keep_in_memory=True))
    check(rows.select_columns(["encoder_hidden_states", "id"]))
    batch = rows[3:7]
    check([{name: batch[name][i] for name in batch} for i in range(4)])
    assert rows.select_columns(["question"])[0].keys() == {"question"}


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_loader_workers_read_the_same_rows(finished, method, num_workers):
    rows = load_rows(finished)["val"]
    rows[0]  # shards that are open already must not disturb the workers
    loader = DataLoader(rows, batch_size=None, num_workers=num_workers, multiprocessing_context=method)
    for row, expected in zip(loader, rows, strict=True):
        assert torch.equal(row["encoder_hidden_states"], expected["encoder_hidden_states"])


def test_reading_copies_nothing_and_writing_does_not_reach_the_file(finished):
    rows = load_rows(finished)["train"]
    first, again = rows[0]["encoder_hidden_states"], rows[0]["encoder_hidden_states"]
    assert first.data_ptr() == again.data_ptr()
    before = load_rows(finished)["train"][0]["encoder_hidden_states"].clone()
    first.zero_()
    assert torch.equal(load_rows(finished)["train"][0]["encoder_hidden_states"], before)


def test_rows_pickle_as_paths(finished):
    rows = load_rows(finished)["train"]
    rows[0]
    content = pickle.dumps(rows)
    assert len(content) < 20_000
    restored = pickle.loads(content)  # noqa: S301 - made here
    assert torch.equal(restored[3]["encoder_hidden_states"], rows[3]["encoder_hidden_states"])


def test_every_part_is_a_plain_dataset(finished):
    whole = datasets.load_from_disk(str(finished))
    assert list(whole) == ["train", "val"]
    contexts = datasets.load_from_disk(str(finished / "contexts"))
    row = whole["train"][7]
    context = contexts[row["context_index"]]
    assert context["context"] == row["context"]
    assert len(context["encoder_hidden_states"]) == context["n_tokens"] * 32 * 2


def test_results_of_map_on_one_store_are_not_taken_for_those_of_another(tmp_path, preprocess, source):
    paths = [preprocess(tmp_path / str(n), source, max_examples=n) for n in (60, 70)]
    fingerprints = {datasets.load_from_disk(str(path / "train"))._fingerprint for path in paths}
    assert len(fingerprints) == 2


@pytest.mark.parametrize(("storage_dtype", "dtype", "tolerance"), [
    ("fp32", torch.float32, 1e-4),
    ("fp16", torch.float16, 2e-3),
    ("bf16", torch.bfloat16, 1e-2),
    ("int8", torch.bfloat16, 2e-2),
])  # fmt: skip
def test_every_storage_type_gives_back_the_states(
    tmp_path, preprocess, source, states_of, storage_dtype, dtype, tolerance
):
    rows = load_rows(preprocess(tmp_path, source, storage_dtype=storage_dtype))["val"]
    for row in rows:
        states, expected = row["encoder_hidden_states"], states_of(row["context"])
        assert states.dtype == dtype
        error = (states.float() - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
        assert error.max() < tolerance


def test_int8_keeps_tokens_of_zeros_and_of_any_size():
    states = torch.tensor([[0.0, 0.0], [1e-30, -2e-30], [3e30, 1e30], [0.5, -1.0]])
    values, scale = quantize(states, "int8")
    assert scale is not None
    back = values.to(torch.float32) * scale.float()[:, None]
    assert torch.all((back - states).abs() <= states.abs().amax(dim=1, keepdim=True) / 127)


def test_int8_uses_all_of_its_range_and_makes_no_number_that_is_none():
    """A NaN would be rounded to whatever the processor makes of it."""

    class Finite(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert made.isfinite().all(), func
            return made

    with Finite():
        values, _ = quantize(torch.tensor([[0.0, 0.0], [3.0, -1.0], [0.5, -8.0]]), "int8")
    assert values.abs().amax(dim=1).tolist() == [0, 127, 127]


def test_a_store_of_texts_has_rows_without_states(tmp_path, preprocess, source):
    path = preprocess(tmp_path, source, text_only=True)
    assert not (path / "contexts").exists()
    assert load_rows(path)["train"].column_names == FIELDS[:-1]
    check_model(load_manifest(path), "any/model")


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(finished, tmp_path):
    """A copy of a finished store, to be damaged."""
    return shutil.copytree(finished, tmp_path / "damaged")


def test_the_manifest_says_what_was_encoded(finished, base_path):
    manifest = load_manifest(finished)
    assert manifest.model_id == str(base_path)
    assert manifest.hidden_size == 32
    assert manifest.model_dtype == "float32"
    assert manifest.storage_dtype == "bf16"
    assert manifest.maximum_input_length == 256
    assert sum(segment.rows for segment in manifest.segments) == manifest.counts.contexts
    assert len(manifest.all_files) == 1 + 3 + 3 + 2 + 2 * 5
    assert manifest.encode_layer == "last"


def test_a_folder_without_manifest_is_unfinished(damaged, tmp_path):
    (damaged / "manifest.json").unlink()
    with pytest.raises(DsskError, match="unfinished"):
        load_rows(damaged)
    with pytest.raises(DsskError, match="no such folder"):
        load_rows(tmp_path / "nowhere")


def test_any_change_of_the_manifest_is_found(damaged):
    path = damaged / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        with pytest.raises(DsskError):
            load_manifest(damaged)
    for cut in range(0, len(content), 101):
        path.write_bytes(content[:cut])
        with pytest.raises(DamagedData):
            load_manifest(damaged)


def test_a_store_of_a_later_format_is_refused(damaged):
    path = damaged / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(DsskError, match="format version 99, this dssk reads 2"):
        load_rows(damaged)


def test_a_missing_or_shortened_file_is_found_on_opening(damaged):
    shard = damaged / "contexts" / "data-00002-of-00005.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DamagedData, match=r"data-00002-of-00005.arrow has \d+ bytes, not \d+: run"):
        load_rows(damaged)
    shard.unlink()
    with pytest.raises(DamagedData, match=r"data-00002-of-00005.arrow is missing"):
        load_rows(damaged)


def test_the_model_that_encoded_is_accepted_wherever_it_lies(finished, base_path, tmp_path):
    manifest = load_manifest(finished)
    check_model(manifest, base_path)
    check_model(manifest, shutil.copytree(base_path, tmp_path / "moved"))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 1}, "other weights"),
        ({"n_embd": 64}, "hidden size 32, not 64"),
        ({"n_head": 2}, "other weights"),
    ],
)
def test_another_model_is_refused_before_its_weights_are_loaded(
    finished, tmp_path, monkeypatch, change, difference
):
    other = make_base(tmp_path / "other", **change)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(DsskError, match=difference):
        check_model(load_manifest(finished), other)


def test_another_tokenizer_is_refused(finished, base_path, tmp_path):
    other = shutil.copytree(base_path, tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(DsskError, match="another tokenizer"):
        check_model(load_manifest(finished), other)


def test_another_template_is_refused(finished, base_path, monkeypatch):
    monkeypatch.setattr("dssk.prompts.TEMPLATE_VERSION", 3)
    with pytest.raises(DsskError, match="prompt template 1, this dssk uses 3"):
        check_model(load_manifest(finished), base_path)


def test_another_layer_is_refused(finished, base_path):
    manifest = load_manifest(finished)
    check_model(manifest, base_path, encode_layer="last")
    with pytest.raises(DsskError, match="encoded by layer last, the model reads layer 18: encode them again"):
        check_model(manifest, base_path, encode_layer="18")
    middle = manifest.model_copy(update={"encode_layer": "18"})
    check_model(middle, base_path, encode_layer="18")
    with pytest.raises(DsskError, match="encoded by layer 18, the model reads layer last"):
        check_model(middle, base_path)


def test_the_way_of_version_0_1_leads_to_the_same_function():
    from dssk.data.store import load_rows as before
    from dssk.store import load_rows as now

    assert before is now is load_rows


def test_a_library_has_no_rows(base_path, tmp_path):
    ContextLibrary(tmp_path / "library", base_path)
    with pytest.raises(DsskError, match="got a library, which has no questions"):
        load_rows(tmp_path / "library")


def read_all(path) -> None:
    """What training and evaluation read of a store."""
    for table in load_rows(path).values():
        for row in table:
            assert len(row["encoder_hidden_states"])


def test_every_flipped_byte_is_found_by_the_first_that_reads_it(damaged):
    """100 of 100, anywhere but in the JSON files of shards, which only an interrupted run reads."""
    rng = random.Random(1)
    paths = sorted(p for p in damaged.rglob("*") if p.is_file() and not re.match(r"data-.*json", p.name))
    paths = [
        path for path in paths if path.name != "dataset_dict.json" and path.parent.name != "contexts"
    ] + sorted(damaged.glob("contexts/*.arrow"))
    for _ in range(100):
        path = rng.choice(paths)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DsskError, match=r"^[^\n]*$"):
            read_all(damaged)
        path.write_bytes(content)
    read_all(damaged)


def test_names_in_a_manifest_never_lead_outside(damaged, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("dear")
    info = FileInfo(num_bytes=5, xxh3_128="0" * 32)
    for name in ("../victim", str(victim), "train/../../victim"):
        manifest = load_manifest(damaged)
        files = {name: info, **manifest.files}
        (damaged / "manifest.json").write_text(manifest.model_copy(update={"files": files}).to_json())
        for use in (load_rows, verify.check, verify.discard):
            with pytest.raises(DamagedData, match="is not the name of a file in it"):
                use(damaged)
        assert victim.read_text() == "dear"
        (damaged / "manifest.json").write_text(manifest.to_json())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train/state.json", b"{"),
        ("train/dataset_info.json", b'{"features": {"id": {"dtype": "no type", "_type": "Value"}}}'),
        ("train/data-00000-of-00001.arrow", b"no table"),
    ],
)
def test_files_that_fit_their_checksums_and_nothing_else_are_damage(damaged, name, content):
    (damaged / name).write_bytes(content)
    reseal_store(damaged)
    with pytest.raises(DamagedData, match=r"train does not hold what it should.*--discard"):
        load_rows(damaged)


def test_rows_of_contexts_that_are_not_there_are_damage(damaged):
    (file,) = damaged.glob("train/*.arrow")
    rows = datasets.Dataset.from_file(str(file)).data.table.to_pylist()
    rows[0]["context_index"] = 40
    schema = datasets.Dataset.from_file(str(file)).data.schema
    with pa.ipc.new_stream(str(file), schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))
    reseal_store(damaged)
    with pytest.raises(DamagedData, match="rows of contexts that are not among the 40"):
        load_rows(damaged)
