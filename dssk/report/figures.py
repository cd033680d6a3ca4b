"""The figures of a report: pure functions from numbers to matplotlib figures, and these as SVG and PNG."""

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dssk.utils.files import atomic_file

WIDTH, HEIGHT = 5.2, 3.1  # inches; a page shows two side by side, a phone one
INK = "#2a2f37"
BLUE, ORANGE, GREEN, GREY = "#3d7cc9", "#d9772b", "#2f9d6c", "#8b93a0"  # to be read on white and on black
PALETTE = (BLUE, GREY, ORANGE, GREEN, "#a06cc4")
STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be found
    "svg.hashsalt": "dssk",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}

Metrics = Sequence[dict[str, Any]]  # the lines of metrics.jsonl


def loss_curve(metrics: Metrics) -> Figure | None:
    """Training and validation loss by optimizer step; None before anything was logged."""
    lines = {"loss": ("training", BLUE), "eval_loss": ("validation", ORANGE)}
    return _curves(metrics, lines, "loss (nats a token)")


def score_curve(metrics: Metrics) -> Figure | None:
    """Scores of generated answers during training, with the right and with a wrong context."""
    lines = {
        "eval_f1": ("F1", BLUE),
        "eval_em": ("EM", GREEN),
        "eval_wrong_context_f1": ("F1, wrong context", GREY),
    }
    figure = _curves(metrics, lines, "share of answers")
    if figure is not None:
        top = share_limit(line.get(key) for line in metrics for key in lines)
        figure.axes[0].set_ylim(-0.02 * top, 1.02 * top)
    return figure


def _curves(metrics: Metrics, lines: dict[str, tuple[str, str]], label: str) -> Figure | None:
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for key, (name, colour) in lines.items():
            points = [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), int | float)]
            if points:
                marker = "o" if len(points) < 40 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=name, marker=marker, markersize=3.5)
        if not axes.lines:
            return None
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.legend()
    return figure


def layer_curve(scores: Sequence[tuple[int, float]], best: int, prompted: float, unread: float) -> Figure:
    """Likelihood of held-out text read from the states of each layer, between reading the text itself and nothing."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        axes.plot(
            *zip(*sorted(scores), strict=True),
            color=BLUE,
            marker="o",
            markersize=3.5,
            label="read from states",
        )
        axes.axvline(best, color=BLUE, alpha=0.3, linewidth=4)
        axes.axhline(unread, color=GREY, linestyle="--", label="not read at all")
        axes.axhline(prompted, color=GREEN, linestyle="--", label="text in the prompt")
        axes.set_xlabel("layer whose input is stored")
        axes.set_ylabel("NLL of held-out text (nats a token)")
        axes.legend()
    return figure


def bars(rows: Sequence[dict[str, Any]]) -> Figure:
    """Horizontal bars of EM, with its interval, and a mark for F1; rows of `name`, `em`, `f1`, `em_low`, `em_high`."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(height=0.9 + 0.36 * len(rows))
        for place, row in enumerate(rows):
            axes.barh(place, row["em"], height=0.62, color=BLUE if place == 0 else GREY, alpha=0.85)
            if row.get("f1") is not None:
                axes.plot(row["f1"], place + 0.2, marker="D", markersize=4, color=ORANGE, linestyle="none")
            if row.get("em_low") is not None:
                axes.plot(
                    [row["em_low"], row["em_high"]],
                    [place, place],
                    color=INK,
                    solid_capstyle="butt",
                    linewidth=2,
                )
        axes.plot([], [], color=INK, linewidth=2, label="EM, 95 % interval")
        axes.plot([], [], marker="D", markersize=4, color=ORANGE, linestyle="none", label="F1")
        axes.set_yticks(range(len(rows)), [_plain(row["name"]) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, share_limit(row.get(key) for row in rows for key in ("em", "em_high", "f1")))
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def by_length(controls: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """EM by the length of the context, a line for each control: bins of `low` to `high` tokens, `em`, its interval."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for (name, rows), colour in zip(controls.items(), cycle(PALETTE)):
            tokens = [(row["low"] + row["high"]) / 2 for row in rows]
            # The first control is drawn on top: shuffled tokens, for one, hardly differ from it.
            order = 3 if axes.lines else 4
            ems = [row["em"] for row in rows]
            axes.plot(tokens, ems, color=colour, marker="o", markersize=4, label=_plain(name), zorder=order)
            if all(row.get("em_low") is not None for row in rows):
                lows, highs = [row["em_low"] for row in rows], [row["em_high"] for row in rows]
                axes.fill_between(tokens, lows, highs, color=colour, alpha=0.18, linewidth=0)
        axes.set_xlabel("tokens of the context, middle of a bin")
        axes.set_ylabel("EM")
        top = share_limit(
            row.get(key) for rows in controls.values() for row in rows for key in ("em", "em_high")
        )
        axes.set_ylim(-0.02 * top, 1.02 * top)
        axes.legend()
    return figure


def by_number(rows: Sequence[dict[str, Any]]) -> Figure:
    """EM, and below it seconds to the first token, by the number of contexts, the right one among them or missing.

    Rows as `evaluation.by_number.rows` gives them, or as a comparison does, with the system of each.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.5 * HEIGHT), layout="constrained")
        scores, seconds = figure.subplots(2, sharex=True)
        systems = dict.fromkeys(row.get("system") for row in rows)
        measured: list[list[Any]] = []
        for system, colour in zip(systems, cycle(PALETTE)):
            for gold, how in ((True, "-"), (False, ":")):
                chosen = [row for row in rows if row["gold"] == gold and row.get("system") == system]
                numbers = [row["num_contexts"] for row in chosen]
                look: Any = {"color": colour, "linestyle": how, "marker": "o", "markersize": 4}
                label = (_plain(system) if system else "the right one among them") if gold else None
                scores.plot(numbers, [row["em"] for row in chosen], label=label, **look)
                lows, highs = [row["em_low"] for row in chosen], [row["em_high"] for row in chosen]
                scores.fill_between(numbers, lows, highs, color=colour, alpha=0.18, linewidth=0)
                timed = [row.get("first_token_s") for row in chosen]
                # What was measured once for several systems is one line.
                if all(value is not None for value in timed) and timed not in measured:
                    seconds.plot(numbers, timed, **look)
                    measured.append(timed)
        scores.plot([], [], color=INK, linestyle=":", label="the right one missing")
        scores.set_ylabel("EM")
        top = share_limit(row.get(key) for row in rows for key in ("em", "em_high"))
        scores.set_ylim(-0.02 * top, 1.02 * top)
        figure.legend(loc="outside upper center", ncols=2)  # never over a curve
        seconds.set_ylabel("first token (seconds)")
        if len(systems) > 1:
            seconds.set_yscale("log")  # prompting takes many times as long
        else:
            seconds.set_ylim(bottom=0)
        seconds.set_xlabel("contexts that are read together")
    return figure


def by_class(controls: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """EM by class of answer, a group of bars for each class, a bar for each control."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        classes = list(next(iter(controls.values())))
        width = 0.8 / len(controls)
        for i, ((name, rows), colour) in enumerate(zip(controls.items(), cycle(PALETTE))):
            places = [place + (i - (len(controls) - 1) / 2) * width for place in range(len(classes))]
            heights = [rows.get(cls, {}).get("em") or 0.0 for cls in classes]
            axes.bar(places, heights, width * 0.9, color=colour, alpha=0.85, label=_plain(name))
        counts = next(iter(controls.values()))
        axes.set_xticks(range(len(classes)), [f"{_plain(c)}\nn = {counts[c]['n']}" for c in classes])
        axes.set_ylabel("EM")
        axes.set_ylim(0, share_limit(row.get("em") for rows in controls.values() for row in rows.values()))
        axes.grid(axis="x", visible=False)
        figure.legend(loc="outside upper center", ncols=min(3, len(controls)))  # never over a bar
    return figure


def heat_map(weights, answer_tokens: Sequence[str], context_tokens: Sequence[str]) -> Figure:
    """Weights (A, S) from answer tokens (rows) to context tokens (columns)."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "font.size": 8}):
        size = (max(4.0, 0.19 * len(context_tokens) + 1.2), 0.24 * len(answer_tokens) + 1.3)
        figure, axes = _figure(*size)
        axes.imshow(weights, cmap="Oranges", vmin=0, aspect="auto")
        axes.set_xticks(range(len(context_tokens)), [_plain(t.strip()) for t in context_tokens], rotation=90)
        axes.set_yticks(range(len(answer_tokens)), [_plain(t.strip()) for t in answer_tokens])
        axes.set_ylabel("answer")
    return figure


def share_limit(shares: Iterable[float | None]) -> float:
    """The upper limit of an axis of shares: 1, or less if all are small."""
    highest = max((share for share in shares if share is not None), default=1.0)
    return min(1.0, max(1, math.ceil(11 * highest)) / 10)


def _figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _plain(text: str) -> str:
    """Names as they are: for matplotlib a `$` begins a formula."""
    return text.replace("_", " ").replace("$", r"\$")


def svg(figure: Figure) -> Markup:
    """The figure as an element of a page: ink in the page's colour of text, sized by the page."""
    text = _saved(figure, format="svg", transparent=True, metadata={"Date": None, "Creator": None}).decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = text.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1))


def write_png(figure: Figure, path: Path) -> None:
    """The figure on white, 200 dots an inch."""
    with atomic_file(path) as file:
        file.write(_saved(figure, format="png", dpi=200, facecolor="white"))


def _saved(figure: Figure, **settings: Any) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # contexts have every script
        figure.savefig(file, **settings)
    return file.getvalue()
