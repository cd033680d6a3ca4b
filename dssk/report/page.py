"""The page itself: one HTML file that needs nothing else and fetches nothing."""

import base64
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

ABSENT = "–"


def _known(text: Callable[..., str]) -> Callable[..., str]:
    """A filter for numbers that writes a dash for what is not one."""

    def filtered(value: Any, *args: Any) -> str:
        return text(value, *args) if isinstance(value, int | float) else ABSENT

    return filtered


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.{0 if value >= 0.1 else 1}f} ms"


FILTERS: dict[str, Callable[..., str]] = {
    "percent": _known(lambda share: f"{100 * share:.1f}"),
    "decimals": _known(lambda value, digits: f"{value:.{digits}f}"),
    "count": _known(lambda value: f"{value:,.0f}"),
    "seconds": _known(_seconds),
    "times": _known(lambda ratio: f"{ratio:.1f} ×"),
    "plain": lambda name: name.replace("_", " "),
}


def render(**parts: Any) -> str:
    """The page with its style and script in it.

    Everything but our own style, script and figures (`Markup`) is escaped. The page's policy lets it run that script
    alone, by its hash, and load nothing.
    """
    files = resources.files("dssk.report")
    script, css = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= FILTERS
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # weights are many
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(css=Markup(css), script=Markup(script), script_hash=script_hash, **parts)
