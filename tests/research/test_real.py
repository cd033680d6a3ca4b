import gzip
import itertools
import json
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from dssk import __main__ as dssk_command
from dssk.data.schemas import QA
from dssk.data.sources import Source
from dssk.errors import DsskError
from dssk.research import compare, cost, real
from dssk.research.smollm2 import WEIGHTS_NOTE
from tests.conftest import REPOSITORY, VOCAB_SIZE, byte_tokenizer
from tests.families import tiny_base

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def paragraph(number: int, words: int = 24, answer: str = "Ann") -> str:
    """Words that no other paragraph has, and an answer among them."""
    own = [f"{LETTERS[number // 26]}{LETTERS[number % 26]}{LETTERS[i]}" for i in range(words)]
    return f"{' '.join(own)} {answer} ends it"


def row(number: int, question: str = "", context: str = "", answer: str = "Ann") -> dict:
    return {
        "id": f"{number}",
        "context": context or paragraph(number, answer=answer),
        "question": question or f"who is in {number}",
        "answer": answer,
    }


@pytest.fixture
def small(monkeypatch):
    """Sets of a few rows, not of thousands."""
    monkeypatch.setattr(real, "HELD_OUT", 3)
    monkeypatch.setattr(real, "WATCHED_CONTEXTS", 2)


@pytest.fixture
def folder(tmp_path):
    """The three sources as the files that they are looked for by."""
    squad = [row(100 * q + c, f"number {q} of {c}", paragraph(c)) for c in range(10) for q in range(4)]
    squad += [row(10), row(11)]
    swap = [row(20 + n, f"who is swapped {n // 2}", paragraph(20 + n // 2, answer=a), a)
            for n, a in enumerate(["Ann", "Bob", "Cleo", "Dora", "Emil", "Finn", "Gus", "Hana"])]  # fmt: skip
    xquad = [row(200 + n, f"what of {n}", paragraph(40 + n // 2)) for n in range(4)]
    for name, rows in {"qa/squad_v1_a": squad, "nq/nq_swap_b": swap, "qa/xquad_en_c": xquad}.items():
        path = tmp_path / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return tmp_path / "data"


def sets_of(folder) -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in real.SETS}


def test_every_scored_row_is_kept_from_what_is_trained_on(small, folder, tmp_path, capsys):
    real.write_real_sets(folder, tmp_path / "sets")
    assert "4 xquad" in capsys.readouterr().out
    sets = sets_of(tmp_path / "sets")
    assert len(sets["xquad"]) == 4
    assert len(sets["val"]) == 2 * 4
    assert len(sets["nq_swap"]) == 4  # two families of two rows each
    assert len(sets["train"]) == 8 * 4 + 2 + 4
    seen = {(r["question"], r["context"]) for r in sets["train"]}
    for name in real.SETS[1:]:
        assert not {context for _, context in seen} & {r["context"] for r in sets[name]}
    swapped = {
        name: {r["question"] for r in sets[name] if "swapped" in r["question"]}
        for name in ("train", "nq_swap")
    }
    assert len(swapped["train"]) == len(swapped["nq_swap"]) == 2
    assert not swapped["train"] & swapped["nq_swap"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    real.write_real_sets(folder, tmp_path / "sets")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()} == before


def qa(**changes) -> QA:
    fields = row(0) | changes
    return QA(fields["id"], "", fields["context"], fields["question"], [fields["answer"]])


def test_families_share_a_question_or_a_run_of_words():
    rows = [
        qa(context=paragraph(1), question="who A?"),
        qa(context=paragraph(2), question="<b>Who</b> a"),  # the same question
        qa(context=f"other words {paragraph(2, answer='Bob')}", question="c"),  # most of the same paragraph
        qa(context=paragraph(3), question="d"),
        qa(context=" ".join(paragraph(3).split()[:11]), question="e"),  # eleven words in common are a phrase
    ]
    first, second, third, fourth, fifth = real.families(rows)
    assert first == second == third
    assert len({third, fourth, fifth}) == 3


def test_paragraphs_that_are_trained_on_are_no_longer_than_is_said():
    shared = [
        [qa(context=f"{n} " + "word " * n, question=f"q {k}") for k in range(4)] for n in range(20, 100)
    ]
    single = [qa(context=f"single {n} " + "word " * n, question=f"single {n}") for n in range(20, 100)]
    sets = real.divide([*itertools.chain(*shared), *single], [], [], longest=300)
    lengths = {len(row.context) for row in sets["train"] if row.question.startswith("q ")}
    assert 290 < max(lengths) <= 300
    assert 190 < max(len(row.context) for row in sets["train"] if row.question.startswith("single")) <= 200


def test_single_questions_are_counted_off_or_taken_whole(monkeypatch):
    monkeypatch.setattr(real, "SINGLES", {"squad": 3, "nq_swap": 2})
    squad = [qa(context=paragraph(400 + n), question=f"squad {n}") for n in range(20)]
    nq_swap = [qa(context=paragraph(n), question=f"page {n}") for n in range(310)]
    few, every = (real.divide(squad, nq_swap, [], 1000, all_questions) for all_questions in (False, True))
    for sets, counts in ((few, (3, 2)), (every, (20, 10))):
        asked = [row.question.split()[0] for row in sets["train"]]
        assert (asked.count("squad"), asked.count("page")) == counts
        assert len(sets["nq_swap"]) == 300


@pytest.mark.parametrize("told", [{"question": "WHO, is it"}, {"context": paragraph(5) + " and more"}])
def test_what_tells_of_a_scored_row_is_left_out_and_never_passes(told):
    scored = qa(context=paragraph(5), question="who is it?")
    leak = qa(**{"context": paragraph(6), "question": "no"} | told)
    sound = [qa(context=paragraph(7), question=f"q {n}") for n in range(4)]
    sets = real.divide([*sound, *[leak] * 4], [], [scored], longest=1000)
    assert leak not in sets["train"] + sets["val"]
    with pytest.raises(DsskError, match="is trained on and its paragraph scored"):
        real.check({"train": [leak], "val": [], "xquad": [scored], "nq_swap": []})


def test_a_source_that_is_missing_is_named(folder):
    shutil.rmtree(folder / "nq")
    with pytest.raises(DsskError, match=r"no nq_swap_\*.jsonl.gz below"):
        real.in_folder(folder)


def test_the_sets_of_the_hub_are_named_as_sources():
    assert set(real.HUB) == set(real.FILES)
    assert all(isinstance(source, Source) and source.dataset.count("/") == 1 for source in real.HUB.values())


@pytest.mark.slow
@pytest.mark.parametrize("variables", ["", "GROUP=merged_replay_two_smollm2-135m LONGEST=2400 ALL=1"])
def test_make_real_goes_the_whole_road_and_on_from_where_it_was(
    variables, small, folder, tmp_path, monkeypatch, capsys
):
    """Every command of the Makefile, on a base of the real depth and a toy's width."""
    here = tmp_path / "real"
    tiny_base("llama", here / "base", vocab_size=VOCAB_SIZE, num_hidden_layers=30, hidden_size=16,
              intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
              max_position_embeddings=4096)  # fmt: skip
    byte_tokenizer().save_pretrained(here / "base")
    config = json.loads((here / "base" / "config.json").read_text())
    (here / "base" / "config.json").write_text(json.dumps(config | {"weights_note": WEIGHTS_NOTE}))
    monkeypatch.setattr(compare, "TIMED_QUESTIONS", 1)
    monkeypatch.setattr(cost, "NEW_TOKENS", 2)
    ticks = itertools.count()  # a second whenever somebody looks
    monkeypatch.setattr("dssk.training.budget.time", SimpleNamespace(process_time=lambda: float(next(ticks))))
    monkeypatch.chdir(REPOSITORY)

    def make(minutes: float, *verbs: str) -> str:
        wanted = [f"DATA={folder}", f"REAL={here}", f"MINUTES={minutes}", "BIN=.", *variables.split()]
        shown = subprocess.run(
            ["make", "-n", "-o", "install", "real", *wanted], capture_output=True, text=True
        )
        lines = shown.stdout.replace("\\\n", " ").splitlines()
        commands = [shlex.split(line)[1:] for line in lines if line.startswith("./dssk ")]
        assert [words[0] for words in commands] == [
            *("base", "real", "preproc", "preproc", "preproc", "train", "compare", "report")
        ]
        for words in commands:
            if verbs and words[0] not in verbs:
                continue
            assert dssk_command.main(words) == 0, words
        return capsys.readouterr().out

    said = make(0.2)
    assert "already holds this base" in said
    assert "CPU minutes" in said
    rows = json.loads((here / "compare" / "table.json").read_text())
    scored = {(r["data"], r["system"]): r["n"] for r in rows}
    assert scored["xquad", "merged"] == 4
    assert scored["nq_swap", "merged/wrong_context"] == 4
    assert scored["xquad", "prompted_examples"] == 4
    assert (here / "report.html").is_file()
    again = make(0.2, "base", "real", "preproc", "train")
    assert "finished: step" in again
    assert again.count("used again") == 3
    assert "resuming from step" in make(0.4, "train")
