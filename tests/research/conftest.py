import json
import sys

import pytest

from dssk.commands import compare as command
from dssk.inference.tokenizer import load_tokenizer
from dssk.research import compare, cost
from tests.conftest import fused


@pytest.fixture(scope="session")
def checkpoint(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "fused"
    fused(base_path).save_pretrained(folder)
    load_tokenizer(base_path).save_pretrained(folder)
    return folder


@pytest.fixture
def run_compare(checkpoint, store_path, tmp_path, monkeypatch):
    """Run the command with these flags; returns the table. Costs are measured on two questions."""
    monkeypatch.setattr(compare, "TIMED_QUESTIONS", 2)
    monkeypatch.setattr("dssk.evaluation.by_number.TIMED_QUESTIONS", 2)
    monkeypatch.setattr(cost, "NEW_TOKENS", 3)
    monkeypatch.setattr("dssk.evaluation.scores.DRAWS", 50)

    def run(*flags):
        argv = ["--checkpoint", checkpoint, "--data_path", store_path, "--output", tmp_path / "out"]
        argv += ["--medium_cost", "false", "--max_new_tokens", 4, "--max_questions", 6]
        argv += ["--steps", 2, "--batch_size", 2, "--lora_rank", 2, *flags]
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, argv)])
        command.main()
        return json.loads((tmp_path / "out" / "table.json").read_text())

    return run
