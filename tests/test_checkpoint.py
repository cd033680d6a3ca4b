"""The manifest of a checkpoint, whoever has written it."""

import json

import pytest

from dssk import checkpoint
from dssk.errors import DamagedData, DsskError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    checkpoint.finish_checkpoint(folder, {"step": 2, "world_size": 1, "skip_steps": 1, "experiment": {}})
    return folder


def rewrite(folder, **changes) -> None:
    """Change a manifest and give it the checksum of what it now says."""
    file = folder / checkpoint.MANIFEST
    body = {**json.loads(file.read_text()), **changes}
    body.pop("checksum")
    file.write_text(json.dumps({**body, "checksum": checkpoint._checksum(body)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": []},
        {"files": {"model.safetensors": 5}},
        {"files": {"model.safetensors": {"num_bytes": "7", "xxh3_128": ""}}},
        {"files": {"model.safetensors": {"num_bytes": 7}}},
        {"files": {"../../victim": {"num_bytes": 0, "xxh3_128": ""}}},
        {"files": {"/etc/passwd": {"num_bytes": 0, "xxh3_128": ""}}},
        {"step": "2"},
        {"step": -1},
        {"world_size": 0},
        {"skip_steps": 1.5},
        {"experiment": [1]},
        {"format_version": None},
        {"base_fingerprint": 7},
    ],
    ids=str,
)
def test_a_manifest_that_was_edited_with_its_checksum_is_one_line(folder, changes):
    checkpoint.verify_checkpoint(folder)
    rewrite(folder, **changes)
    with pytest.raises(DamagedData, match="dssk_manifest.json is damaged") as caught:
        checkpoint.verify_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"files": {}}'])
def test_what_is_no_manifest_is_one_line(folder, content):
    (folder / checkpoint.MANIFEST).write_bytes(content)
    with pytest.raises(DamagedData, match="dssk_manifest.json is damaged"):
        checkpoint.load_manifest(folder)


def test_another_format_is_named(folder):
    rewrite(folder, format_version=7)
    with pytest.raises(DsskError, match="has format version 7, this dssk reads 1"):
        checkpoint.load_manifest(folder)
