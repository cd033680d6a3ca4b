"""What every command of dssk imports, and what transformers imports only when it is used."""

import os
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from dssk.__main__ import VERBS
from dssk.inference.loading import load_base
from dssk.inference.tokenizer import load_tokenizer
from tests.conftest import make_base

torch.set_num_threads(1)
for _verb in VERBS:
    import_module(f"dssk.commands.{_verb}")
for _module in (
    "bm25s",
    "data.contexts",
    "data.preprocess",
    "demo.asking",
    "evaluation.evaluate",
    "hub.export",
    "hub.publish",
    "jobs.submit",
    "jobs.table",
    "report.write",
    "store.inspect",
    "store.library",
    "store.verify",
    "training.run",
    "research.toy",
):
    import_module(_module if _module == "bm25s" else f"dssk.{_module}")

with suppress(ImportError):
    import_module("dssk.jobs.haven")

with tempfile.TemporaryDirectory() as _folder:
    _base = make_base(Path(_folder))
    load_base(_base), load_tokenizer(_base)
