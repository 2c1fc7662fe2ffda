"""A frontier as a table and as a drawing: error against latency, memory by size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Protocol

from fxopt.ir.budget import UNITS
from fxopt.ir.units import format_value

from .rows import table

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 420, 84, 52, 34
RADII = (4.0, 13.0)


class Point(Protocol):
    """What is drawn of a plan; see `fxopt.frontiers.Point`."""

    @property
    def latency(self) -> float: ...
    @property
    def memory(self) -> float: ...
    @property
    def error(self) -> float: ...
    @property
    def measured(self) -> float | None: ...


def text(points: Sequence[Point], quality: str) -> str:
    """One line a plan, fastest first."""
    heads = ["latency", "memory", f"{quality} predicted", "measured"]
    unit = UNITS.get(quality, "")
    lines = [
        [
            format_value(p.latency, "s"),
            format_value(p.memory, "bytes"),
            format_value(p.error, unit),
            format_value(p.measured, unit),
        ]
        for p in points
    ]
    return table(heads, lines)


def svg(points: Sequence[Point], quality: str) -> str:
    """A page of its own: points by latency (across) and error (up, logarithmic), sized by memory;
    rings are measured errors. The model as it is has no error and stands on the axis."""
    errors = [p.error for p in points if p.error > 0]
    low, high = (min(errors), max(errors)) if errors else (1e-6, 1.0)
    across = _linear([p.latency for p in points], LEFT + 18, WIDTH - 30)
    up = _logarithmic(low, high, HEIGHT - BOTTOM, TOP)
    radius = _linear([p.memory for p in points], *RADII)
    parts = [*_axes(points, low, high, across, up, quality)]
    for p in sorted(points, key=lambda p: -p.memory):
        x, y = across(p.latency), up(p.error) if p.error > 0 else HEIGHT - BOTTOM
        said = f"{format_value(p.latency, 's')}, {format_value(p.memory, 'bytes')}, {p.error:.3g}"
        parts.append(
            f'<circle class="plan" cx="{x:.1f}" cy="{y:.1f}" r="{radius(p.memory):.1f}">'
            f"<title>{escape(said)}</title></circle>"
        )
        if p.measured is not None and p.measured > 0:
            y = min(max(up(p.measured), TOP), HEIGHT - BOTTOM)
            parts.append(f'<circle class="measured" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    return "\n".join([_HEAD, *parts, "</svg>\n"])


def _axes(
    points: Sequence[Point],
    low: float,
    high: float,
    across: Callable[[float], float],
    up: Callable[[float], float],
    quality: str,
) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{base}H{WIDTH - 16}"/>']
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        if low / 1.5 <= 10.0**power <= high * 1.5:
            y = up(10.0**power)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - 16}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="end">{10.0**power:g}</text>')
    times = sorted(p.latency for p in points)
    for value in dict.fromkeys((times[0], times[len(times) // 2], times[-1])):
        x = across(value)
        label = format_value(value, "s")
        parts.append(f'<text x="{x:.1f}" y="{base + 18}" class="mid">{escape(label)}</text>')
    sizes = sorted(p.memory for p in points)
    said = f"{format_value(sizes[0], 'bytes')} to {format_value(sizes[-1], 'bytes')}"
    parts += [
        f'<text x="{(LEFT + WIDTH) // 2}" y="{HEIGHT - 10}" class="mid">latency</text>',
        f'<text x="{LEFT}" y="{TOP - 14}">{escape(quality)}; area: weights and KV cache, '
        f"{escape(said)}; rings: measured</text>",
    ]
    return parts


def _linear(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    low, high = min(values), max(values)
    scale = (last - first) / (high - low) if high > low else 0.0
    return lambda value: first + (value - low) * scale


def _logarithmic(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    # a little room, so that the least error does not stand on the axis as the exact model does
    low, high = math.log10(low / 1.5), math.log10(high * 1.5)
    return lambda value: first + (math.log10(value) - low) / (high - low) * (last - first)


_HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 font-family="system-ui, sans-serif" font-size="12">
<style>
 svg {{ color: #1c2733; background: #ffffff; }}
 text {{ fill: currentColor; }} .end {{ text-anchor: end; }} .mid {{ text-anchor: middle; }}
 .axis {{ stroke: currentColor; fill: none; }}
 .grid {{ stroke: currentColor; stroke-opacity: .14; fill: none; }}
 .plan {{ fill: #2f6fb3; fill-opacity: .45; stroke: #2f6fb3; }}
 .measured {{ fill: none; stroke: #b3452f; stroke-width: 1.6; }}
 @media (prefers-color-scheme: dark) {{ svg {{ color: #e6edf3; background: #11161c; }} }}
</style>"""
