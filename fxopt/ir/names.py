"""Names that users type: exact ones, `re:` patterns, and what to say when nothing matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from .errors import PlanError

NAMED = 3
"""Names that a message lists."""


def near(name: str, known: Iterable[str], limit: int = NAMED) -> list[str]:
    """The known names nearest to a mistyped one, best first."""
    return difflib.get_close_matches(name, sorted(set(known)), n=limit, cutoff=0.5)


def hint(name: str, known: Iterable[str]) -> str:
    """ " Did you mean ...?", or nothing when no known name is near."""
    names = near(name, known)
    return f" Did you mean {' or '.join(repr(found) for found in names)}?" if names else ""


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern means a name.

    `re:<expression>` matches the whole name. A plain name means itself and all below it:
    `model.layers.3` covers `model.layers.3.mlp.up_proj`, and a key without head or ordinal covers
    `.../kv=0` and `...#1`.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or (name.startswith(pattern) and name[len(pattern)] in "./#")


def select(patterns: Sequence[str] | str, names: Iterable[str], what: str = "name") -> list[str]:
    """The names that any pattern covers, in their own order.

    Raises PlanError with near names for a pattern that covers none, or is no regular expression.
    """
    known = list(dict.fromkeys(names))
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = {name for name in known if covers(pattern, name)}
        except re.error as error:
            raise PlanError(
                f"{what} pattern {pattern!r} is no regular expression: {error}"
            ) from None
        if not found:
            raise PlanError(f"no {what} matches {pattern!r}.{_pattern_hint(pattern, known)}")
        chosen |= found
    return [name for name in known if name in chosen]


def _pattern_hint(pattern: str, known: Sequence[str]) -> str:
    """A part of names as the expression that means them; else names that are near."""
    within = [name for name in known if pattern and pattern in name]
    if not within:
        return hint(pattern, known)
    more = f" and {len(within) - NAMED} more" if len(within) > NAMED else ""
    return f" Did you mean 're:.*{re.escape(pattern)}.*': {', '.join(within[:NAMED])}{more}?"
