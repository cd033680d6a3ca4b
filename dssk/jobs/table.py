"""The experiments of a folder, side by side.

A table, written as results.csv and results.md, and the curves of loss and F1 as results.png.
"""

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

from dssk.config import experiment_id
from dssk.errors import DsskError
from dssk.jobs import slurm
from dssk.jobs.states import COMPLETED, GONE, state_of
from dssk.run_folder import newest_scores, read_experiment, read_job, read_metrics, read_status, run_folders
from dssk.utils.files import atomic_file, write_text

RESULTS = "results"
CURVES = {"training loss": ("loss",), "validation loss": ("eval_loss",), "F1": ("eval_f1", "f1")}
MAX_PLOTTED = 20  # more lines than this nobody tells apart


def write_table(savedir_base: Path) -> str:
    """Write results.csv, results.md and results.png into `savedir_base`; returns the Markdown."""
    experiments = find_experiments(savedir_base)
    rows = [row_of(savedir, exp_dict, experiments) for savedir, exp_dict in experiments.items()]
    write_text(savedir_base / f"{RESULTS}.csv", as_csv(rows))
    write_text(savedir_base / f"{RESULTS}.md", as_markdown(rows))
    plot(list(experiments), savedir_base / f"{RESULTS}.png")
    return as_markdown(rows)


def find_experiments(savedir_base: Path) -> dict[Path, dict[str, Any]]:
    """Each experiment's folder and the experiment; a folder whose name is not its experiment's id is none."""
    found = {}
    for savedir in run_folders(savedir_base):
        with contextlib.suppress(DsskError):
            exp_dict = read_experiment(savedir)
            if experiment_id(exp_dict) == savedir.name:
                found[savedir] = exp_dict
    if not found:
        raise DsskError(f"no experiment in {savedir_base}: want the --savedir_base of trainval.py")
    return found


def row_of(
    savedir: Path, exp_dict: dict[str, Any], experiments: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """The row of an experiment: the keys in which experiments differ, its state and its scores."""
    scores = newest_scores(savedir).get("with_context")
    scores = scores if isinstance(scores, dict) else {}
    return {
        "exp_id": savedir.name[:8],
        **{key: exp_dict.get(key) for key in differing_keys(list(experiments.values()))},
        "state": state(savedir),
        "step": last(savedir, "step"),
        "loss": last(savedir, "loss"),
        "eval_loss": last(savedir, "eval_loss"),
        "EM": scores.get("em", last(savedir, "eval_em")),
        "F1": scores.get("f1", last(savedir, "eval_f1")),
    }


def differing_keys(experiments: list[dict[str, Any]]) -> list[str]:
    """The keys that do not have one value in all experiments."""
    keys = dict.fromkeys(key for exp_dict in experiments for key in exp_dict)
    return [key for key in keys if len({json.dumps(e.get(key, "absent")) for e in experiments}) > 1]


def state(savedir: Path) -> str:
    """The state of the run: what Slurm says of its job, else the run's own last word in `status.json`."""
    with contextlib.suppress(DsskError):  # no Slurm on this machine, or a damaged record
        job = read_job(savedir)
        if job.get("job_scheduler") == "slurm":
            reported = slurm.get_job(None, str(job.get("job_id")))["state"]
            if reported != GONE:
                return state_of(reported)
    own = read_status(savedir).get("state", "unknown")
    return COMPLETED if own == "done" else str(own).upper()


def last(savedir: Path, key: str) -> Any:
    """The newest value of a metric."""
    return next((line[key] for line in reversed(read_metrics(savedir)) if key in line), None)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows with full precision, an empty cell for what is not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table that also reads well as plain text."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def plot(savedirs: list[Path], path: Path) -> None:
    """Draw loss and F1 over the steps, one line an experiment; nothing is written where nothing was logged."""
    from matplotlib.figure import Figure  # not pyplot: it keeps global state

    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for savedir in savedirs[:MAX_PLOTTED]:
        for title, names in CURVES.items():
            lines = read_metrics(savedir)
            points = [
                (line["step"], line[name]) for line in lines for name in names if _is_number(line.get(name))
            ]
            if points:
                curves.setdefault(title, {})[savedir.name[:8]] = sorted(points)
    if not curves:
        return
    figure = Figure(figsize=(5 * len(curves), 4), layout="constrained")
    for axes, (title, lines_of) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for name, points in lines_of.items():
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(title=title, xlabel="optimizer steps")
        axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    with atomic_file(path) as file:
        file.write(image.getvalue())
