"""Predicted against measured as one drawing: a panel a row, a colour a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

from fxopt.ir.units import format_value

SIDE, LEFT, TOP, GAP, BOTTOM = 220, 64, 64, 76, 48
COLOURS = ("#2f6fb3", "#b3452f", "#3f8f4f", "#8a5fb0")
WITHIN = 0.1
"""The band around the diagonal."""

Plans = Sequence[Mapping[str, Mapping[str, float]]]


def draw(models: Mapping[str, Plans], device: str, rows: Mapping[str, str]) -> str:
    """An SVG page: measured across, predicted up, both logarithmic, and the band within 10 %."""
    shown = {name: plans for name, plans in models.items() if name != "calibration"}
    width = LEFT + len(rows) * (SIDE + GAP)
    height = TOP + SIDE + BOTTOM
    parts = [_head(width, height)]
    across = LEFT
    for number, (name, plans) in enumerate(shown.items()):
        parts.append(f'<circle cx="{across}" cy="18" r="4" fill="{COLOURS[number]}"/>')
        said = f"{name}, {len(plans)} plans"
        parts.append(f'<text x="{across + 9}" y="22">{escape(said)}</text>')
        across += 9 + 7 * len(said) + 24
    parts.append(f'<text x="{width - GAP}" y="22" class="end">{escape(device)}</text>')
    for number, (row, unit) in enumerate(rows.items()):
        parts += _panel(shown, row, unit, LEFT + number * (SIDE + GAP))
    return "\n".join([*parts, "</svg>\n"])


def _panel(models: Mapping[str, Plans], row: str, unit: str, left: float) -> list[str]:
    pairs = [(p["predicted"][row], p["measured"][row]) for plans in models.values() for p in plans]
    low, high = min(map(min, pairs)) / 1.25, max(map(max, pairs)) * 1.25
    place = _logarithmic(low, high)
    base = TOP + SIDE
    off = [abs(p / m - 1) for p, m in pairs]
    said = f"{row}: {statistics.median(off):.1%} median, {max(off):.1%} worst"
    band = SIDE * math.log(1 + WITHIN) / math.log(high / low)
    parts = [f'<text x="{left}" y="{TOP - 12}">{escape(said)}</text>', _band(left, base, band)]
    parts.append(f'<path class="axis" d="M{left} {TOP}V{base}H{left + SIDE}"/>')
    for value in _ticks(low, high):
        x, y = left + place(value), base - place(value)
        label = escape(format_value(value, unit))
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" class="mid">{label}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="end">{label}</text>')
    for number, (name, plans) in enumerate(models.items()):
        for plan in plans:
            guess, found = plan["predicted"][row], plan["measured"][row]
            title = f"{name}: {format_value(guess, unit)} predicted, {format_value(found, unit)}"
            parts.append(
                f'<circle cx="{left + place(found):.1f}" cy="{base - place(guess):.1f}" r="4"'
                f' fill="{COLOURS[number]}" fill-opacity=".6"><title>{escape(title)}</title>'
                "</circle>"
            )
    parts.append(f'<text x="{left + SIDE / 2}" y="{base + 36}" class="mid">measured</text>')
    return parts


def _band(left: float, base: float, band: float) -> str:
    """The diagonal with what is within a tenth of it."""
    right, top = left + SIDE, base - SIDE
    points = [(left, base - band), (right - band, top), (right, top), (right, top + band),
              (left + band, base), (left, base)]  # fmt: skip
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polygon class="band" points="{path}"/>'
        f'<path class="axis" d="M{left} {base}L{right} {top}" stroke-opacity=".5"/>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Two or three round numbers between both."""
    steps = [m * 10.0**e for e in range(-9, 13) for m in (1, 2, 5)]
    inside = [s for s in steps if low <= s <= high] or [math.sqrt(low * high)]
    return inside[:: max(1, math.ceil(len(inside) / 4))]


def _logarithmic(low: float, high: float) -> Callable[[float], float]:
    return lambda value: SIDE * math.log(value / low) / math.log(high / low)


def _head(width: int, height: int) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
 font-family="system-ui, sans-serif" font-size="12">
<style>
 svg {{ color: #1c2733; background: #ffffff; }}
 text {{ fill: currentColor; }} .end {{ text-anchor: end; }} .mid {{ text-anchor: middle; }}
 .axis {{ stroke: currentColor; fill: none; }} .band {{ fill: currentColor; fill-opacity: .1; }}
 @media (prefers-color-scheme: dark) {{ svg {{ color: #e6edf3; background: #11161c; }} }}
</style>"""
