"""Weights & Biases: one run for all ranks and restarts, online or, when the server does not answer, offline.

Training never waits for it: the server is asked first, for a few seconds, and everything it gets is in
`metrics.jsonl` as well.
"""

import importlib.util
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dssk.errors import DsskError
from dssk.run_folder import WANDB, read_wandb
from dssk.training.answers import AnswerScorer
from dssk.training.flags import RunArgs
from dssk.utils.files import write_json
from dssk.utils.wandb_key import find_key

ANSWER_SECONDS = 4
MAX_TABLE_ROWS = 32


def check_wandb(run: RunArgs) -> None:
    """Refuse what Weights & Biases cannot do before anything is loaded."""
    if not run.wandb_log_gradients:
        return
    if not run.wandb_project_name:
        raise DsskError("--wandb_log_gradients needs --wandb_entity_name and --wandb_project_name")
    if run.deepspeed or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        engine = "DeepSpeed" if run.deepspeed else "FSDP"
        raise DsskError(
            f"--wandb_log_gradients does not work under {engine}: it frees and cuts gradients before they can be "
            "looked at; drop the flag, or use torchrun"
        )


class WandbReport(TrainerCallback):
    """Metrics, a table of sample answers and, if asked for, gradients; on the first rank only."""

    def __init__(self, run: RunArgs, exp_dict: dict[str, Any], savedir: Path, scorer: AnswerScorer | None):
        self.flags = run
        self.exp_dict = exp_dict
        self.savedir = savedir
        self.scorer = scorer
        self.run: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if importlib.util.find_spec("wandb") is None:
            warn("wandb is not installed: metrics go to metrics.jsonl only (pip install wandb)")
            return
        where = {
            "entity": self.flags.wandb_entity_name,
            "project": self.flags.wandb_project_name,
            "name": self.flags.wandb_run_name,
        }
        self.run = start_run(self.savedir, where, self.exp_dict)
        if self.flags.wandb_log_gradients:
            self.run.watch(model.trained_modules, log="gradients", log_freq=args.logging_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.run is not None and logs:
            values = {
                f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v
                for k, v in logs.items()
                if isinstance(v, int | float)
            }
            self.run.log(values, step=state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.run is not None and self.scorer is not None and self.scorer.samples:
            import wandb

            rows = self.scorer.samples[:MAX_TABLE_ROWS]
            data = [[" | ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
            self.run.log({"answers": wandb.Table(columns=list(rows[0]), data=data)}, step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.run is not None:
            self.run.finish()


def start_run(savedir: Path, where: dict[str, str | None], config: dict[str, Any] | None = None) -> Any:
    """Start or continue the wandb run of a run's folder; `where` has its entity, project and name."""
    import wandb
    from wandb.errors import UsageError

    earlier = read_wandb(savedir).get("id")
    run_id = earlier or secrets.token_hex(4)
    # All starts share the id, and the report needs to find it.
    write_json(savedir / WANDB, {"id": run_id, **where})
    mode = wandb_mode()
    if mode == "offline" and earlier:
        warn("an offline wandb run cannot be continued: a new piece of it is kept, `wandb sync` joins them")
    settings = wandb.Settings(
        init_timeout=2 * ANSWER_SECONDS,
        finish_timeout=30,
        silent=True,
        console="off",
        save_code=False,
        x_disable_meta=True,  # it holds the command line and the environment
        x_disable_stats=True,
    )
    try:
        return wandb.init(
            entity=where["entity"],
            project=where["project"],
            name=where["name"],
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=savedir,
            config=config,
            mode=mode,
            settings=settings,
        )
    except UsageError as error:  # such as a name that is too long
        raise DsskError(f"W&B refuses what {savedir / WANDB} says: {error}") from None


def log_report(savedir: Path, page: Path, images: Sequence[Path]) -> None:
    """Add a report and its figures to the wandb run of a run's folder; does nothing if training logged to none."""
    stored = read_wandb(savedir)
    if not stored:
        return
    if importlib.util.find_spec("wandb") is None:
        warn("wandb is not installed: the report is not logged there (pip install wandb)")
        return
    import wandb

    where = {key: stored.get(key) for key in ("entity", "project", "name")}
    if where["project"] is None:
        warn(f"the report is not logged to W&B: {savedir / WANDB} does not say to which project")
        return
    run = start_run(savedir, where)
    pictures = {f"report/{image.stem}": wandb.Image(str(image)) for image in images}
    run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False), **pictures})
    run.finish()


def wandb_mode() -> Any:
    """`WANDB_MODE` if it is set; else online if there is a key and the server answers, else offline."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if find_key() is None:
        warn("no W&B key: logging offline; `wandb sync` uploads it later")
        return "offline"
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not answers(address):
        warn(f"{address} does not answer: logging to W&B offline; `wandb sync` uploads it later")
        return "offline"
    return "online"


def answers(address: str) -> bool:
    """Whether a server answers within seconds; what it answers does not matter."""
    try:
        urllib.request.urlopen(f"{address}/healthz", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def warn(text: str) -> None:
    print(f"dssk: {text}", file=sys.stderr)
