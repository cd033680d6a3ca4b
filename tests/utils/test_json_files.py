import pytest

from dssk.errors import DamagedData
from dssk.utils.json_files import parse_json, read_json, read_objects


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
        (b"9" * 5_000, "too many digits"),
        (b'{"a": 1,}', "no JSON at line 1, column"),
        (b"", "no JSON at line 1"),
        (b"null", "it holds NoneType, want dict"),
        (b"[]", "it holds list, want dict"),
    ],
)
def test_whatever_a_file_holds_it_is_read_or_named_in_one_line(tmp_path, content, message):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(DamagedData, match=message) as caught:
        read_json(file, dict)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_lines_that_hold_no_object_are_none(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"a": 1}\n[1]\n\n\xff\n{"a"\n' + b"[" * 100_000 + b'\n{"a": 2}\n{"b')
    assert list(read_objects(file)) == [{"a": 1}, None, None, None, None, {"a": 2}, None]


def test_json_is_parsed():
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
