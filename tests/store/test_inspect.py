"""What `dssk inspect` says of a store."""

from PIL import Image

from dssk.commands import inspect
from dssk.errors import exit_code_of
from dssk.store.library import ContextLibrary


def test_it_says_what_is_in_a_store_and_draws_the_lengths(finished, base_path, tmp_path, capsys):
    picture = tmp_path / "new" / "lengths.png"
    assert exit_code_of(lambda: inspect.main([str(finished), "--plot", str(picture)])) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["model"] == f"{base_path}, computed in float32"
    assert said["rows"] == "train: 64, val: 16"
    assert said["contexts"].startswith("40, of ")
    assert said["read"] == "80 rows; dropped: none; malformed: 0"
    assert said["encodings"].endswith("in 5 segments, bf16 x 32")
    assert "longest" in said["lengths"]
    with Image.open(picture) as image:
        assert image.size == (1050, 525)


def test_a_store_of_texts_says_so(tmp_path, source, preprocess, capsys):
    path = preprocess(tmp_path, source, text_only=True)
    capsys.readouterr()
    assert exit_code_of(lambda: inspect.main([str(path)])) == 0
    assert "none: texts only" in capsys.readouterr().out


def test_a_library_is_counted(base_path, tmp_path, capsys):
    ContextLibrary(tmp_path / "library", base_path).add(["a mill", "a bridge"])
    assert exit_code_of(lambda: inspect.main([str(tmp_path / "library")])) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["contexts"] == "2"
    assert said["encodings"].endswith("in 1 segments, bf16 x 32")
    flags = [str(tmp_path / "library"), "--plot", str(tmp_path / "lengths.png")]
    assert exit_code_of(lambda: inspect.main(flags)) == 2
    assert "has no questions" in capsys.readouterr().err
