"""A library at size: `python benchmarks/bench_library.py --texts FILE.jsonl.gz [--passages 100000]`.

The paragraphs of a file of questions (rows of context and question) are repeated with changed names until there are as
many as asked for, and encoded by a random base that is small, so that the library's own work is what takes time. Each
measurement is made in a process of its own: adding, opening, the first search, searching, reading, adding one more,
removing one, and the most memory that each process held. Rows go to benchmarks/results/library.json.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESULTS = Path(__file__).parent / "results" / "library.json"
BLOCK = 10_000  # passages of one `add`
QUESTIONS = 500  # searched
RANKS = (1, 5, 20)  # at which recall is said
_NAME = re.compile(r"(?<!\. )(?<!^)\b[A-Z][a-z]{2,}\b")  # capitalized words inside sentences


def paragraphs(path: str, copies: int) -> Iterator[tuple[str, str, str]]:
    """(id, text, question) of each distinct paragraph, `copies` times; from the second on with other names."""
    from dssk.data.readers import BadRow, read_rows
    from dssk.data.schemas import Dropped, to_qa

    found: dict[str, str] = {}
    for row in read_rows([path]):
        try:
            qa = to_qa(row)
        except (BadRow, Dropped):
            continue
        found.setdefault(qa.context, qa.question)
    for copy in range(copies):
        for number, (text, question) in enumerate(found.items()):
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


def step(name: str, library: Path, base: Path, texts: str, first: int, count: int) -> dict[str, Any]:
    """One measurement, in this process."""
    from dssk.store.library import ContextLibrary

    start = time.perf_counter()
    opened = ContextLibrary(library, model=base if name == "add" else None)
    took: dict[str, Any] = {"open_s": time.perf_counter() - start, "passages": len(opened)}
    if name == "add":
        block = list(islice(paragraphs(texts, 1_000), first, first + count))
        start = time.perf_counter()
        opened.add([text for _, text, _ in block], ids=[id for id, _, _ in block])
        took = {"seconds": time.perf_counter() - start, "passages": len(opened)}
    elif name == "search":
        asked = list(islice(paragraphs(texts, 1_000), QUESTIONS))
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
        start = time.perf_counter()
        if name == "remove":
            opened.remove("0-0")
        else:
            opened.add(["One more paragraph about a mill."], ids=["more"])
        took["seconds"] = time.perf_counter() - start
    took["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step": name, **took}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True, help="rows of context and question")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--step", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, library, base, first, count = args.step
        print(json.dumps(step(name, Path(library), Path(base), args.texts, int(first), int(count))))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(
            Path(folder) / "base", [text for _, text, _ in islice(paragraphs(args.texts, 1), 2_000)]
        )
        library = Path(folder) / "library"

        def run(name: str, first: int = 0, count: int = 0) -> None:
            words = [sys.executable, __file__, "--texts", args.texts, "--step"]
            words += [name, str(library), str(base), str(first), str(count)]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)

        rows: list[dict[str, Any]] = []
        for first in range(0, args.passages, BLOCK):
            run("add", first, min(BLOCK, args.passages - first))
        for name in ("search", "add_one", "search", "remove"):
            run(name)
        size = sum(path.stat().st_size for path in library.rglob("*") if path.is_file())
        index = sum(path.stat().st_size for path in library.glob("search-*/*"))
        rows.append({"step": "disk", "bytes": size, "index_bytes": index})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        shutil.rmtree(library)


if __name__ == "__main__":
    main()
