"""Every launcher trains, is killed, resumes, exports and reloads: `python -m tests.faults.launchers`.

On the CPU, two ranks each, with this Python's own torchrun, deepspeed and accelerate. Compared are the losses with a
single process at the same global batch, the killed run with one that was not, and the frozen weights with the base.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dssk.checkpoint import MANIFEST, latest_checkpoint
from dssk.config import experiment_id
from dssk.models.weights import is_cross_attn
from tests.conftest import (
    REPOSITORY,
    VOCAB_SIZE,
    byte_tokenizer,
    encode_rows,
    experiment,
    make_base,
    question_rows,
)
from tests.families import tiny_base
from tests.faults.train_faults import equal_runs
from tests.training.conftest import free_port, losses

BIN = Path(sys.executable).parent
STEPS, LOG_EVERY = 8, 2
TOLERANCE = (
    1e-4  # of a loss: moments are rounded by random draws, and a sharded optimizer cuts them elsewhere
)
MAX_SECONDS = 600  # a start, the first of which compiles a part of DeepSpeed


class Launchers:
    def __init__(self, folder: Path, family: str):
        self.folder = folder
        if family == "gpt_bigcode":
            self.base = make_base(folder / "base")
        else:
            shape = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}
            self.base = tiny_base(family, folder / "base", **shape)
            byte_tokenizer().save_pretrained(self.base)
        self.store = encode_rows(self.base, folder, question_rows(48))
        zero3 = json.loads((REPOSITORY / "resources" / "ds_config_zero3.json").read_text())
        zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # cut even the smallest
        (folder / "zero3.json").write_text(json.dumps(zero3))

    def launcher(self, name: str) -> tuple[list[str], list[str]]:
        """How Python is started, and the flags that go with it."""
        port = str(free_port())
        deepspeed = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port]
        fsdp = ["launch", "--config_file", str(REPOSITORY / "resources" / "accelerate_fsdp2.yaml")]
        return {
            "python": ([sys.executable], []),
            "torchrun": ([str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port], []),
            "zero2": (deepspeed, ["--deepspeed", "resources/ds_config_zero.json"]),
            "zero3": (deepspeed, ["--deepspeed", str(self.folder / "zero3.json")]),
            "fsdp2": (
                [str(BIN / "accelerate"), *fsdp, "--num_processes", "2", "--main_process_port", port],
                [],
            ),
        }[name]

    def start(self, name: str, savedir_base: Path) -> subprocess.Popen:
        start, flags = self.launcher(name)
        sets = [
            f"--set={key}={value if key == 'model_path' else json.dumps(value)}"
            for key, value in self.exp(name).items()
        ]
        argv = [*start, "trainval.py", "-e", "crossattn_tiny", *sets, "-sb", str(savedir_base)]
        argv += ["--data_path", str(self.store), "--steps", str(STEPS), "--log_every", str(LOG_EVERY)]
        argv += ["--generation_eval_samples", "3", "--save_total_limit", "9", *flags]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            # A compiler that was killed once leaves a lock in the user's folder, for which every later start waits.
            "TORCH_EXTENSIONS_DIR": str(self.folder / "torch_extensions"),
        }
        log = (self.folder / f"{name}.log").open("a")
        return subprocess.Popen(
            argv, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def exp(self, name: str) -> dict:
        rows = 4 if name == "python" else 2
        return experiment(self.base, cross_attn_dropout_prob=0.0, train_batch_size=rows, test_batch_size=4)

    def finish(self, process: subprocess.Popen) -> None:
        try:
            code = process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert code == 0, f"exit code {code}"

    def run(self, name: str) -> dict:
        """Train, kill, resume, export, reload."""
        savedir = experiment_id(self.exp(name))
        whole, killed = self.folder / f"{name}-whole", self.folder / f"{name}-killed"
        start = time.monotonic()
        self.finish(self.start(name, whole))
        seconds = time.monotonic() - start
        process = self.start(name, killed)
        wanted = killed / savedir / f"checkpoint-{2 * LOG_EVERY}" / MANIFEST
        while not wanted.exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        resumable = latest_checkpoint(killed / savedir)
        self.finish(self.start(name, killed))
        return {
            "launcher": name,
            "seconds": round(seconds, 1),
            "resumed from": resumable.name if resumable else None,
            "resumed equals whole": equal_runs(killed / savedir, whole / savedir),
            "losses": [round(loss, 6) for loss in losses(whole / savedir).values()],
            "checkpoint bytes": sum(f.stat().st_size for f in latest_checkpoint(whole / savedir).iterdir()),
            **self.exported(whole / savedir),
        }

    def exported(self, savedir: Path) -> dict:
        last, output = latest_checkpoint(savedir), savedir / "exported"
        command = [sys.executable, "-m", "dssk.export", "--checkpoint", str(last), "--output", str(output)]
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
        fused, saved = load_file(output / "model.safetensors"), load_file(last / "model.safetensors")
        base = dict(AutoModelForCausalLM.from_pretrained(self.base).named_parameters())
        ids = torch.arange(6, 18).view(2, 6)
        logits = [
            AutoModelForCausalLM.from_pretrained(f)(ids, context_input_ids=ids).logits for f in (output, last)
        ]
        return {
            "frozen equals base": all(torch.equal(fused[name], p) for name, p in base.items()),
            "checkpoint holds blocks alone": all(map(is_cross_attn, saved)),
            "reloaded": torch.equal(*logits),
            "final equals export": all(
                torch.equal(t, fused[n])
                for n, t in load_file(savedir / "final" / "model.safetensors").items()
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["python", "torchrun", "zero2", "zero3", "fsdp2"]
    parser.add_argument(
        "launchers", nargs="*", default=names, help="python (always), torchrun, zero2, zero3, fsdp2"
    )
    parser.add_argument("--family", default="gpt_bigcode", help="family of the base (%(default)s)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dssk-launchers-"))
    try:
        all_of_them = Launchers(folder, args.family)
        reference = None
        for name in dict.fromkeys(["python", *args.launchers]):
            try:
                result = all_of_them.run(name)
            except (AssertionError, subprocess.TimeoutExpired):
                print((folder / f"{name}.log").read_text()[-4000:], file=sys.stderr)
                raise
            reference = reference or result["losses"]
            result["largest loss difference"] = max(
                abs(a - b) for a, b in zip(result["losses"], reference, strict=True)
            )
            print(json.dumps(result), flush=True)
            assert result["largest loss difference"] <= TOLERANCE
            assert all(value for value in result.values() if isinstance(value, bool))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
