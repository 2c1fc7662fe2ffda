"""What became of each head of each attention, as a map of layers by KV heads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fxopt.ir.plan import Decision, Plan

from .joint import decided, parts_of

COLOURS = 4
"""Rewrites that have a colour of their own; heads that are kept have none."""
WIDTH, HEIGHT, LETTER = 76, 18, 7
"""Pixels of a cell, and of a letter of a name."""
LEAST_SHADE = 0.25


@dataclass(frozen=True)
class Cell:
    """`kind` numbers the rewrite from 1, 0 where the head is kept; `shade` is the part of its time
    that a head still takes."""

    x: int
    y: int
    kind: int
    label: str
    title: str
    shade: float


@dataclass(frozen=True)
class HeadMap:
    """`names` of attentions with where their row is; `counts` of heads by what they became."""

    left: int
    width: int
    height: int
    names: list[tuple[str, int]]
    cells: list[Cell]
    counts: list[tuple[int, str, int]]

    @property
    def said(self) -> str:
        """The map in a sentence."""
        return "Heads: " + ", ".join(f"{count} {label}" for _, label, count in self.counts)


def head_map(plan: Plan) -> HeadMap | None:
    """None where no attention head is rewritten."""
    # Keys of a plan from elsewhere are any text.
    heads = [d for d in decided(plan) if _attention(d) and _parts(d)[1].isdecimal()]
    attentions = [a for d in heads if (a := _attention(d))]
    rewrites = list(dict.fromkeys(a.rewrite for a in attentions if a.rewritten))
    if not rewrites:
        return None
    rows = list(dict.fromkeys(_parts(d)[0] for d in heads))
    columns = sorted({_parts(d)[1] for d in heads}, key=lambda head: (len(head), head))
    left = LETTER * max(map(len, rows)) + 8
    kinds = [1 + rewrites.index(a.rewrite) % COLOURS if a.rewritten else 0 for a in attentions]
    cells = [
        _cell(head, attention, kind, left, rows, columns)
        for head, attention, kind in zip(heads, attentions, kinds, strict=True)
    ]
    counts = Counter((cell.kind, cell.label) for cell in cells)
    return HeadMap(
        left=left,
        width=max(cell.x for cell in cells) + WIDTH,
        height=HEIGHT * len(rows),
        names=[(name, HEIGHT * place) for place, name in enumerate(rows)],
        cells=cells,
        counts=[(kind, label, count) for (kind, label), count in sorted(counts.items())],
    )


def _cell(
    head: Decision, attention: Decision, kind: int, left: int, rows: list[str], columns: list[str]
) -> Cell:
    """`head` is the attention, with its cache where it has one."""
    name, number = _parts(head)
    kept, shade = head.kept, 1.0
    if attention.rewritten and kept is not None and kept.seconds > 0:
        shade = min(1.0, max(LEAST_SHADE, head.cost.seconds / kept.seconds))
    return Cell(
        x=left + WIDTH * columns.index(number),
        y=HEIGHT * rows.index(name),
        kind=kind,
        label=(attention.label or attention.rewrite) if attention.rewritten else "kept",
        title=f"{head.key}: {head.choice}",
        shade=round(shade, 2),
    )


def _attention(head: Decision) -> Decision | None:
    return next((part for part in parts_of(head) if part.family == "attention"), None)


def _parts(decision: Decision) -> tuple[str, str]:
    """The attention's name and the number of its KV head."""
    name, _, head = decision.key.rpartition("/kv=")
    return name, head
