"""Lines of text with a style each, rendered plain or with colours, as wide as the terminal."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass, field

MAX_WIDTH = 100
MIN_WIDTH = 60
STYLES = {"~": "yellow", "=": "dim", "!": "magenta", "x": "red", "+": "green", "-": "red"}


def has_colours() -> bool:
    """Whether standard output is a terminal and the user did not ask for plain text."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and _is_terminal()


def width() -> int:
    """Columns to fill: those of the terminal, at most 100."""
    columns = shutil.get_terminal_size((MAX_WIDTH, 24)).columns if _is_terminal() else MAX_WIDTH
    return min(max(columns, MIN_WIDTH), MAX_WIDTH)


def _is_terminal() -> bool:
    return bool(getattr(sys.stdout, "isatty", lambda: False)())


@dataclass
class Page:
    """Collects lines; wraps at `columns`, but never inside a name."""

    columns: int = MAX_WIDTH
    lines: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add(self, text: str = "", style: str = "", indent: int = 0, hanging: int = 2) -> None:
        """One paragraph; lines after its first are `hanging` columns further in."""
        wrapped = textwrap.wrap(
            text,
            self.columns,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hanging),
            break_long_words=False,
            break_on_hyphens=False,
        )
        self.lines += [(line, style) for line in wrapped or [""]]

    def marked(self, mark: str, text: str) -> None:
        """A line of the body, `mark` first; the mark also decides the colour."""
        self.add(f"{mark} {text}", STYLES[mark], indent=2, hanging=6)

    def verbatim(self, text: str, style: str = "") -> None:
        """Lines that keep their columns, as of a table."""
        self.lines += [(line.rstrip(), style) for line in text.splitlines()]

    def render(self, colours: bool) -> str:
        if not colours:
            return "\n".join(line for line, _ in self.lines)
        from rich.console import Console
        from rich.text import Text

        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system="standard", width=1 << 16)
        for line, style in self.lines:
            console.print(Text(line, style=style))
        return out.getvalue().removesuffix("\n")
