"""A plan as compact JSON for its page: columns, every text once, equal alternatives folded."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from fxopt.ir.evidence import Block, Generated
from fxopt.ir.plan import KEEP, Alternative, Decision, Plan

from .costs import together
from .entries import Entry
from .fold import QUANTITY, sentence_shape
from .kernels import kernels_at, text_of

Json = dict[str, Any]
DIGITS = 6


class Encoder:
    """Collects what sites share. `encoded` is the object that web/data.js decodes; errors are
    stated as those of `plan`."""

    def __init__(self, calls: Sequence[str] = (), plan: Plan | None = None) -> None:
        self._calls, self._plan = list(calls), plan
        self._texts: dict[Hashable, int] = {}
        self._options: dict[Hashable, int] = {}
        self._lists: dict[Hashable, int] = {}
        self._sites: list[list[Any]] = []
        self._kernels: dict[str, int] = {}

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._sites.append(self._site(entry))

    def encoded(self) -> Json:
        return {
            "texts": list(self._texts),
            "options": list(self._options),
            "alternatives": list(self._lists),
            "sites": [list(column) for column in zip(*self._sites, strict=True)],
            "kernels": self._kernels,
        }

    def text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def blocks(self, blocks: Iterable[Block]) -> list[Json]:
        """Their lines, and the kernels at each rewritten site, whose texts are kept once."""
        return [
            {
                "modules": block.modules,
                "lines": [self.text(line) for line in block.lines],
                "inputs": block.inputs,
                "kernels": self._kernels_at(block),
            }
            for block in blocks
        ]

    def _kernels_at(self, block: Block) -> dict[str, list[str]]:
        found = kernels_at(block)
        for folder in (name for folders in found.values() for name in folders):
            self._kernels[folder] = self.text(text_of(folder))
        return found

    def sources(self, sources: Iterable[Generated]) -> Json:
        """The text of the class at each module."""
        return {m: self.text(source.text) for source in sources for m in source.modules}

    def _site(self, entry: Entry) -> list[Any]:
        """Mark, family, key, reasons, option, error, option as it was, alternatives, flags."""
        decision = entry.decision
        head: list[Any] = [entry.mark, entry.family, self.text(entry.key)]
        head.append([self.text(reason) for reason in entry.reasons])
        if decision is None:
            return [*head, -1, None, -1, -1, 0]
        kept = _kept(decision)
        return [
            *head,
            self._option(decision),
            self._error(decision),
            -1 if kept is None else self._option(kept),
            self._alternatives(decision),
            _flags(decision.locked, decision.error_measured),
        ]

    def _error(self, one: Decision | Alternative) -> Any:
        return None if one.error is None else rounded(together([one.error], self._plan))

    def _option(self, choice: Decision | Alternative) -> int:
        cost, calls = choice.cost, choice.calls or {}
        kernel: dict[str, Any] = getattr(choice, "kernel", {})
        key = (
            self.text(choice.rewrite),
            self.text(choice.label),
            self.text(_listed(choice.parameters)),
            self.text(_listed(kernel)),
            *map(
                rounded, (cost.seconds, cost.weight_bytes, cost.state_bytes, cost.temporary_bytes)
            ),
            tuple(rounded(calls[name]) for name in self._calls if name in calls),
            sum(1 << n for n, name in enumerate(self._calls) if name in choice.timed),
        )
        return self._options.setdefault(key, len(self._options))

    def _alternatives(self, decision: Decision) -> int:
        flat: list[Any] = []
        for other in decision.alternatives:
            quantities = "|".join(QUANTITY.findall(other.reason))
            flat += [
                self._option(other),
                self._error(other),
                self.text(sentence_shape(other.reason)),
                self.text(quantities),
                _flags(other.feasible, other.error_measured),
            ]
        return self._lists.setdefault(tuple(flat), len(self._lists)) if flat else -1


def _kept(decision: Decision) -> Decision | Alternative | None:
    """The site as it was, where the plan knows."""
    if not decision.rewritten:
        return decision
    return next((other for other in decision.alternatives if other.rewrite == KEEP), None)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _flags(first: bool, measured: bool | None) -> int:
    """Bit 0: locked, or feasible; bit 1: it is known how the error is; bit 2: it was measured."""
    return int(first) | 2 * (measured is not None) | 4 * (measured is True)


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
