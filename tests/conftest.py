"""What every test can use: a tiny base model with a byte tokenizer, and encoded rows. No network, no GPU."""

import json
import os
import signal
import sys
from collections import Counter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("WANDB_MODE", None)
os.environ.pop("WANDB_API_KEY", None)  # no test reaches for the user's

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dssk.errors import exit_code_of
from dssk.inference.auto import from_base
from dssk.models.modeling import CrossAttnForCausalLM
from exp_configs import BASE_CONFIG

pytest_plugins = ["tests.browser"]

os.umask(0o022)  # what the modes in the tests are written for
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore Ctrl-C
ELSEWHERE = "Slurm's tests: make test-slurm; every launcher: make test-launchers; thousands of faults: make test-faults"

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

SPECIAL_TOKENS = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
REPOSITORY = Path(__file__).resolve().parent.parent
# Real rows and tokenizers that are no part of the project; tests of them skip where they are not at hand.
SHARED_DATA = Path(os.environ.get("DSSK_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
NO_SHARED_DATA = f"no real data in {SHARED_DATA}: set DSSK_SHARED_DATA"


def byte_tokenizer(spelling: str = "<fim_{}>") -> PreTrainedTokenizerFast:
    """One token a byte, with StarCoder's special tokens and, like StarCoder's, without a padding token.

    `spelling` is that of the tokens for fill-in-the-middle; in another than StarCoder's they have other ids.
    """
    names = [token[len("<fim_") : -1] for token in SPECIAL_TOKENS[1:]]
    names = names if spelling == "<fim_{}>" else names[::-1]
    special_tokens = [SPECIAL_TOKENS[0], *map(spelling.format, names)]
    vocabulary = special_tokens + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )


def make_base(folder: Path, seed: int = 0, **config) -> Path:
    """Save a random 4-layer, 32-wide GPTBigCode model and the byte tokenizer to `folder`."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "n_positions": 256,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.2,  # at the usual 0.02 so small a model hardly tells inputs apart
    }
    GPTBigCodeForCausalLM(GPTBigCodeConfig(**settings | config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def fused(base: Path, **fields) -> CrossAttnForCausalLM:
    """The base with random blocks in its last layers; `fields` override the layout."""
    torch.manual_seed(1)
    settings = {"num_cross_attn_layers": 2, "cross_attn_layers_stride": 2, "cross_attn_init": "normal"}
    return from_base(base, **settings | fields).eval()


@pytest.fixture(scope="session")
def base_path(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base(base_path) -> GPTBigCodeForCausalLM:
    return GPTBigCodeForCausalLM.from_pretrained(base_path).eval()


@pytest.fixture
def tokens():
    """Random token ids of a shape, from a generator of its own: no special ones."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, shape, generator=generator)


def question_rows(count: int) -> list[dict]:
    """Short rows whose answer stands in their context: each context has two questions."""
    return [
        {
            "id": str(i),
            "context": f"Mill {i // 2} was built in {1700 + i // 2} by Ann {i // 2}.",
            "question": f"who built mill {i // 2}" if i % 2 else f"when was mill {i // 2} built",
            "answer": f"Ann {i // 2}" if i % 2 else str(1700 + i // 2),
        }
        for i in range(count)
    ]


def encode_rows(base: Path, folder: Path, rows: list[dict], *flags: str) -> Path:
    """Run the preprocessing command on rows; returns the store."""
    from dssk.commands import preproc

    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--dataset", str(source), "--embedding_model", str(base), "--data_cache_path", str(folder)]
    preproc.main([*argv, "--maximum_input_length", "128", "--val_fraction", "0.25", *flags])
    return folder / "processed_data" / base.name


@pytest.fixture(scope="session")
def store_path(base_path, tmp_path_factory) -> Path:
    """48 questions on 24 contexts, a quarter of them in `val`, encoded by the base."""
    return encode_rows(base_path, tmp_path_factory.mktemp("store"), question_rows(48))


def experiment(base: Path, **changes) -> dict:
    """A small experiment on `base`: four rows a step."""
    settings = {
        "model_path": str(base),
        "num_cross_attn_layers": 2,
        "cross_attn_shared_weights": False,
        "context_size": 128,
        "include_context_ids": False,
        "train_batch_size": 4,
        "test_batch_size": 8,
        "fp16": False,
        "gradient_checkpointing": False,
    }
    return {**BASE_CONFIG, **settings, **changes}


@pytest.fixture
def run_command(monkeypatch, capsys):
    """A module's command in this process: its standard output, or for another exit code its standard error."""

    def run_command(module, *argv: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        assert exit_code_of(module.main) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run_command


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, for either of two workers: at the end, one of them would keep a single core busy.

    Each worker begins with one half of the list (pytest-xdist's worksteal), and takes from the other's end later.
    """
    slow = [item for item in items if "slow" in item.keywords]
    others = [item for item in items if "slow" not in item.keywords]
    half = max(0, len(items) // 2 - len(slow[::2]))
    items[:] = [*slow[::2], *others[:half], *slow[1::2], *others[half:]]


def pytest_unconfigure(config: pytest.Config) -> None:
    """The very last line: what was not tested here, why, and how to have it tested."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput") or config.option.collectonly:
        return
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "no reason"
        for report in reporter.stats.get("skipped", [])
    )
    skipped = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common()) or "none"
    reporter.write_line(f"skipped: {skipped}. Not part of this: {ELSEWHERE}.")
