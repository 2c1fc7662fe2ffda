"""The difference of two plans as text: sites added (`+`), removed (`-`) and changed (`~`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fxopt.ir.changes import PlanDiff
from fxopt.ir.errors import RowResult
from fxopt.ir.plan import Decision
from fxopt.ir.units import format_value

from .entries import reasons_of
from .fold import fold_keys, groups, merge_sentences, sentence_shape
from .joint import SHOWN, family_of, joined_diff, parts_of
from .page import Page, has_colours, width
from .rows import table

Pair = tuple[Decision, Decision]


def render(diff: PlanDiff, *, colours: bool | None = None, columns: int | None = None) -> str:
    """The difference as `print` shows it; colours and width of the terminal unless given."""
    page, diff = Page(columns or width()), joined_diff(diff)
    for name, before, after in diff.facts:
        page.add(f"{name}: {before} -> {after}")
    for family in SHOWN:
        _family(page, diff, family)
    if diff.totals:
        page.verbatim(_totals(diff.totals))
        page.add()
    counts = len(diff.changed), len(diff.added), len(diff.removed)
    same = "" if diff else " (the plans decide the same)"
    page.add("Diff: {} changed, {} added, {} removed".format(*counts) + same, "bold")
    return page.render(has_colours() if colours is None else colours)


def _family(page: Page, diff: PlanDiff, family: str) -> None:
    changed = [pair for pair in diff.changed if family_of(pair[1]) == family]
    alone = [("+", d) for d in diff.added if family_of(d) == family]
    alone += [("-", d) for d in diff.removed if family_of(d) == family]
    if not changed and not alone:
        return
    page.add(family, "bold")
    for equal in groups(changed, _shown_together):
        _changed(page, equal)
    for symbol, equal in (
        (group[0][0], [d for _, d in group])
        for group in groups(alone, lambda a: (a[0], a[1].choice))
    ):
        for name in fold_keys(decision.key for decision in equal):
            page.marked(symbol, f"{name}  {equal[0].choice}")
    page.add()


def _shown_together(pair: Pair) -> Hashable:
    return (*(_full(decision) for decision in pair), *map(sentence_shape, reasons_of(pair[1])))


def _changed(page: Page, equal: Sequence[Pair]) -> None:
    for name in fold_keys(after.key for _, after in equal):
        page.marked("~", f"{name}  {_full(equal[0][0])} -> {_full(equal[0][1])}")
    for texts in zip(*(reasons_of(after) for _, after in equal), strict=True):
        page.add(merge_sentences(texts), indent=8)


def _full(decision: Decision) -> str:
    """The choice with everything that can differ: version, parameters, kernel, lock."""
    parts = parts_of(decision)
    rewritten = [part for part in parts if part.rewritten] or parts[:1]
    locked = [part for part in parts if part.locked]
    text = " + ".join(map(_alone, rewritten))
    if len(locked) == len(parts):
        return f"{text}, locked"
    return text + "".join(f", {part.family} locked" for part in locked)


def _alone(decision: Decision) -> str:
    details = {**decision.parameters, **{f"kernel.{k}": v for k, v in decision.kernel.items()}}
    text = ", ".join(f"{name}={value}" for name, value in details.items())
    version = f" v{decision.version}" if decision.version != 1 else ""
    return f"{decision.choice}{version}" + (f" ({text})" if text else "")


def _totals(rows: Sequence[tuple[RowResult | None, RowResult | None]]) -> str:
    lines: list[list[str]] = []
    for before, after in rows:
        known = after or before
        assert known is not None
        line = [known.name]
        for name in ("limit", "predicted", "measured"):
            texts = [format_value(getattr(r, name, None), known.unit) for r in (before, after)]
            line.append(texts[0] if texts[0] == texts[1] else f"{texts[0]} -> {texts[1]}")
        lines.append([*line, ""])
    return table(["", "limit", "predicted", "measured", ""], lines)
