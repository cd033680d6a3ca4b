"""The contents of a report: measurements, figures and sample answers of a run."""

import shlex
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dssk.errors import DsskError
from dssk.evaluation.attention import Evidence, evidence
from dssk.inference.loading import device, find_model, load_model
from dssk.models.configuration import num_attention_heads
from dssk.report import costs, figures, samples
from dssk.report.run_files import RunFiles
from dssk.store.manifest import MANIFEST as STORE_MANIFEST

WINDOW_TOKENS = 60  # of a context, in the figure of attention

Rows = list[dict[str, Any]]


class Contents:
    """A run's files, its model if it has saved one, and what that attended to.

    `data` is what the page's script reads: the samples, and which blocks and heads there are.
    """

    def __init__(self, files: RunFiles, num_samples: int):
        self.files = files
        self.evidence: Evidence | None = None
        self.model: Any = None
        chosen = samples.choose(files.predictions, num_samples)
        self.data: dict[str, Any] = {
            "total": len(files.predictions),
            "layers": [],
            "heads": 0,
            "best": None,  # block, and head as in `samples.with_attention`
            "kept": samples.KEPT,
            "scale": samples.SCALE,
        }
        try:
            folder = find_model(files.folder)
        except DsskError as error:
            print(f"dssk: no attention in this report: {error}", file=sys.stderr)
            self.data["samples"] = [samples.describe(row) for row in chosen]
            return
        self.model, tokenizer = load_model(folder, device=device())
        self.evidence = evidence(self.model, tokenizer, files.predictions)
        self.data["samples"] = samples.with_attention(self.model, tokenizer, chosen)
        self.data["layers"] = self.model.config.reading_layers
        merged = self.model.config.reader == "merged"
        self.data["heads"] = (
            num_attention_heads(self.model.config)
            if merged
            else self.model.config.cross_attn_num_attention_heads
        )
        if self.evidence:
            self.data["best"] = [self.evidence.block, self.evidence.head + 1]

    def figures(self) -> dict[str, Figure]:
        """Every figure there is something for, by name."""
        metrics, controls = self.files.metrics, self.files.controls
        lengths = {name: row.get("by_context_tokens") for name, row in controls.items()}
        classes = {name: row.get("by_class") for name, row in controls.items()}
        drawn = {
            "loss": figures.loss_curve(metrics),
            "f1": figures.score_curve(metrics),
            "attention": self._attention_figure(),  # the page has a map to play with; this one is for a paper
        }
        if controls:
            drawn["scores"] = figures.bars([{"name": name, **row} for name, row in controls.items()])
        if controls and all(lengths.values()):
            drawn["lengths"] = figures.by_length(lengths)  # type: ignore[arg-type]
        if controls and all(classes.values()):
            drawn["classes"] = figures.by_class(classes)  # type: ignore[arg-type]
        if self.files.numbers:
            drawn["numbers"] = figures.by_number(self.files.numbers)
        for number, rows in enumerate(self.systems().values(), 1):
            drawn[f"systems-{number}"] = figures.bars([{"name": row["system"], **row} for row in rows])
        return {name: figure for name, figure in drawn.items() if figure is not None}

    def _attention_figure(self) -> Figure | None:
        """The best head in the first right sample, in a window around its most attended token."""
        sample = next((s for s in self.data["samples"] if s["right"] and s.get("weights")), None)
        if sample is None or self.data["best"] is None:
            return None
        weights = samples.dense(sample, *self.data["best"])
        start = max(0, weights.sum(0).argmax() - WINDOW_TOKENS // 2)
        window = slice(start, start + WINDOW_TOKENS)
        return figures.heat_map(weights[:, window], sample["answer_tokens"], sample["tokens"][window])

    def parts(self, run_dir: str) -> dict[str, Any]:
        """The variables of the page's template, figures excepted; `run_dir` is the run as the user named it."""
        experiment = self.files.experiment
        base = Path(str(experiment.get("model_path", ""))).name
        published = list(costs.PUBLISHED)
        own = [costs.of_model(f"this run's base, {base}", self.model.config)] if self.model else []
        return {
            "title": f"{_reader(experiment)} in {base}",
            "reader": experiment.get("reader", "cross_attention"),
            "subtitle": self.subtitle(),
            "tiles": self.tiles(),
            "controls": self.files.controls,
            "systems": self.systems(),
            "data": self.files.data,
            "evidence": self.evidence,
            "samples": self.data,
            "has_model": self.model is not None,
            "experiment": experiment,
            "costs": self.measured_costs(),
            "caches": own + published,
            "published": published,
            "bytes_per_value": costs.BYTES_PER_VALUE,
            "commands": commands(run_dir, self.files.folder, base),
        }

    def subtitle(self) -> str:
        files = self.files
        steps = max((line.get("step", 0) for line in files.metrics), default=0)
        base = files.experiment.get("model_path", "")
        parts = [f"run {files.folder.resolve().name}", f"base {base}", f"{steps:,} optimizer steps"]
        if self.model:
            trained, total = self.model.trainable_parameters()
            parts.append(f"{trained:,} of {total:,} parameters trained")
        return " · ".join(parts)

    def tiles(self) -> list[dict[str, str]]:
        """The few numbers that say most."""

        def tile(value: float, label: str, detail: str) -> None:
            tiles.append({"value": f"{100 * value:.1f} %", "label": label, "detail": detail})

        tiles: list[dict[str, str]] = []
        scores, found = self.files.scores, self.evidence
        if own := self.files.controls.get("with_context"):
            interval = f"{100 * own['em_low']:.1f}–{100 * own['em_high']:.1f}" if "em_low" in own else ""
            tile(own["em"], "exact match", interval)
            tile(own["f1"], "F1", f"{own['n']:,} questions")
        if none := self.files.controls.get("no_context"):
            tile(none["em"], "exact match without context", "what can be guessed")
        if "right_beats_wrong" in scores:
            tile(scores["right_beats_wrong"], "right context beats wrong", "by the answer's likelihood")
        if found:
            tile(found.share, "attention on the answer", f"best head, {found.n:,} questions")
        return tiles

    def systems(self) -> dict[str, Rows]:
        """The rows of the comparison that have a score, by set of questions."""
        by_data: dict[str, Rows] = {}
        for row in self.files.table:
            if row.get("em") is not None:
                by_data.setdefault(str(row.get("data") or ""), []).append(row)
        return by_data

    def measured_costs(self) -> dict[str, Rows]:
        """Rows with a time to the first token, by what they were measured on.

        Each says how many times `sooner` that token comes than when the context is prompted.
        """
        tables = {
            "Measured on this run's base": self.files.table,
            _larger_base(self.files.cost): self.files.cost,
        }
        measured = {}
        for name, table in tables.items():
            # Costs were measured once, whatever the number of sets.
            rows = {row["system"]: row for row in table if row.get("first_token_s")}
            prompted = rows.get("prompted", {}).get("first_token_s")
            if rows:
                measured[name] = [
                    {**row, "sooner": prompted / row["first_token_s"] if prompted else None}
                    for row in rows.values()
                ]
        return measured


def _reader(experiment: dict[str, Any]) -> str:
    if experiment.get("reader") == "merged":
        return "A merged reader"
    return f"{experiment.get('num_cross_attn_layers', '')} cross-attention blocks".strip()


def _larger_base(cost: Rows) -> str:
    settings = cost[0].get("settings", {}) if cost else {}
    width, layers = settings.get("hidden_size"), settings.get("num_hidden_layers")
    if width and layers and "context_tokens" in settings:
        shape = f"{width} wide with {layers} layers"
        return f"Measured on a random base, {shape}, at contexts of {settings['context_tokens']:,} tokens"
    return "Measured on a larger, random base"


def commands(run_dir: str, folder: Path, base: str) -> dict[str, str]:
    """Commands that make missing parts of a report; `run_dir` is the run's `folder` as the user named it."""
    run, store = shlex.quote(run_dir), find_store(folder, base)
    above = shlex.quote(str(folder.parent))
    data = f"--data_path {shlex.quote(str(store))}" if store else '--data_path "$STORE"'
    hints = {
        "train": f"dssk train --exp_id {shlex.quote(folder.resolve().name)} -sb {above} {data}",
        "evaluate": f"dssk evaluate --checkpoint {run} {data}",
        "compare": f"dssk compare --checkpoint {run} {data} --output compared && dssk report {run} --compare compared",
    }
    said = "" if store else "STORE=...  # the folder that dssk preproc made\n"
    return {name: said + hint for name, hint in hints.items()}


def find_store(folder: Path, base: str) -> Path | None:
    """The store that a run's base made, if it lies in `processed_data/` beside or above the run."""
    for above in folder.resolve().parents[:4]:
        store = above / "processed_data" / base
        if base and (store / STORE_MANIFEST).is_file():
            return store
    return None
