"""How far long work has come: bars on a terminal, lines elsewhere, or nothing.

Always on standard error, and drawn only between steps: a thread that redraws would disturb the
very latencies that are being measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

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
    a terminal."""
    if not (_terminal() if wanted is None else wanted):
        yield Progress()
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
    """One line when a stage ends, for logs."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Generator[Advance]:
        begin, done = time.monotonic(), 0

        def advance() -> None:
            nonlocal done
            done += 1

        yield advance
        steps = "" if total is None else f"{done} in "
        print(f"{name}: {steps}{time.monotonic() - begin:.0f} s", file=sys.stderr)
