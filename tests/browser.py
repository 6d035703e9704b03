"""A real browser for tests: headless Chromium driven by Playwright, with everything a page asked for and complained of written down.

A test takes ``view``: a function that opens an address in a context of its own.  Where no browser is found, the tests that need one
are skipped and say so; `.ci/run` installs one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    # on a machine without a network these wait for connections that are refused
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDE, NARROW = (1280, 900), (390, 844)
PATIENCE = 60_000.0  # ms until something a page should do counts as not done


def found() -> str | None:
    """The browser's path: $ERRATA_BROWSER, which must be there then, or the first of `NAMES` on PATH."""
    names = (given,) if (given := os.environ.get("ERRATA_BROWSER")) else NAMES
    path = next((path for name in names if (path := shutil.which(name))), None)
    assert path or not given, f"ERRATA_BROWSER={given} is no program"
    return path


@dataclass
class View:
    """A page that is open.  ``complaints``: errors and warnings of its console, and uncaught exceptions; ``asked``: every address."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def overflow(self) -> list[str]:
        """What makes the body wider than the window, as `tag.class (right edge)`; empty where nothing does."""
        return self.page.evaluate(OVERFLOW)

    def faults(self, rule: str = "") -> list[str]:
        """What axe-core finds against WCAG 2.1 A and AA (contrast, names, roles, labels …), or one of its rules; one line each."""
        self.page.evaluate(axe())
        found = self.page.evaluate("rules => axe.run(document, { runOnly: rules })", [rule] if rule else RULES)
        return [
            f"{v['id']}: {node['html'][:120]} ({' '.join(str(node.get('failureSummary')).split())[:300]})"
            for v in found["violations"]
            for node in v["nodes"]
        ]

    def picture(self, name: str, **how: Any) -> Path:
        """A screenshot, in $ERRATA_SCREENSHOTS where that is set, else in the test's folder."""
        path = self.shots / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, **how)
        assert path.stat().st_size > 5000
        return path

    shots: Path = Path()


RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
OVERFLOW = """() => {
  const root = document.documentElement, wide = root.clientWidth, out = [];
  if (root.scrollWidth <= wide && document.body.scrollWidth <= wide) { return out; }
  for (const e of document.body.querySelectorAll("*")) {
    const r = e.getBoundingClientRect();
    if (r.right > wide + 0.5) { out.push(`${e.tagName.toLowerCase()}.${e.className} (${Math.round(r.right)})`); }
  }
  return out.length ? out : ["the body"];
}"""


@cache
def axe() -> str:
    from axe_playwright_python.base import AXE_FILE_PATH

    return Path(AXE_FILE_PATH).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for a file's tests."""
    path = found()
    if path is None:
        pytest.skip(f"no browser: set ERRATA_BROWSER, or install one of {', '.join(NAMES)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS), chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture
def view(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., View]]:
    """view(address, size=WIDE, scheme="light", script="", **context): the page opened there, in a context of its own.

    ``script`` runs in it before its own.
    """
    opened = []

    def open_(address: str, size: tuple[int, int] = WIDE, scheme: str = "light", script: str = "", **more: Any) -> View:
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce", **more)
        opened.append(context)
        context.set_default_timeout(PATIENCE)
        context.add_init_script(script)
        out = View(context.new_page(), shots=Path(os.environ.get("ERRATA_SCREENSHOTS") or tmp_path))
        out.page.on("console", lambda m: m.type in ("error", "warning") and out.complaints.append(f"{m.type}: {m.text}"))
        out.page.on("pageerror", lambda e: out.complaints.append(f"uncaught: {e}"))
        out.page.on("request", lambda r: out.asked.append(r.url))
        out.page.goto(address)
        return out

    yield open_
    for context in opened:
        context.close()
