"""A headless Chromium on a page from the disk.

Without one the tests that need it are skipped; where CI is set they fail, unless FXOPT_BROWSER=skip
says that the machine cannot have one (.ci/run does, when it could not install it).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest

CHROMIUM = os.environ.get("FXOPT_CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
MISSING = next(
    (
        f"needs {what} for the tests of pages: {how}"
        for found, what, how in (
            (CHROMIUM, "Chromium", "apt-get install chromium, or name one in FXOPT_CHROMIUM"),
            (find_spec("playwright"), "playwright", "pip install -e '.[dev]'"),
        )
        if not found
    ),
    "",
)


def without_one(environment: Mapping[str, str]) -> Literal["skip", "fail"]:
    """What the tests do where there is no browser."""
    in_ci = environment.get("CI", "").lower() not in {"", "0", "false"}
    return "fail" if in_ci and environment.get("FXOPT_BROWSER") != "skip" else "skip"


SKIP = MISSING if without_one(os.environ) == "skip" else ""
needs_browser = pytest.mark.skipif(bool(SKIP), reason=SKIP)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

TIMED = """
new MutationObserver(() => {
  if (document.documentElement.dataset.ready !== undefined) window.readyAfter ??= performance.now();
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["data-ready"] });
"""


class Tab:
    """One open page; `problems` collects what the console said, `requests` what was loaded."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.problems: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path) -> Tab:
        self.page.add_init_script(TIMED)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self

    def seconds(self) -> float:
        """From the start of the navigation until the page was ready, by its own clock."""
        self.wait("window.readyAfter !== undefined")
        return self.page.evaluate("window.readyAfter") / 1000

    def wait(self, condition: str) -> None:
        """Until an expression holds. The page's policy forbids what Playwright would poll with."""
        end = time.monotonic() + 10
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.01)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def rows(self) -> list[str]:
        """The sites that the table shows, from the top."""
        return self.page.eval_on_selector_all(
            ".row.body", "rows => rows.map(row => row.querySelector('.key').title)"
        )

    def selected(self) -> str:
        return self.page.eval_on_selector(
            ".row.body[aria-selected=true] .key", "cell => cell.title"
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)


@contextmanager
def chromium() -> Generator[Any]:
    assert not MISSING, MISSING
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
