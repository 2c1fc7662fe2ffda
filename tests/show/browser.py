"""A headless Chromium on a page from the disk; tests that need one are skipped without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self

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
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
