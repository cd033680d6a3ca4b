"""One of everything that commands read, as small as can be, made once by the commands themselves.

Everything lies in one folder and is named relative to it, so that a copy of the folder is a world of its own.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tests.faults.mutations import reseal_checkpoint, reseal_store
from tests.faults.processes import Done, run

ROWS = 20
EXPERIMENT = "experiment"  # the group in exps.py
SAVEDIR_BASE = "runs"
STORE = "data/processed_data/base"
TRAIN = [
    *("train", "-e", EXPERIMENT, "--exp_configs", "exps.py", "-sb", SAVEDIR_BASE, "--data_path", STORE),
    *("--steps", "2", "--log_every", "1", "--generation_eval_samples", "0", "--save_total_limit", "9"),
]
PREPROC = [
    *("preproc", "--embedding_model", "base", "--dataset", "rows.jsonl", "--data_cache_path", "data"),
    *("--maximum_input_length", "96", "--val_fraction", "0.3", "--shard_rows", "4"),
]
SHORT = ["--max_new_tokens", "3", "--batch_size", "8"]
ADD = ["library", "library", "add", "--checkpoint", "base", "one.txt", "more.jsonl"]
QUESTION = ["--question", "who built mill 3", "--max_new_tokens", "4"]
UNFINISHED_STORE = "unfinished/processed_data/base"
PREPROC_AGAIN = [*PREPROC, "--data_cache_path", "unfinished"]
EVALUATE_ROWS = [
    *("evaluate", "--checkpoint", "fused", "--dataset", "rows.jsonl", "--output", "s/scores.json", *SHORT),
    *("--controls", "with_context,no_context"),
]
LIBRARY_ANSWER = ["answer", "--checkpoint", "fused", "--library", "library", *QUESTION]


class World(NamedTuple):
    """Where it lies, and the id of its one run."""

    folder: Path
    run: str

    def copy(self, to: Path, names: Iterable[str]) -> Path:
        """A copy of some of it, in which what names the base by its path names that of the copy."""
        to.mkdir(parents=True)
        for name in names:
            if (self.folder / name).is_dir():
                shutil.copytree(self.folder / name, to / name)
            else:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.folder / name, to / name)
        old, new = str(self.folder).encode(), str(to).encode()
        for file in (*to.rglob("config.json"), *to.rglob("manifest.json")):
            if old in (content := file.read_bytes()):
                file.write_bytes(content.replace(old, new))
                (reseal_store if file.name == "manifest.json" else reseal_checkpoint)(file.parent)
        return to


def build(folder: Path) -> World:
    """Make a world; takes seconds."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # of checksums; children inherit it
    here = folder / "world"
    here.mkdir(parents=True)
    (here / "exps.py").write_text("")
    expect(run(write_inputs, here, here))
    evaluate = ["evaluate", "--checkpoint", SAVEDIR_BASE, "--data_path", STORE, *SHORT]
    for argv in (
        PREPROC,
        TRAIN,
        evaluate,
        ADD,
        ["export", "--checkpoint", SAVEDIR_BASE, "--output", "fused"],
    ):
        expect(run(argv, here))
    expect(run(die, here, PREPROC_AGAIN, "os", "replace", 13), -signal.SIGKILL)
    expect(run(die, here, EVALUATE_ROWS, "dssk.evaluation.predictions", "_prediction", 10), -signal.SIGKILL)
    (run_folder,) = (here / SAVEDIR_BASE).glob("*/exp_dict.json")
    return World(here, run_folder.parent.name)


def die(argv: list[str], module: str, function: str, call: int) -> None:
    """Run a command that is killed when it calls a function for the `call`th time."""
    from dssk.__main__ import main

    owner, calls = import_module(module), itertools.count(1)
    original = getattr(owner, function)

    def fatal(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, function, fatal)
    sys.exit(main(argv))


def expect(done: Done, code: int = 0) -> Done:
    assert done.code == code, f"{done.code} after {done.seconds:.1f} s: {done.argv}\n{done.out}\n{done.err}"
    return done


def write_inputs(here: Path) -> None:
    """The base, the rows and what else people write themselves."""
    from tests.conftest import experiment, make_base, question_rows
    from tests.report.conftest import score

    make_base(here / "base", n_embd=16, n_layer=2, n_head=2)
    rows = question_rows(ROWS)
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exp_dict = experiment(
        Path("base"),
        cross_attn_layers_stride=1,
        num_cross_attn_layers=1,
        cross_attn_final_layer=True,
        context_size=96,
    )
    (here / "exps.py").write_text(f"EXP_GROUPS = {{{EXPERIMENT!r}: [{exp_dict!r}]}}\n")
    (here / "jobs.py").write_text(
        "EAI_ACCOUNT_ID_TO_USER = {}\nJOB_CONFIG = {'default': {'partition': 'p', 'gpus': 1, 'time': '1:00:00'}}\n"
    )
    (here / "one.txt").write_text("Mill 3 was built in 1703 by Ann 3.")
    (here / "two.txt").write_text("The dam was built in 1800 by Eve.")
    more = [{"id": f"m{i}", "title": f"Mill {i}", "context": rows[2 * i]["context"]} for i in range(4, 7)]
    (here / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    (here / "questions.jsonl").write_text(
        "".join(json.dumps({"question": r["question"]}) + "\n" for r in rows[:4])
    )
    cost = {"trained_parameters": 10, "tokens_per_s": 50, "bytes_per_context_token": 16, "first_token_s": 0.1}
    systems = ("cross_attention", "prompted")
    table = [{"system": system, "data": "one", **score(0.8), **cost} for system in systems]
    (here / "compare").mkdir()
    (here / "compare" / "table.json").write_text(json.dumps(table))
    (here / "compare" / "cost.json").write_text(json.dumps([table[0] | {"em": None, "f1": None}]))
