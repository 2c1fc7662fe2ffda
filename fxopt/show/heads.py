"""What became of each head of each attention, as a map of layers by KV heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fxopt.ir.decision import KeptMass
from fxopt.ir.errors import PlanError
from fxopt.ir.plan import Decision, Plan

from .joint import decided, parts_of

COLOURS = 4
"""Rewrites that have a colour of their own; heads that are kept have none."""
WIDTH, HEIGHT, LETTER = 104, 18, 7
"""Pixels of a cell, and of a letter of a name."""
LEAST_SHADE, LEAST_MASS = 0.25, 0.5
"""The palest shade, and the kept mass from which on down it is that."""
BY_MASS = "the paler, the less of its attention falls on the keys that it still sees"
"""Of heads without a percentage, of which that is not known, by time."""
BY_TIME = "the paler, the less of its time it still takes"
TOP, MARGIN = 62, 12
"""Pixels above the map in a drawing of its own, and around it."""


@dataclass(frozen=True)
class Cell:
    """`kind` numbers the rewrite from 1, 0 where the head is kept; `shade` is of the kept mass of
    the head, or the part of its time that it still takes; `text` is what stands in the cell."""

    x: int
    y: int
    kind: int
    label: str
    text: str
    title: str
    shade: float


@dataclass(frozen=True)
class HeadMap:
    """`names` of attentions with where their row is; `counts` of heads by what they became;
    `shades` says what the shade of a cell means."""

    left: int
    width: int
    height: int
    names: list[tuple[str, int]]
    cells: list[Cell]
    counts: list[tuple[int, str, int]]
    shades: str
    cell_width: int = WIDTH - 2

    @property
    def said(self) -> str:
        """The map in a sentence."""
        return "Heads: " + ", ".join(f"{count} {label}" for _, label, count in self.counts)


def head_map(plan: Plan) -> HeadMap | None:
    """None where no attention head is rewritten."""
    heads = _heads(plan)
    attentions = [attention for _, attention in heads]
    rewrites = list(dict.fromkeys(a.rewrite for a in attentions if a.rewritten))
    if not rewrites:
        return None
    rows = list(dict.fromkeys(_parts(d)[0] for d, _ in heads))
    columns = sorted({_parts(d)[1] for d, _ in heads}, key=lambda head: (len(head), head))
    left = LETTER * max(map(len, rows)) + 8
    by_mass = any(a.kept_mass for a in attentions)
    cells = [
        Cell(
            x=left + WIDTH * columns.index(_parts(head)[1]),
            y=HEIGHT * rows.index(_parts(head)[0]),
            kind=1 + rewrites.index(attention.rewrite) % COLOURS if attention.rewritten else 0,
            label=_label(attention),
            text=_label(attention) + (f" {mass.mean:.0%}" if (mass := attention.kept_mass) else ""),
            title=_title(head, attention),
            shade=round(_of_mass(head, attention) if by_mass else _of_time(head, attention), 2),
        )
        for head, attention in heads
    ]
    counts = Counter((cell.kind, cell.label) for cell in cells)
    return HeadMap(
        left=left,
        width=max(cell.x for cell in cells) + WIDTH,
        height=HEIGHT * len(rows),
        names=[(name, HEIGHT * place) for place, name in enumerate(rows)],
        cells=cells,
        counts=[(kind, label, count) for (kind, label), count in sorted(counts.items())],
        shades=BY_MASS if by_mass else BY_TIME,
    )


def roles(plan: Plan) -> str:
    """Which heads are local, which retrieve and which are dense, with what masks keep of their
    attention; "" where no kept mass is known."""
    local: list[float] = []
    retrieving: list[float] = []
    dense: list[float] = []
    others = 0
    for _, head in _heads(plan):
        if head.kept_mass is not None:
            (local if head.kept_mass.near else retrieving).append(head.kept_mass.mean)
        elif not head.rewritten and (masses := _offered(head)):
            dense.append(max(mass.mean for mass in masses))
        elif head.rewritten and head.error:
            others += 1
    said = [
        f"{len(masses)} {name} ({_span(masses)} of their attention kept)"
        for name, masses in (("local", local), ("retrieving", retrieving))
        if masses
    ]
    if dense:
        said.append(f"{len(dense)} dense (masks would keep {_span(dense)} at most)")
    if said and others:
        said.append(f"{others} by other means")
    return f"Heads by what they attend to: {', '.join(said)}." if said else ""


def svg(plan: Plan) -> str:
    """The map as a page of its own; PlanError where no head of the plan is rewritten."""
    found = head_map(plan)
    if found is None:
        raise PlanError(
            "the plan rewrites no attention head, so that there is no map of them (packing the "
            "cache of a head leaves its attention as it is)"
        )
    width = max(found.width, LETTER * max(len(found.shades), len(roles(plan)))) + 2 * MARGIN
    parts = [f'<text x="{MARGIN}" y="18">{escape(roles(plan) or found.said)}</text>']
    across = MARGIN
    for kind, label, count in found.counts:
        said = f"{count} {label}"
        parts.append(f'<rect class="k{kind}" x="{across}" y="28" width="12" height="12" rx="2"/>')
        parts.append(f'<text x="{across + 17}" y="38">{escape(said)}</text>')
        across += 17 + LETTER * len(said) + 18
    parts.append(f'<text x="{MARGIN}" y="56" class="muted">{escape(found.shades)}</text>')
    parts.append(f'<g transform="translate({MARGIN} {TOP})">')
    for name, y in found.names:
        parts.append(f'<text class="name" x="{found.left - 8}" y="{y + 13}">{escape(name)}</text>')
    for cell in found.cells:
        parts.append(
            f"<g><title>{escape(cell.title)}</title>"
            f'<rect class="k{cell.kind}" x="{cell.x + 1}" y="{cell.y + 1}" rx="2"'
            f' width="{WIDTH - 2}" height="{HEIGHT - 2}" fill-opacity="{cell.shade}"/>'
            f'<text class="mid" x="{cell.x + WIDTH // 2}" y="{cell.y + 13}">{escape(cell.text)}'
            "</text></g>"
        )
    height = TOP + found.height + MARGIN
    return "\n".join([_HEAD.format(width=width, height=height), *parts, "</g>\n</svg>\n"])


def _heads(plan: Plan) -> list[tuple[Decision, Decision]]:
    """Every KV head, with its cache where it has one, and its attention alone."""
    # Keys of a plan from elsewhere are any text.
    return [
        (decision, part)
        for decision in decided(plan)
        for part in parts_of(decision)
        if part.family == "attention" and _parts(decision)[1].isdecimal()
    ]


def _label(attention: Decision) -> str:
    return (attention.label or attention.rewrite) if attention.rewritten else "kept"


def _title(head: Decision, attention: Decision) -> str:
    """What the head became, and of its attention what is kept, or would be by other masks."""
    said = [f"{head.key}: {head.choice}"]
    if attention.kept_mass is not None:
        said.append(f"keeps {attention.kept_mass} of its attention")
    others = [f"{a.label} {a.kept_mass}" for a in attention.alternatives if a.kept_mass is not None]
    if others:
        said.append(f"other masks: {', '.join(others)}")
    return "; ".join(said)


def _of_mass(head: Decision, attention: Decision) -> float:
    """By time where keys are hidden and no mass is known; what changes nothing keeps all."""
    if attention.kept_mass is None and attention.rewritten and attention.error:
        return _of_time(head, attention)
    mass = 1.0 if attention.kept_mass is None else attention.kept_mass.mean
    part = (mass - LEAST_MASS) / (1 - LEAST_MASS)
    return LEAST_SHADE + (1 - LEAST_SHADE) * max(part, 0.0)


def _of_time(head: Decision, attention: Decision) -> float:
    kept = head.kept
    if not attention.rewritten or kept is None or kept.seconds <= 0:
        return 1.0
    return min(1.0, max(LEAST_SHADE, head.cost.seconds / kept.seconds))


def _offered(head: Decision) -> list[KeptMass]:
    return [other.kept_mass for other in head.alternatives if other.kept_mass is not None]


def _span(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _parts(decision: Decision) -> tuple[str, str]:
    """The attention's name and the number of its KV head."""
    name, _, head = decision.key.rpartition("/kv=")
    return name, head


_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
 font-family="ui-monospace, monospace" font-size="11">
<style>
 svg {{ color: #1c2733; background: #ffffff; }}
 text {{ fill: currentColor; }} .name {{ text-anchor: end; }} .mid {{ text-anchor: middle; }}
 .muted {{ opacity: .7; }}
 .k0 {{ fill: #c3cad2; }} .k1 {{ fill: #7fb0e6; }} .k2 {{ fill: #86c795; }}
 .k3 {{ fill: #e89c8a; }} .k4 {{ fill: #bf9ddd; }}
 @media (prefers-color-scheme: dark) {{
  svg {{ color: #e6edf3; background: #11161c; }}
  .k0 {{ fill: #4a545f; }} .k1 {{ fill: #2f5f96; }} .k2 {{ fill: #2f6b3d; }}
  .k3 {{ fill: #8f4030; }} .k4 {{ fill: #66458a; }}
 }}
</style>"""
