import xml.etree.ElementTree as ET

import pytest

from dssk.report import figures
from tests.report.conftest import score

NAMES = ("with_context", "a <b> & \"c\" $x_1$ 'd'", "no_context")
BY_SYSTEM = [
    {
        "system": system,
        "num_contexts": number,
        "gold": gold,
        "em": em,
        "em_low": em - 0.1,
        "em_high": em + 0.1,
    }
    | {"first_token_s": seconds * number}
    for system, em, seconds in (
        ("cross_attention", 0.9, 0.01),
        ("prompted", 0.5, 0.1),
        ("prompted_shuffled", 0.4, 0.1),
    )
    for number in (1, 5)
    for gold in (True, False)
]
FIGURES = {
    "bars": lambda: figures.bars([{"name": name, **score(0.5)} for name in NAMES]),
    "bars without intervals": lambda: figures.bars([{"name": "a", "em": 0.5, "f1": 0.6}]),
    "bars without F1": lambda: figures.bars([{"name": "a", "em": 0.5}]),
    "lengths": lambda: figures.by_length({name: score(0.5)["by_context_tokens"] for name in NAMES}),
    "classes": lambda: figures.by_class({name: score(0.5)["by_class"] for name in NAMES}),
    "numbers": lambda: figures.by_number(
        [
            {
                "num_contexts": number,
                "gold": gold,
                "em": 0.5,
                "em_low": 0.4,
                "em_high": 0.6,
                "first_token_s": 0.1,
            }
            for number in (1, 5)
            for gold in (True, False)
        ]
    ),
    "numbers by system": lambda: figures.by_number(BY_SYSTEM),
    "loss": lambda: figures.loss_curve(
        [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0, "loss": None}]
    ),
    "heat map": lambda: figures.heat_map([[0.1, 0.9]], ["$a$"], ["<b>", "\u4e2d"]),
    "f1": lambda: figures.score_curve([{"step": 1, "eval_f1": 0.5}]),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_figures_are_svg_in_the_pages_ink_and_png(make, tmp_path):
    drawn = figures.svg(make())
    root = ET.fromstring(drawn.replace("xlink:", ""))
    assert root.get("width") is None
    assert root.get("viewBox")
    assert "currentColor" in drawn
    assert figures.INK not in drawn
    assert drawn == figures.svg(make())  # no dates, no random ids
    figures.write_png(make(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_shown_as_they_are():
    texts = [element.text for element in ET.fromstring(figures.svg(FIGURES["bars"]())).iter()]
    assert "a <b> & \"c\" $x 1$ 'd'" in texts


@pytest.mark.parametrize(
    ("shares", "limit"),
    [([0.96, None], 1.0), ([0.95], 1.0), ([0.31, 0.2], 0.4), ([0.4], 0.5), ([0.0], 0.1), ([], 1.0)],
)
def test_axes_of_shares_end_where_the_shares_do(shares, limit):
    assert figures.share_limit(shares) == limit


def test_each_system_has_its_curves_by_number_and_what_took_as_long_is_one():
    figure = figures.by_number(BY_SYSTEM)
    scores, seconds = figure.axes
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["cross attention", "prompted", "prompted shuffled", "the right one missing"]
    drawn = [(line.get_color(), line.get_linestyle()) for line in scores.lines[:-1]]
    assert len(set(drawn)) == 6
    assert [list(line.get_ydata()) for line in seconds.lines] == [[0.01, 0.05], [0.1, 0.5]]


def test_nothing_logged_is_no_figure():
    assert figures.loss_curve([]) is None
    assert figures.score_curve([{"step": 1, "loss": 2.0}]) is None


def test_no_legend_lies_over_a_bar():
    controls = {name: {cls: {"n": 4, "em": 1.0} for cls in ("span", "yes_no")} for name in "abcde"}
    figure = figures.by_class(controls)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(bar.get_window_extent()) for bar in figure.axes[0].patches)
    assert figure.axes[0].get_legend() is None
