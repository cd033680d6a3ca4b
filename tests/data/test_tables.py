"""Tables from other hands: read by a process of its own, so that no damage ends ours."""

import contextlib
import random
import signal
import struct
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dssk.data import tables
from dssk.data.readers import RawRow
from dssk.data.schemas import to_qa
from dssk.errors import DamagedData, EnvironmentFault
from tests.data.conftest import rows
from tests.data.layouts import Annotation, Page, wrap

PARAGRAPH = "<P> The mill was built in 1850 by Ada Hill . </P>"


def test_the_html_of_a_parquet_page_is_not_read(tmp_path):
    row = wrap("hub", Page("7", "Mill", "who", PARAGRAPH, [Annotation(PARAGRAPH, ["Ada Hill"])]))
    row["document"]["html"] = "<html>" * 1000
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = tables.rows(str(tmp_path / "a.parquet"))
    assert "html" not in found["document"]
    assert to_qa(RawRow("f:1", found)).answers == ["Ada Hill"]


@pytest.mark.parametrize("name", ["-r.parquet", "é [1]* b.arrow", "a.arrow"])
def test_any_name_is_opened_as_it_is(tmp_path, name, monkeypatch):
    table = pa.Table.from_pylist(rows(2))
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as file:
            file.write_table(table)
    monkeypatch.chdir(tmp_path)
    assert list(tables.rows(name)) == rows(2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_flipped_byte_never_ends_our_process(tmp_path, kind):
    """Each gives the same rows, other rows, or one line; what the reader dies of is seen by its parent alone."""
    table = pa.Table.from_pylist(rows(30))
    if kind == "parquet":
        pq.write_table(table, tmp_path / "whole")
    else:
        with pa.ipc.new_stream(tmp_path / "whole", table.schema) as file:
            file.write_table(table)
    whole = (tmp_path / "whole").read_bytes()
    chooser = random.Random(0)
    for _ in range(12):
        content = bytearray(whole)
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        (tmp_path / f"a.{kind}").write_bytes(content)
        with contextlib.suppress(DamagedData):
            list(tables.rows(str(tmp_path / f"a.{kind}")))


def test_offsets_that_lead_out_of_the_table_are_damage(tmp_path):
    """Such a table makes pyarrow read foreign memory, and often ends in SIGSEGV, unless it is validated."""
    text = pa.array(["a" * 50, "b" * 50])
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("context", pa.string())])) as file:
        file.write_batch(pa.record_batch([text], ["context"]))
    content = (tmp_path / "a.arrow").read_bytes()
    offsets, broken = struct.pack("<3i", 0, 50, 100), struct.pack("<3i", 0, 50, 1 << 30)
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, broken))
    with pytest.raises(DamagedData, match=r"a.arrow is damaged: .*offset.*: fetch it again"):
        list(tables.rows(str(tmp_path / "a.arrow")))


@pytest.mark.parametrize(
    ("ends", "error", "message"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            DamagedData,
            "a is damaged: reading it ends in SIGSEGV: fetch it",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            EnvironmentFault,
            r"its reader was killed \(out of memory\?\)",
        ),
        ("print('{}}', flush=True)", DamagedData, "it gives rows that are no JSON"),
        ("print('gone', file=sys.stderr); sys.exit(3)", EnvironmentFault, "cannot read a: gone$"),
    ],
)
def test_however_the_reader_ends_it_is_one_line(monkeypatch, ends, error, message):
    popen = subprocess.Popen
    code = f"import os, signal, sys; print('{{}}', flush=True); {ends}"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **more: popen([sys.executable, "-c", code], **more)
    )
    found = tables.rows("a")
    assert next(found) == {}
    with pytest.raises(error, match=message):
        next(found)


def test_a_missing_or_foreign_file_is_one_line(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot read .*: No such file or directory"):
        list(tables.rows(str(tmp_path / "missing.parquet")))
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(DamagedData, match="a.parquet is damaged: "):
        list(tables.rows(str(tmp_path / "a.parquet")))


def test_the_reader_goes_when_nobody_wants_the_rest(tmp_path, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[0]
    )
    datasets.Dataset.from_list(rows(3000)).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    found = tables.rows(str(path))
    assert next(found) == rows(1)[0]
    found.close()
    assert started[0].returncode == -signal.SIGKILL
