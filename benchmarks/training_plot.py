"""Lines of `training_memory.py` as a drawing: seconds a step across, peak memory up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from fxopt.ir.units import format_value

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 64, 190, 40, 52
COLOURS = ("#2f6fb3", "#b3452f", "#3f8f4f", "#8a5ab8", "#b0812a", "#5b6b7b")
NAMES = {
    "fxopt": "fxopt",
    "eager": "eager",
    "compile": "torch.compile, its budgets",
    "aot": "aot_eager, its budgets",
    "checkpoint": "checkpoint each layer",
    "selective": "selective checkpoint",
}

Line = dict[str, Any]


def svg(lines: Sequence[Line]) -> str:
    """A page of its own: one colour a way to train, rings where fxopt's plans said to be.

    ValueError where the lines are of steps of several sizes, or none was measured.
    """
    drawn = [line for line in lines if line.get("peak") and line.get("seconds")]
    sizes = {line["tokens"] for line in drawn}
    if len(sizes) != 1:
        raise ValueError(
            f"one plot is of one size of step, these lines have {sorted(sizes)} tokens"
        )
    eager = next((line["seconds"] for line in drawn if line["run"] == "eager"), None)
    drawn = [beside(line, eager) for line in drawn]
    rings = [point for line in drawn if (point := expected(line))]
    points = [(line["seconds"], line["peak"]) for line in drawn] + rings
    across = scale(
        [0.96 * min(p[0] for p in points), 1.02 * max(p[0] for p in points)], LEFT, WIDTH - RIGHT
    )
    up = scale([0.0, 1.05 * max(p[1] for p in points)], HEIGHT - BOTTOM, TOP)
    parts = [*axes(points, across, up, f"seconds of a step of {sizes.pop():,} tokens")]
    held = drawn[0]["held_by_gradients"]
    y = up(held)
    parts.append(f'<path class="held" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">parameters, gradients</text>')
    names = [name for name in NAMES if any(line["run"] == name for line in drawn)]
    for i, name in enumerate(names):
        own = [line for line in drawn if line["run"] == name]
        parts += series(own, COLOURS[i], across, up)
        parts += entry(NAMES[name], COLOURS[i], TOP + 20 * i)
    if rings:
        parts += [
            f'<circle class="ring" cx="{across(x):.1f}" cy="{up(y):.1f}" r="8"/>' for x, y in rings
        ]
        y = TOP + 20 * len(names)
        parts.append(f'<circle class="ring" cx="{WIDTH - RIGHT + 16}" cy="{y}" r="6"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{y + 4}">predicted</text>')
    return "\n".join([HEAD, *parts, "</svg>\n"])


def beside(line: Line, eager: float | None) -> Line:
    """The line as if eager's steps had taken `eager` seconds in its turns too."""
    if not eager or not line.get("eager"):
        return line
    return {**line, "seconds": line["seconds"] * eager / line["eager"], "eager": eager}


def expected(line: Line) -> tuple[float, float] | None:
    """Seconds and bytes that a plan says of its step."""
    if not line.get("predicted") or line.get("added") is None or not line.get("eager"):
        return None
    return line["eager"] + line["added"], line["predicted"]


def series(lines: Sequence[Line], colour: str, across: Any, up: Any) -> list[str]:
    ordered = sorted(lines, key=lambda line: -line["peak"])
    places = [(across(line["seconds"]), up(line["peak"])) for line in ordered]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line" stroke="{colour}" d="M{path}"/>'] if len(places) > 1 else []
    for (x, y), line in zip(places, ordered, strict=True):
        asked = line.get("memory") or line.get("activations") or line.get("budget")
        said = f"{format_value(line['seconds'], 's')}, {format_value(line['peak'], 'bytes')}"
        said += f", budget {asked}" if asked is not None else ""
        parts.append(
            f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{escape(line['run'])}: {escape(said)}</title></circle>"
        )
    return parts


def entry(name: str, colour: str, y: float) -> list[str]:
    x = WIDTH - RIGHT + 16
    return [
        f'<circle fill="{colour}" cx="{x}" cy="{y}" r="4"/>',
        f'<text x="{x + 12}" y="{y + 4}">{escape(name)}</text>',
    ]


def axes(points: Sequence[tuple[float, float]], across: Any, up: Any, title: str) -> list[str]:
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<path class="axis" d="M{LEFT} {TOP}V{base}H{end}"/>',
        f'<text x="{LEFT}" y="{TOP - 18}">peak memory, parameters and gradients included</text>',
        f'<text x="{(LEFT + end) // 2}" y="{HEIGHT - 8}" class="mid">{escape(title)}</text>',
    ]
    for value in ticks(0.0, max(p[1] for p in points)):
        y, said = up(value), escape(format_value(value, "bytes"))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{end}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{said}</text>')
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    for value in dict.fromkeys((low, (low + high) / 2, high)):
        said = escape(format_value(value, "s"))
        parts.append(f'<text x="{across(value):.1f}" y="{base + 18}" class="mid">{said}</text>')
    return parts


def ticks(low: float, high: float) -> list[float]:
    """At most seven even values from `low` to `high`, a power of two bytes apart."""
    step = 2.0 ** math.ceil(math.log2(max(high - low, 1.0) / 7))
    return [low + step * i for i in range(int((high - low) / step) + 1)]


def scale(values: Sequence[float], first: float, last: float) -> Any:
    low, high = values
    return lambda value: first + (value - low) / ((high - low) or 1.0) * (last - first)


HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"
 font-family="system-ui, sans-serif" font-size="12">
<style>
 svg {{ color: #1c2733; background: #ffffff; }}
 text {{ fill: currentColor; }} .end {{ text-anchor: end; }} .mid {{ text-anchor: middle; }}
 .axis {{ stroke: currentColor; fill: none; }}
 .grid {{ stroke: currentColor; stroke-opacity: .14; fill: none; }}
 .held {{ stroke: currentColor; stroke-dasharray: 5 4; fill: none; }}
 .line {{ fill: none; stroke-width: 1.4; }}
 .ring {{ fill: none; stroke: currentColor; stroke-width: 1.2; }}
 @media (prefers-color-scheme: dark) {{ svg {{ color: #e6edf3; background: #11161c; }} }}
</style>"""
