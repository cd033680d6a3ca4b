"""Pages in a real Chromium without a window: `open_page` for tests that look at what a person would see."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 30
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# As root there is no sandbox, in a container little shared memory; only this machine can be reached.
FLAGS = (
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


@dataclass
class Visit:
    """A page that was opened. `page` is playwright's `Page`: click, read, screenshot; it waits for elements itself."""

    page: object
    errors: list[str] = field(default_factory=list)  # console errors and warnings, uncaught exceptions
    requests: list[str] = field(
        default_factory=list
    )  # the address of every request; data: and blob: ones are none

    def __getattr__(self, name: str):
        return getattr(self.page, name)


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A running browser. Not for the whole session: playwright's event loop would be in the way of other tests."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=list(FLAGS), timeout=2 * TIMEOUT_SECONDS * 1000
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable[..., Visit]]:
    """Open a file or an address: `open_page(address, width=1200, height=900, dark=False)` -> `Visit`."""
    contexts = []

    def open_page(address: str | Path, width: int = 1200, height: int = 900, dark: bool = False) -> Visit:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_SECONDS * 1000)
        visit = Visit(context.new_page())
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.page.on("console", lambda message: _note(message, visit.errors))
        visit.page.on("request", lambda request: visit.requests.append(request.url))
        visit.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return visit

    yield open_page
    for context in contexts:
        context.close()


def _note(message, errors: list[str]) -> None:
    if message.type in ("error", "warning"):
        errors.append(message.text)
