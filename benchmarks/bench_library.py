"""A library at size: `python benchmarks/bench_library.py --texts FILE.jsonl.gz [--passages 100000] [--folder DIR]`.

The paragraphs of a file of questions (rows of context and question) are repeated with changed names until there are as
many as asked for, and encoded by a random base that is small, so that the library's own work is what takes time. Each
measurement is made in a process of its own: adding, opening, the first search, searching, reading, adding one more, an
add that is killed half-way, removing one, and the most memory that each process held; beside seconds there are those of
the CPU, which other load changes less. Rows go to benchmarks/results/library.json.

With `--folder` the same command goes on where it was stopped, and `--at_most` ends a call after so many measurements.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESULTS = Path(__file__).parent / "results" / "library.json"
BLOCK = 10_000  # passages of one `add`
QUESTIONS = 500  # searched
RANKS = (1, 5, 20)  # at which recall is said
_NAME = re.compile(r"(?<!\. )(?<!^)\b[A-Z][a-z]{2,}\b")  # capitalized words inside sentences


def paragraphs(path: str, first: int = 0) -> Iterator[tuple[str, str, str]]:
    """(id, text, question) of each distinct paragraph, again and again, from number `first` on.

    From the second time on with other names.
    """
    from dssk.data.readers import BadRow, read_rows
    from dssk.data.schemas import Dropped, to_qa

    found: dict[str, str] = {}
    for row in read_rows([path]):
        try:
            qa = to_qa(row)
        except (BadRow, Dropped):
            continue
        found.setdefault(qa.context, qa.question)
    distinct = list(found.items())
    for place in count(first):
        copy, number = divmod(place, len(distinct))
        text, question = distinct[number]
        rename = (lambda match, copy=copy: f"{match[0]}{copy}") if copy else (lambda match: match[0])
        yield f"{copy}-{number}", _NAME.sub(rename, text), _NAME.sub(rename, question)


def make_base(folder: Path, texts: list[str]) -> Path:
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    from dssk.research.make_base import make_tokenizer

    tokenizer = make_tokenizer(texts, 4096)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPTBigCodeConfig(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=end,
        eos_token_id=end,
    )
    GPTBigCodeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def step(name: str, library: Path, base: Path, texts: str, first: int, number: int) -> dict[str, Any]:
    """One measurement, in this process."""
    from dssk.store.library import ContextLibrary

    start, used = time.perf_counter(), time.process_time()
    opened = ContextLibrary(library, model=base if name == "add" else None)
    took: dict[str, Any] = {"open_s": time.perf_counter() - start, "passages": len(opened)}
    took["open_cpu_s"] = time.process_time() - used
    if name == "add":
        block = list(islice(paragraphs(texts, first), number))
        start, used = time.perf_counter(), time.process_time()
        opened.add([text for _, text, _ in block], ids=[id for id, _, _ in block])
        took |= {"seconds": time.perf_counter() - start, "passages": len(opened)}
        took["cpu_s"] = time.process_time() - used
    elif name == "search":
        asked = list(islice(paragraphs(texts), QUESTIONS))
        start = time.perf_counter()
        opened.search(asked[0][2])
        took["first_search_s"] = time.perf_counter() - start
        seconds, ranks = [], []
        for id, _, question in asked:
            start = time.perf_counter()
            hits = [hit.id for hit in opened.search(question, max(RANKS))]
            seconds.append(time.perf_counter() - start)
            ranks.append(hits.index(id) if id in hits else max(RANKS))
        took["search_s"] = median(seconds)
        took |= {f"recall_at_{k}": sum(rank < k for rank in ranks) / len(ranks) for k in RANKS}
        start = time.perf_counter()
        took["tokens"] = len(opened.get(asked[0][0]).encoder_hidden_states)
        took["get_s"] = time.perf_counter() - start
    else:
        start, used = time.perf_counter(), time.process_time()
        if name == "remove":
            opened.remove("0-0")
        else:
            opened.add(["One more paragraph about a mill."], ids=["more"])
        took |= {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - used}
    took["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step": name, **took}


def indices(library: Path) -> dict[str, int]:
    """The folders of the index, and the bytes of each."""
    return {
        folder.name: sum(path.stat().st_size for path in folder.iterdir())
        for folder in library.glob("search-*")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True, help="rows of context and question")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="keep base, library and rows here until all is measured")
    parser.add_argument("--at_most", type=int, help="measurements of this call (all)")
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, library, base, first, number = args.step
        print(json.dumps(step(name, Path(library), Path(base), args.texts, int(first), int(number))))
        return
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        measure(args, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Make the measurements that `folder` has no rows of yet."""
    kept = folder / "rows.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
    base, library = folder / "base", folder / "library"
    if not base.exists():
        make_base(base, [text for _, text, _ in islice(paragraphs(args.texts), 2_000)])

    def command(name: str, first: int, number: int) -> list[str]:
        words = [sys.executable, __file__, "--texts", args.texts, "--step"]
        return [*words, name, str(library), str(base), str(first), str(number)]

    def run(name: str, first: int, number: int) -> dict[str, Any]:
        before = indices(library)
        done = subprocess.run(
            command(name, first, number), capture_output=True, text=True, check=True, env=os.environ
        )
        after = indices(library)
        written = {"index_written_bytes": sum(size for name, size in after.items() if name not in before)}
        return json.loads(done.stdout.splitlines()[-1]) | (written if "add" in name else {})

    def killed(first: int, number: int) -> dict[str, Any]:
        """An add that dies in the middle of writing its segment."""
        process = subprocess.Popen(command("add", first, number), env=os.environ)
        while not list(library.glob("contexts/.tmp-*")) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        return {"step": "killed_add", "killed": process.wait() == -signal.SIGKILL}

    steps = [("add", first, min(BLOCK, args.passages - first)) for first in range(0, args.passages, BLOCK)]
    steps += [("search", 0, 0), ("add_one", 0, 0), ("search", 0, 0), ("killed_add", args.passages, BLOCK)]
    steps += [("search", 0, 0), ("remove", 0, 0)]
    todo = steps[len(rows) :]
    for name, first, number in todo[: args.at_most]:
        row = killed(first, number) if name == "killed_add" else run(name, first, number)
        rows.append(row)
        print(json.dumps(row), flush=True)
        kept.write_text(json.dumps(rows))
    if len(rows) < len(steps):
        return
    size = sum(path.stat().st_size for path in library.rglob("*") if path.is_file())
    rows.append({"step": "disk", "bytes": size, "index_bytes": sum(indices(library).values())})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
