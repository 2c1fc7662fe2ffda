"""A plan as compact JSON for its page: columns, every text once, equal alternatives folded."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from fxopt.ir.cost import Cost
from fxopt.ir.evidence import Block, Generated
from fxopt.ir.plan import KEEP, Alternative, Decision

from .entries import Entry

Json = dict[str, Any]
DIGITS = 6


class Encoder:
    """Collects what sites share. `encoded` is the object that web/data.js decodes."""

    def __init__(self) -> None:
        self._texts: dict[Hashable, int] = {}
        self._options: dict[Hashable, int] = {}
        self._lists: dict[Hashable, int] = {}
        self._sites: list[list[Any]] = []

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._sites.append(self._site(entry))

    def encoded(self) -> Json:
        return {
            "texts": list(self._texts),
            "options": list(self._options),
            "alternatives": list(self._lists),
            "sites": [list(column) for column in zip(*self._sites, strict=True)],
        }

    def text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def blocks(self, blocks: Iterable[Block]) -> list[Json]:
        return [
            {
                "modules": block.modules,
                "lines": [self.text(line) for line in block.lines],
                "inputs": block.inputs,
            }
            for block in blocks
        ]

    def sources(self, sources: Iterable[Generated]) -> Json:
        """The text of the class at each module."""
        return {m: self.text(source.text) for source in sources for m in source.modules}

    def _site(self, entry: Entry) -> list[Any]:
        """Mark, family, key, reasons, option, error, option as it was, alternatives."""
        decision = entry.decision
        head: list[Any] = [entry.mark, entry.family, self.text(entry.key)]
        head.append([self.text(reason) for reason in entry.reasons])
        if decision is None:
            return [*head, -1, None, -1, -1, 0]
        kept = decision.kept
        return [
            *head,
            self._option(decision, decision.cost),
            rounded(decision.error),
            -1 if kept is None else self._option(Alternative(rewrite=KEEP), kept),
            self._alternatives(decision),
            int(decision.locked),
        ]

    def _option(self, choice: Decision | Alternative, cost: Cost) -> int:
        details = {**choice.parameters, **getattr(choice, "kernel", {})}
        key = (
            self.text(choice.rewrite),
            self.text(choice.label),
            self.text(", ".join(f"{name}={value}" for name, value in details.items())),
            *map(
                rounded, (cost.seconds, cost.weight_bytes, cost.state_bytes, cost.temporary_bytes)
            ),
        )
        return self._options.setdefault(key, len(self._options))

    def _alternatives(self, decision: Decision) -> int:
        flat: list[Any] = []
        for other in decision.alternatives:
            reason = self.text(_template(other, decision))
            flat += [self._option(other, other.cost), rounded(other.error), reason]
            flat.append(int(other.feasible))
        return self._lists.setdefault(tuple(flat), len(self._lists)) if flat else -1


def _template(other: Alternative, decision: Decision) -> str:
    """The reason with the two errors left out where the page can write them itself."""
    reason = other.reason
    for sign, value in (("\x01", other.error), ("\x02", decision.error)):
        if value is not None and f"{value:.2e}" == f"{float(rounded(value)):.2e}":
            reason = reason.replace(f"{value:.2e}", sign, 1)
    return reason


def rounded(value: float | None) -> Any:
    """A number in few digits; infinities as texts, which JSON has."""
    if value is None or isinstance(value, int):
        return value
    short = float(f"{value:.{DIGITS}g}")
    if short in (float("inf"), float("-inf")) or short != short:
        return str(short)
    return int(short) if short == int(short) and abs(short) < 2**53 else short


def to_script(data: Json) -> str:
    """JSON that may stand inside a script element: no text of it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def columns_of(rows: Sequence[Any], names: Sequence[str]) -> list[Json]:
    """Rows of the budget with rounded numbers."""
    return [{name: _plain(getattr(row, name)) for name in names} for row in rows]


def _plain(value: Any) -> Any:
    return rounded(value) if isinstance(value, int | float) else value
