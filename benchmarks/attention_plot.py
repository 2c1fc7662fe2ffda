"""Curves of `attention_quality.py` as a drawing: FLOPs across, KL up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from training_plot import BOTTOM, COLOURS, HEAD, HEIGHT, LEFT, RIGHT, TOP, WIDTH, entry, scale

BASE, END = HEIGHT - BOTTOM, WIDTH - RIGHT


class Line(NamedTuple):
    """(FLOPs as a share of dense attention's, KL) of one mask, from few FLOPs to many: of one size
    in all heads, or solved head by head."""

    mask: str
    solved: bool
    points: Sequence[tuple[float, float]]


def svg(lines: Sequence[Line], length: int) -> str:
    """A page of its own: a colour a mask; dashed with rings one size in all heads, solid with
    dots as solved. KL is logarithmic."""
    across = scale([0.0, 1.0], LEFT, END)
    errors = [kl for line in lines for _, kl in line.points if kl > 0]
    low, high = (math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors))))
    level = scale([low, high], BASE, TOP)

    def up(kl: float) -> float:
        return level(max(math.log10(max(kl, 1e-300)), low))

    parts = _axes(across, up, range(low, high + 1), length)
    names = list(dict.fromkeys(line.mask for line in lines))
    for line in lines:
        parts += _line(line, COLOURS[names.index(line.mask) % len(COLOURS)], across, up)
    for i, name in enumerate(names):
        said = name.removeprefix("attention.")
        parts += entry(said, COLOURS[i % len(COLOURS)], TOP + 20 * i)
    x, y = END + 8, TOP + 20 * len(names) + 8
    for dashes, said in (("", "solved head by head"), ("5 4", "one size in all heads")):
        parts.append(
            f'<path class="axis" stroke-dasharray="{dashes}" d="M{x} {y}H{x + 16}"/>'
            f'<text x="{x + 20}" y="{y + 4}">{said}</text>'
        )
        y += 20
    return "\n".join([HEAD, *parts, "</svg>\n"])


def _line(
    line: Line, colour: str, across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    path = "L".join(f"{across(share):.1f} {up(kl):.1f}" for share, kl in line.points)
    dashes, fill = ("", colour) if line.solved else ("5 4", "none")
    parts = [f'<path class="line" stroke="{colour}" stroke-dasharray="{dashes}" d="M{path}"/>']
    how = "solved" if line.solved else "in all heads"
    for share, kl in line.points:
        title = escape(f"{line.mask}, {how}: {share:.1%} of the FLOPs, {kl:.2g} nats")
        parts.append(
            f'<circle cx="{across(share):.1f}" cy="{up(kl):.1f}" r="4" stroke="{colour}"'
            f' fill="{fill}"><title>{title}</title></circle>'
        )
    return parts


def _axes(
    across: Callable[[float], float], up: Callable[[float], float], powers: range, length: int
) -> list[str]:
    parts = [
        f'<path class="axis" d="M{LEFT} {TOP}V{BASE}H{END}"/>',
        f'<text x="{LEFT}" y="{TOP - 18}">KL on held-out text, nats a byte</text>',
        f'<text x="{(LEFT + END) // 2}" y="{HEIGHT - 8}" class="mid">'
        f"FLOPs of attention at {length:,} bytes, as a share of dense</text>",
    ]
    for power in powers:
        y = up(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{END}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{10.0**power:g}</text>')
    for tenth in range(0, 11, 2):
        x = across(tenth / 10)
        parts.append(f'<text x="{x:.1f}" y="{BASE + 18}" class="mid">{tenth / 10:g}</text>')
    return parts
