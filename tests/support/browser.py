"""Chromium on the pages of a report, watched: whatever a page says, breaks, loads or asks is noted."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

EXECUTABLE = "FUNCPROBE_CHROMIUM"  # environment variable: the browser of the tests
SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Violations of the content policy, since the page's first line; run before the page's own scripts.
WATCH = """
window.__violations = [];
document.addEventListener('securitypolicyviolation', event => window.__violations.push(
    `${event.effectiveDirective} at line ${event.lineNumber}: ${event.blockedURI} ${event.sample}`));
"""


@dataclass
class Watched:
    """A page, and what happened in it. `page` is Playwright's."""

    page: Any
    url: str
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Other than the file itself and data: URLs."""
    dialogs: list[str] = field(default_factory=list)
    scripts: bool = True

    def violations(self) -> list[str]:
        """Of the content policy; none can be listed with scripts off, but `console` has them."""
        return self.page.evaluate("window.__violations || []") if self.scripts else []

    def faults(self) -> dict[str, list[str]]:
        """Everything that a page must not do; empty for a good one."""
        found = {
            "console": self.console,
            "errors": self.errors,
            "requests": self.requests,
            "dialogs": self.dialogs,
            "violations": self.violations(),
        }
        return {kind: lines for kind, lines in found.items() if lines}


OpenPage = Callable[..., Watched]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright's browser; skips where none is installed.

    Of a module, not of the session: while it lives, its event loop counts as this thread's, and
    asyncio.run in another module's tests would refuse to start.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = os.environ.get(EXECUTABLE) or next(filter(None, map(shutil.which, SYSTEM)), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip(
                f"no browser: install chromium, run `playwright install chromium`, or set {EXECUTABLE}"
            )
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[OpenPage]:
    """open_page(file, width=1280, dark=False, scripts=True, media="screen", clean=True) -> Watched.

    At the end of the test, what `faults` lists fails it, unless the page was opened with clean=False.
    """
    opened: list[tuple[Watched, bool]] = []

    def call(
        file: Path,
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        scripts: bool = True,
        media: str = "screen",
        clean: bool = True,
        **options: Any,
    ) -> Watched:
        context = chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=scripts,
            **options,
        )
        context.add_init_script(WATCH)
        page = context.new_page()
        page.emulate_media(media=media)
        watched = Watched(page, file.resolve().as_uri(), scripts=scripts)
        page.on("console", lambda m: watched.console.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on("request", lambda request: _note(request.url, watched))
        page.on("dialog", lambda dialog: (watched.dialogs.append(dialog.message), dialog.dismiss()))
        opened.append((watched, clean))
        page.goto(watched.url)
        return watched

    yield call
    faults = [watched.faults() for watched, clean in opened if clean]
    for watched, _ in opened:
        watched.page.context.close()
    assert not any(faults), faults


def axe(page: Any) -> list[str]:
    """axe-core's serious and critical findings, one line an element."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']} ({rule['impact']}): {node['target']} {node['failureSummary']}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def _note(url: str, watched: Watched) -> None:
    if url.split("#", maxsplit=1)[0] != watched.url and not url.startswith("data:"):
        watched.requests.append(url)
