"""The default data set as it comes from the Hub, through the real client, from a Hub on this machine."""

import io
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dssk.research import toy
from dssk.store.opening import load_manifest
from dssk.utils.defaults import NATURAL_QUESTIONS
from tests.conftest import REPOSITORY
from tests.data import fake_hub

README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: default/train-*
  - split: validation
    path: default/validation-*
- config_name: dev
  data_files:
  - split: validation
    path: dev/validation-*
---
"""
HTML_BYTES = 400_000


def parquet(split: str, num_rows: int) -> bytes:
    """Rows in the Hub's layout, with pages of HTML that do not compress."""
    rows = toy.generate(split, num_rows, seed=0)
    for row in rows:
        row["document"]["html"] = random.Random(0).randbytes(HTML_BYTES // 2).hex()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, use_dictionary=False)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def natural_questions() -> dict[str, bytes]:
    """The files of the data set, as the Hub has them."""
    return {
        "README.md": README,
        "default/train-00000-of-00001.parquet": parquet("train", 60),
        "default/validation-00000-of-00001.parquet": parquet("val", 30),
        "dev/validation-00000-of-00001.parquet": b"of another configuration",
    }


@pytest.fixture
def command(tmp_path, base_path):
    """Run the command on the default data set against a Hub."""

    def run(hub_url: str, model=base_path) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        environment.pop("HF_TOKEN", None)
        words = [
            sys.executable,
            "-m",
            "dssk.data.preproc_nq",
            "--maximum_input_length",
            "256",
            "--embedding_model",
        ]
        words += [str(model), "--data_cache_path", str(tmp_path)]
        return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_natural_questions_comes_from_the_hub_without_its_html_and_is_used_again_without_the_hub(
    tmp_path, base_path, command, natural_questions
):
    with fake_hub.serve(NATURAL_QUESTIONS, natural_questions) as hub:
        done = command(hub.url)
        assert done.returncode == 0, done.stderr
        assert hub.bytes_sent < 0.6 * sum(map(len, natural_questions.values()))
    path = tmp_path / "processed_data" / base_path.name
    manifest = load_manifest(path)
    assert manifest.counts.rows == {"train": 60, "val": 30}
    assert manifest.source["dataset_commit"] == fake_hub.COMMIT
    again = command(hub.url)  # nobody answers there any more
    assert again.stdout == f"Encoded contexts found in {path}: used again.\n", again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("gated", ["the data set", "the model"])
def test_a_missing_login_is_one_line(command, base_path, gated):
    with fake_hub.serve(NATURAL_QUESTIONS, {}, gated=True) as hub:
        done = command(hub.url, base_path if gated == "the data set" else "bigcode/starcoder")
    assert done.returncode == (3 if gated == "the data set" else 2)
    *announced, error = done.stderr.splitlines()
    fetching = "dssk: no folder bigcode/starcoder here: fetching it from the Hub"
    assert announced == ([] if gated == "the data set" else [fetching])  # nothing is fetched in silence
    assert "`hf auth login`" in error
    assert ("data set" if gated == "the data set" else "bigcode/starcoder") in error
