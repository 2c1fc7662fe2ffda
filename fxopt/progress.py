"""How far long work has come: bars on a terminal, lines elsewhere, or the log alone.

Always on standard error, and drawn only between steps: a thread that redraws would disturb the
very latencies that are being measured.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

logger = logging.getLogger("fxopt")

PAUSE = 10.0
"""Seconds after which something is said where nothing else was."""
T = TypeVar("T")
P = ParamSpec("P")
Advance = Callable[[], None]


class Progress:
    """Says nothing; the base of those that do."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Generator[Advance]:
        """Work under way: what this yields is called when one of `total` steps is done. A total
        that turns out too small grows; None is for work whose steps cannot be seen."""
        del name, total
        yield lambda: None

    def track(self, name: str, items: Collection[T]) -> Iterator[T]:
        """The items, each a step."""
        with self.stage(name, len(items)) as advance:
            for item in items:
                yield item
                advance()


def stepping(advance: Advance, function: Callable[P, T]) -> Callable[P, T]:
    """`function`, each of whose calls is a step."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        result = function(*args, **kwargs)
        advance()
        return result

    return call


@contextmanager
def showing(wanted: bool | None) -> Generator[Progress]:
    """Progress to report to while the block runs: by default (None) shown when standard error is
    a terminal. Where it is not shown, the log `fxopt` has it at INFO."""
    if not (_terminal() if wanted is None else wanted):
        yield Logged(hint=wanted is None)
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_interactive:
        yield Lines()
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[left]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(
        *columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False
    ) as shown:
        yield Bars(shown)


def _terminal() -> bool:
    isatty = getattr(sys.stderr, "isatty", None)  # programs without a console have no stderr
    return isatty is not None and isatty()


class Bars(Progress):
    """A bar with an estimate of the time left for each stage under way."""

    def __init__(self, shown: RichProgress) -> None:
        self._shown = shown

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Generator[Advance]:
        shown = self._shown
        task = shown.add_task(name, total=total, left="left:" if total else "")
        shown.refresh()
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            grown = total if total is None else max(total, done)
            shown.update(task, completed=done, total=grown, refresh=True)

        try:
            yield advance
        finally:
            shown.remove_task(task)
            shown.refresh()


class Lines(Progress):
    """One line when a stage ends, and one now and then while it lasts, for logs."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Generator[Advance]:
        begin = said = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            if time.monotonic() > said + PAUSE:
                said = time.monotonic()
                of = "" if total is None else f" of {max(total, done)}"
                self._say(f"{name}: {done}{of} after {said - begin:.0f} s")

        yield advance
        steps = "" if total is None else f"{done} in "
        self._say(f"{name}: {steps}{time.monotonic() - begin:.0f} s")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr)


class Logged(Lines):
    """Lines for whoever listens to the log; with `hint` others are told that there are bars to be
    had when work takes long, and again, each time after twice as long, that it goes on."""

    def __init__(self, *, hint: bool = False) -> None:
        self._began = time.monotonic()
        self._next = PAUSE if hint else math.inf

    def _say(self, text: str) -> None:
        logger.info(text)
        passed = time.monotonic() - self._began
        if passed <= self._next or logger.isEnabledFor(logging.INFO):
            return
        more = "; progress=True, or a terminal, shows how far it is" if self._next == PAUSE else ""
        logger.warning("still at work after %.0f s (%s)%s", passed, text, more)
        self._next = 2 * passed
