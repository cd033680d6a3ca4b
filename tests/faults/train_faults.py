"""Faults in training: `python -m tests.faults.train_faults term --count 100` (or disk).

Each run is forked from this process with everything imported, so a fault costs about a second. `term` sends SIGTERM at
any moment, `disk` trains on file systems of growing size (it needs `unshare -rm`), and `kill`, for `kill.py`, sends
SIGKILL while a checkpoint is written.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from dssk import checkpoint, errors
from dssk.commands.train import parse_args
from dssk.config import experiment_id
from dssk.training.run import train
from dssk.training.trainer import CrossAttnTrainer
from tests.conftest import encode_rows, experiment, make_base, question_rows

SAVING, STEP, STARTED = range(3)
FULL_BYTES = range(150, 2150, 100)  # kB; one checkpoint takes about 340


class World:
    """A base, a store, and runs of one tiny experiment in child processes that tell what they are doing."""

    def __init__(self, folder: Path):
        self.folder = folder
        with contextlib.redirect_stdout(sys.stderr):
            self.base = make_base(folder / "base")
            self.store = encode_rows(self.base, folder, question_rows(48))
        self.exp_dict = experiment(self.base)
        self.told = multiprocessing.RawArray("q", 3)

    def savedir(self, savedir_base: Path) -> Path:
        return savedir_base / experiment_id(self.exp_dict)

    def start(self, savedir_base: Path, steps: int, log_every: int = 1) -> int:
        """Train in a child; returns its process id."""
        self.told[:] = [0, 0, 0]
        pid = os.fork()
        if pid == 0:
            os._exit(self._child(savedir_base, steps, log_every))
        return pid

    def _child(self, savedir_base: Path, steps: int, log_every: int) -> int:
        self._tell_of("_write_checkpoint", SAVING)
        self._tell_steps()
        argv = [
            "-e",
            "group",
            "-sb",
            str(savedir_base),
            "--data_path",
            str(self.store),
            "--steps",
            str(steps),
        ]
        argv += ["--log_every", str(log_every), "--save_fused", "never", "--generation_eval_samples", "0"]
        output = open(self.folder / "output.txt", "a")  # noqa: SIM115 - lives as long as the process
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            return errors.exit_code_of(lambda: train(parse_args(argv), {"group": [self.exp_dict]}))
        except BaseException as error:
            print(repr(error), flush=True)
            return 1

    def _tell_of(self, method: str, what: int) -> None:
        original = getattr(CrossAttnTrainer, method)

        def telling(trainer, *args):
            self.told[what] = 1
            original(trainer, *args)
            self.told[what] = 0

        setattr(CrossAttnTrainer, method, telling)

    def _tell_steps(self) -> None:
        original = CrossAttnTrainer._maybe_log_save_evaluate

        def telling(trainer, *args, **kwargs):
            self.told[STEP] = trainer.state.global_step
            self.told[STARTED] = 1
            original(trainer, *args, **kwargs)

        CrossAttnTrainer._maybe_log_save_evaluate = telling


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def newest_step(savedir: Path) -> int:
    folder, _ = checkpoint.newest_checkpoint(savedir)
    return checkpoint.checkpoint_step(folder) if folder else 0


def equal_runs(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same weights, moments and random numbers."""
    first, second = checkpoint.latest_checkpoint(one), checkpoint.latest_checkpoint(other)
    assert first is not None
    assert second is not None
    tensors = all(
        {n: t.tolist() for n, t in load_file(first / f).items()}
        == {n: t.tolist() for n, t in load_file(second / f).items()}
        for f in ("model.safetensors", "optimizer.safetensors")
    )
    state = "training_state.json"
    return (
        first.name == second.name and tensors and (first / state).read_text() == (second / state).read_text()
    )


def kill(world: World, count: int, rng: random.Random) -> dict:
    """SIGKILL while saving, `count` times in one run; then it ends as one that was never killed."""
    steps, inside, lost = 4 * count + 4, 0, 0
    for number in range(count):
        pid = world.start(world.folder / "killed", steps)
        wait_until(lambda: world.told[STARTED])
        target = world.told[STEP] + rng.randrange(4)
        wait_until(lambda: world.told[STEP] >= target and world.told[SAVING])  # noqa: B023
        time.sleep(rng.random() * 0.04)
        inside += world.told[SAVING]
        os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code == -signal.SIGKILL, f"kill {number}: the run ended by itself with {code}"
        step = newest_step(world.savedir(world.folder / "killed"))
        lost = max(lost, world.told[STEP] - step)
        assert world.told[STEP] - step <= 1, f"kill {number}: step {world.told[STEP]}, resumable {step}"
    return {
        "kills": count,
        "inside a save": inside,
        "most steps lost": lost,
        **finish(world, "killed", steps),
    }


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.0005)


def finish(world: World, name: str, steps: int) -> dict:
    """End a run, train it again without faults, compare."""
    assert exit_code(world.start(world.folder / name, steps)) == 0
    assert exit_code(world.start(world.folder / "whole", steps)) == 0
    equal = equal_runs(world.savedir(world.folder / name), world.savedir(world.folder / "whole"))
    assert equal, "the run differs from one without faults"
    return {"steps": steps, "equal to a run without faults": equal}


def term(world: World, count: int, rng: random.Random) -> dict:
    """SIGTERM at random moments: exit 75, nothing lost, within seconds."""
    lost, longest, early = 0, 0.0, 0
    for number in range(count):
        pid = world.start(world.folder / "stopped", 10**6, log_every=7)
        time.sleep(rng.uniform(0.05, 3.0))
        os.kill(pid, signal.SIGTERM)
        start = time.monotonic()
        code = exit_code(pid)
        longest = max(longest, time.monotonic() - start)
        step = newest_step(world.savedir(world.folder / "stopped"))
        if code == -signal.SIGTERM:  # before there was anything to save
            assert not world.told[STARTED]
            early += 1
            continue
        assert code == 75, f"signal {number}: exit code {code}"
        lost = max(lost, world.told[STEP] - step)
        status = json.loads((world.savedir(world.folder / "stopped") / "status.json").read_text())
        assert (status["state"], status["code"]) == ("preempted", 75)
    assert lost == 0, f"{lost} finished steps lost"
    return {
        "signals": count,
        "before training": early,
        "steps lost": lost,
        "longest seconds": round(longest, 2),
    }


def disk(world: World, count: int, rng: random.Random) -> dict:
    """A disk that fills up: one line, exit 3, the last checkpoint loads, and with room the run goes on."""
    codes: dict[int, int] = {}
    mount = world.folder / "disk"
    mount.mkdir()
    for kilobytes in list(FULL_BYTES)[:count]:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", mount], check=True)
        (world.folder / "output.txt").write_text("")
        code = exit_code(world.start(mount, 6))
        output = (world.folder / "output.txt").read_text()
        codes[code] = codes.get(code, 0) + 1
        assert code in (0, 3), f"{kilobytes} kB: exit code {code}: {output}"
        if code == 3:
            said = [line for line in output.splitlines() if line.startswith("dssk: error")]
            assert len(said) == 1, output
            assert "disk full" in said[0], said
            assert "Traceback" not in output
        step = newest_step(world.savedir(mount))
        subprocess.run(["mount", "-o", "remount,size=20m", mount], check=True)
        assert newest_step(world.savedir(mount)) == step
        assert exit_code(world.start(mount, 6)) == 0
        if not (world.folder / "whole").exists():
            assert exit_code(world.start(world.folder / "whole", 6)) == 0
        assert equal_runs(world.savedir(mount), world.savedir(world.folder / "whole"))
        subprocess.run(["umount", mount], check=True)
    assert codes.get(3, 0) > 0
    return {"sizes": count, "exit codes": codes, "resumed to the same end": count}


FAULTS = {"term": term, "disk": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dssk-faults-"))
    try:
        start = time.monotonic()
        result = FAULTS[args.fault](World(folder), args.count, random.Random(args.seed))
        print(
            json.dumps(
                {"fault": args.fault, "seed": args.seed, **result, "seconds": round(time.monotonic() - start)}
            )
        )
    except BaseException:
        with contextlib.suppress(OSError):
            print((folder / "output.txt").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
