"""Runs of the tiny experiment, in this process and as commands, and what they leave."""

import json
import os
import socket
import subprocess
import sys
import traceback

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dssk import errors
from dssk.commands.train import parse_args
from dssk.config import experiment_id
from dssk.training.run import train
from tests.conftest import REPOSITORY, experiment


@pytest.fixture
def run(base_path, store_path, tmp_path):
    """Train in this process; returns the run's folder."""

    def run(*flags: str, data_path=store_path, **changes):
        exp_dict = experiment(base_path, **changes)
        argv = ["-e", "group", "-sb", str(tmp_path), "--data_path", str(data_path)]
        argv += ["--generation_eval_samples", "0", "--save_fused", "final", "--save_total_limit", "99"]
        train(parse_args([*argv, *flags]), {"group": [exp_dict]})
        return tmp_path / experiment_id(exp_dict)

    return run


@pytest.fixture
def launch(base_path, store_path, tmp_path):
    """Run trainval.py on the tiny experiment by a launcher."""
    overrides = {
        k: v for k, v in experiment(base_path, cross_attn_dropout_prob=0.0).items() if k != "model_path"
    }

    def launch(*flags: str, launcher=(sys.executable,), check: bool = True):
        sets = [f"--set={key}={json.dumps(value)}" for key, value in overrides.items()]
        argv = ["trainval.py", "-e", "crossattn_tiny", f"--set=model_path={base_path}", *sets]
        where = ["-sb", str(tmp_path), "--data_path", str(store_path)]
        return command(*argv, *where, *flags, launcher=launcher, check=check)

    return launch


def on_ranks(count: int, function) -> list[int]:
    """Call `function` on so many ranks, forked from this process with everything imported; their exit codes."""
    pids = []
    port = str(free_port())
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(function, rank, count, port))
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _rank(function, rank: int, count: int, port: str) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return errors.exit_code_of(function)
    except BaseException:
        traceback.print_exc()
        return 1


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(*words: str, check: bool = True, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=check
    )


def torchrun(ranks: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks))


def runs_in(folder) -> list:
    """The folders of runs below `--savedir_base`."""
    return sorted(f for f in folder.iterdir() if (f / "exp_dict.json").exists())


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in logged(folder) if "loss" in entry}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal_tensors(one, other, name: str = "model.safetensors") -> bool:
    first, second = load_file(one / name), load_file(other / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
