"""The experiments of a folder, side by side.

A table, written as results.csv and results.md, and the curves of loss and F1 as results.png.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from dssk.config import experiment_id
from dssk.errors import DsskError
from dssk.jobs import slurm
from dssk.jobs.states import COMPLETED, GONE, state_of
from dssk.utils.files import publish, publish_text

RESULTS = "results"
CURVES = {"training loss": ("loss",), "validation loss": ("eval_loss",), "F1": ("eval_f1", "f1")}
MAX_PLOTTED = 20  # more lines than this nobody tells apart


def write_table(savedir_base: Path) -> str:
    """Write results.csv, results.md and results.png into `savedir_base`; returns the Markdown."""
    experiments = find_experiments(savedir_base)
    rows = [row_of(savedir, exp_dict, experiments) for savedir, exp_dict in experiments.items()]
    publish_text(savedir_base / f"{RESULTS}.csv", as_csv(rows))
    publish_text(savedir_base / f"{RESULTS}.md", as_markdown(rows))
    plot(list(experiments), savedir_base / f"{RESULTS}.png")
    return as_markdown(rows)


def find_experiments(savedir_base: Path) -> dict[Path, dict[str, Any]]:
    """Each experiment's folder and the experiment; a folder whose name is not its experiment's id is none."""
    found = {}
    for file in sorted(savedir_base.glob("*/exp_dict.json")):
        exp_dict = read_json(file)
        if isinstance(exp_dict, dict) and experiment_id(exp_dict) == file.parent.name:
            found[file.parent] = exp_dict
    if not found:
        raise DsskError(f"no experiment in {savedir_base}: want the --savedir_base of trainval.py")
    return found


def row_of(
    savedir: Path, exp_dict: dict[str, Any], experiments: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """What differs in this experiment, and how far it got."""
    scores = best_scores(savedir)
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
    job = read_json(savedir / "job_dict.json") or {}
    if job.get("job_scheduler") == "slurm":
        try:
            reported = slurm.get_job(None, job["job_id"])["state"]
            if reported != GONE:
                return state_of(reported)
        except DsskError:
            pass  # no Slurm on this machine
    own = (read_json(savedir / "status.json") or {}).get("state", "unknown")
    return COMPLETED if own == "done" else str(own).upper()


def best_scores(savedir: Path) -> dict[str, float]:
    """EM and F1 with the right context, from the newest scores.json of the run or of one of its models."""
    files = [*savedir.glob("scores.json"), *savedir.glob("*/scores.json")]
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    return ((read_json(newest) if newest else None) or {}).get("with_context", {})


def metrics(savedir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut by a crash is left out."""
    file = savedir / "metrics.jsonl"
    lines = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def last(savedir: Path, key: str) -> Any:
    """The newest value of a metric."""
    return next((line[key] for line in reversed(metrics(savedir)) if key in line), None)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is absent or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


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
            lines = metrics(savedir)
            points = [(line["step"], line[name]) for line in lines for name in names if name in line]
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
    with publish(path) as file:
        file.write(image.getvalue())
