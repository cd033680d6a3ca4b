"""Write a run as one page: `python -m dssk.report RUN_DIR [--compare DIR] [--samples 24] [--output FILE.html]`.

The page holds all it needs and fetches nothing. Its figures lie beside it as PNG, and what was measured about
attention as attention.json. Parts whose files are not there yet are left out, with the command that makes them.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from dssk.checkpoint import find_model, load_model
from dssk.console import quiet_libraries
from dssk.errors import DsskError, run
from dssk.evaluation.attention import Evidence, evidence
from dssk.files import make_folder, publish_json, publish_text
from dssk.flags import Parser, count
from dssk.models.modeling import CrossAttnGPTBigCodeForCausalLM
from dssk.report import costs, figures, samples
from dssk.report.page import render
from dssk.report.run_files import RunFiles, read_run
from dssk.training.wandb_report import log_report

WINDOW_TOKENS = 60  # of a context, in the figure of attention


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    quiet_libraries()
    files = read_run(args.run_dir, args.compare, args.data)
    output = Path(args.output) if args.output else files.folder / "report.html"
    make_folder(output.parent)
    fused = load(files.folder)
    found = evidence(*fused, files.predictions) if fused and files.predictions else None
    shown = sample_data(files, fused, found, samples.choose(files.predictions, args.samples))
    drawn = draw(files, shown)
    publish_text(output, page(args, files, fused, found, shown, drawn))
    pngs = [output.with_name(f"{output.stem}-{name}.png") for name in drawn]
    for figure, png in zip(drawn.values(), pngs, strict=True):
        figures.write_png(figure, png)
    if found:
        publish_json(output.with_name("attention.json"), dataclasses.asdict(found))
        print(summary(found))
    log_report(files.folder, output, pngs)
    print(output)


def parse_args(argv: Sequence[str] | None):
    parser = Parser(prog="python -m dssk.report", description=__doc__)
    parser.add_argument("run_dir", help="a run's folder, as trainval.py made it")
    parser.add_argument("--compare", help="folder that dssk.evaluation.compare wrote")
    parser.add_argument(
        "--data",
        help="show scores and samples of this set of questions of the comparison (the run's own, if it was scored)",
    )
    parser.add_argument(
        "--samples", type=count, default=24, help="questions to show with their answers (%(default)s)"
    )
    parser.add_argument("--output", help="the page (report.html in the run's folder)")
    return parser.parse_args(argv)


Fused = tuple[CrossAttnGPTBigCodeForCausalLM, PreTrainedTokenizerBase]


def load(folder: Path) -> Fused | None:
    """The run's model and tokenizer; None if it has not saved one yet."""
    try:
        found = find_model(folder)
    except DsskError as error:
        print(f"dssk: no attention in this report: {error}", file=sys.stderr)
        return None
    model, tokenizer = load_model(found)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def summary(found: Evidence) -> str:
    return (
        f"block {found.block + 1}, head {found.head + 1}: the most attended token lies inside the answer for "
        f"{found.share:.1%} of {found.n} correctly answered questions"
    )


def draw(files: RunFiles, shown: dict[str, Any]) -> dict[str, Figure]:
    """Every figure there is something for, by name."""
    controls = files.controls
    lengths = {name: row.get("by_context_tokens") or [] for name, row in controls.items()}
    classes = {name: row.get("by_class") or {} for name, row in controls.items()}
    drawn = {
        "loss": figures.loss_curve(files.metrics),
        "f1": figures.score_curve(files.metrics),
        "scores": figures.bars([{"name": name, **row} for name, row in controls.items()])
        if controls
        else None,
        "lengths": figures.by_length(lengths) if controls and all(lengths.values()) else None,
        "classes": figures.by_class(classes) if controls and all(classes.values()) else None,
    }
    drawn["attention"] = attention_figure(shown)  # the page has a map to play with; this one is for a paper
    for i, rows in enumerate(systems(files).values(), 1):
        drawn[f"systems-{i}"] = figures.bars([{"name": row["system"], **row} for row in rows])
    return {name: figure for name, figure in drawn.items() if figure is not None}


def attention_figure(shown: dict[str, Any]) -> Figure | None:
    """What the best head attended to in the first right sample, in a window around its most attended token."""
    sample = next((s for s in shown["samples"] if s["right"] and s.get("weights")), None)
    if sample is None or shown["best"] is None:
        return None
    weights = samples.dense(sample, *shown["best"])
    start = max(0, weights.sum(0).argmax() - WINDOW_TOKENS // 2)
    window = slice(start, start + WINDOW_TOKENS)
    return figures.heat_map(weights[:, window], sample["answer_tokens"], sample["tokens"][window])


def systems(files: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """The rows of the comparison that have a score, by data set."""
    by_data: dict[str, list[dict[str, Any]]] = {}
    for row in files.table:
        if row.get("em") is not None:
            by_data.setdefault(str(row.get("data") or ""), []).append(row)
    return by_data


def measured_costs(files: RunFiles) -> dict[str, list[dict[str, Any]]]:
    """Rows with a time to the first token, each with how many times sooner it comes than when prompted."""
    tables = {"Measured on this run's base": files.table, "Measured on a larger base": files.cost}
    measured = {}
    for name, table in tables.items():
        rows = {
            row["system"]: row for row in table if row.get("first_token_s")
        }  # costs do not differ by data set
        prompted = rows.get("prompted", {}).get("first_token_s")
        if rows:
            measured[name] = [
                {**row, "sooner": prompted / row["first_token_s"] if prompted else None}
                for row in rows.values()
            ]
    return measured


def tiles(files: RunFiles, found: Evidence | None) -> list[dict[str, str]]:
    """The few numbers that say most."""

    def tile(value: float, label: str, detail: str) -> None:
        shown.append({"value": f"{100 * value:.1f} %", "label": label, "detail": detail})

    shown: list[dict[str, str]] = []
    if own := files.controls.get("with_context"):
        interval = f"{100 * own['em_low']:.1f}–{100 * own['em_high']:.1f}" if "em_low" in own else ""
        tile(own["em"], "exact match", interval)
        tile(own["f1"], "F1", f"{own['n']:,} questions")
    if none := files.controls.get("no_context"):
        tile(none["em"], "exact match without context", "what can be guessed")
    if "right_beats_wrong" in files.scores:
        tile(files.scores["right_beats_wrong"], "right context beats wrong", "by the answer's likelihood")
    if found:
        tile(found.share, "attention on the answer", f"best head, {found.n:,} questions")
    return shown


def page(
    args,
    files: RunFiles,
    fused: Fused | None,
    found: Evidence | None,
    shown: dict[str, Any],
    drawn: dict[str, Figure],
) -> str:
    published = list(costs.PUBLISHED)
    ratios = [cache.ratio for cache in published]
    multi_head = [cache.multi_head_ratio for cache in published]
    base = str(files.experiment.get("model_path", ""))
    own_cache = [costs.of_model(f"this run's base, {Path(base).name}", fused[0].config)] if fused else []
    return render(
        title=title(files.experiment, base),
        subtitle=subtitle(files, fused, base),
        tiles=tiles(files, found),
        figures={name: figures.svg(figure) for name, figure in drawn.items()},
        controls=files.controls,
        systems=systems(files),
        data=files.data,
        evidence=found,
        samples=shown,
        attention_note="" if fused else "The run has no model yet: samples are shown without attention.",
        experiment=files.experiment,
        costs=measured_costs(files),
        caches=own_cache + published,
        own_cache=bool(own_cache),
        ratios={
            "low": min(ratios),
            "high": max(ratios),
            "multi_head_low": min(multi_head),
            "multi_head_high": max(multi_head),
        },
        bytes_per_value=costs.BYTES_PER_VALUE,
        commands=commands(args),
        command=shlex.join(["python", "-m", "dssk.report", *sys.argv[1:]]),
    )


def title(experiment: dict[str, Any], base: str) -> str:
    blocks = experiment.get("num_cross_attn_layers", "")
    return f"{blocks} cross-attention blocks in {Path(base).name}".strip()


def subtitle(files: RunFiles, fused: Fused | None, base: str) -> str:
    steps = max((m.get("step", 0) for m in files.metrics), default=0)
    parts = [f"run {files.folder.name}", f"base {base}", f"{steps:,} optimizer steps"]
    if fused:
        trained, total = fused[0].trainable_parameters()
        parts.append(f"{trained:,} of {total:,} parameters trained")
    return " · ".join(parts)


def sample_data(
    files: RunFiles, fused: Fused | None, found: Evidence | None, chosen: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the page's script reads."""
    config = fused[0].config if fused else None
    return {
        "samples": samples.with_attention(*fused, chosen)
        if fused
        else [samples.describe(row) for row in chosen],
        "total": len(files.predictions),
        "layers": sorted(config.cross_attn_layers) if config else [],
        "heads": config.cross_attn_num_attention_heads if config else 0,
        "best": [found.block, found.head + 1] if found else None,
        "kept": samples.KEPT,
        "scale": samples.SCALE,
    }


def commands(args) -> dict[str, str]:
    """What makes the parts that are missing."""
    folder = shlex.quote(args.run_dir)
    compare = f"--checkpoint {folder} --data_path DATA --output DIR"
    return {
        "train": "python trainval.py -e GROUP --data_path DATA -sb RUNS",
        "evaluate": f"python -m dssk.evaluation.evaluate --checkpoint {folder} --data_path DATA",
        "compare": f"python -m dssk.evaluation.compare {compare} && python -m dssk.report {folder} --compare DIR",
    }


if __name__ == "__main__":
    sys.exit(run(main))
