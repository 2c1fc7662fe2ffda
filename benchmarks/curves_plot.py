"""Curves of plans as a drawing: what they take across, what they err up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from training_plot import BOTTOM, COLOURS, HEAD, HEIGHT, LEFT, RIGHT, TOP, WIDTH, entry, scale

BASE, END = HEIGHT - BOTTOM, WIDTH - RIGHT


class Line(NamedTuple):
    """(share of what the model takes as it is, error) of plans by one `name`, from small shares to
    large: the same at all sites, or solved site by site."""

    name: str
    solved: bool
    points: Sequence[tuple[float, float]]


class Words(NamedTuple):
    """What a drawing says: `up` and `across` of the axes; `solved` and `uniform` of the lines; and
    of a point, from its share and its error."""

    up: str
    across: str
    solved: str
    uniform: str
    point: str


def svg(lines: Sequence[Line], words: Words) -> str:
    """A page of its own: a colour a name; dashed with rings the same at all sites, solid with
    dots as solved. Errors are logarithmic; those that are none lie on the axis."""
    across = scale([0.0, 1.0], LEFT, END)
    errors = [error for line in lines for _, error in line.points if error > 0]
    low, high = (math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors))))
    level = scale([low, high], BASE, TOP)

    def up(error: float) -> float:
        return level(max(math.log10(max(error, 1e-300)), low))

    parts = _axes(across, up, range(low, high + 1), words)
    names = list(dict.fromkeys(line.name for line in lines))
    for line in lines:
        parts += _line(line, words, COLOURS[names.index(line.name) % len(COLOURS)], across, up)
    for i, name in enumerate(names):
        parts += entry(name.rpartition(".")[2], COLOURS[i % len(COLOURS)], TOP + 20 * i)
    x, y = END + 8, TOP + 20 * len(names) + 8
    for dashes, said in (("", words.solved), ("5 4", words.uniform)):
        parts.append(
            f'<path class="axis" stroke-dasharray="{dashes}" d="M{x} {y}H{x + 16}"/>'
            f'<text x="{x + 20}" y="{y + 4}">{said}</text>'
        )
        y += 20
    return "\n".join([HEAD, *parts, "</svg>\n"])


def _line(
    line: Line,
    words: Words,
    colour: str,
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> list[str]:
    path = "L".join(f"{across(share):.1f} {up(error):.1f}" for share, error in line.points)
    dashes, fill = ("", colour) if line.solved else ("5 4", "none")
    parts = [f'<path class="line" stroke="{colour}" stroke-dasharray="{dashes}" d="M{path}"/>']
    how = words.solved if line.solved else words.uniform
    for share, error in line.points:
        title = escape(f"{line.name}, {how}: {words.point.format(share, error)}")
        parts.append(
            f'<circle cx="{across(share):.1f}" cy="{up(error):.1f}" r="4" stroke="{colour}"'
            f' fill="{fill}"><title>{title}</title></circle>'
        )
    return parts


def _axes(
    across: Callable[[float], float], up: Callable[[float], float], powers: range, words: Words
) -> list[str]:
    parts = [
        f'<path class="axis" d="M{LEFT} {TOP}V{BASE}H{END}"/>',
        f'<text x="{LEFT}" y="{TOP - 18}">{escape(words.up)}</text>',
        f'<text x="{(LEFT + END) // 2}" y="{HEIGHT - 8}" class="mid">{escape(words.across)}</text>',
    ]
    for power in powers:
        y = up(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{END}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{10.0**power:g}</text>')
    for tenth in range(0, 11, 2):
        x = across(tenth / 10)
        parts.append(f'<text x="{x:.1f}" y="{BASE + 18}" class="mid">{tenth / 10:g}</text>')
    return parts
