"""Lines of `finetune.py` as a drawing: losses over the steps, and how far they are from exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from training_plot import BOTTOM, COLOURS, HEAD, HEIGHT, LEFT, RIGHT, TOP, WIDTH, entry, scale

WINDOW = 25
"""Steps of a running mean: a batch is easier or harder than the next."""
BORDER, GAP = 250, 44
"""Where the upper panel ends, and what lies between both."""

Line = dict[str, Any]
Curves = NDArray[np.float64]
"""[seeds, steps]"""


def svg(lines: Sequence[Line]) -> str:
    """A page of its own. Above, means over the seeds and all that lies between these; below, the
    same of what plans differ from exact under the same seed, beside what seeds differ from their
    mean (grey). ValueError where a plan has other seeds than exact has, or other numbers of steps.
    """
    names = list(dict.fromkeys(line["plan"] for line in lines))
    curves = {name: smoothed(lines, name) for name in names}
    if len({each.shape for each in curves.values()}) != 1 or "exact" not in curves:
        shapes = {name: each.shape for name, each in curves.items()}
        raise ValueError(f"every plan needs the seeds and steps of exact, these have {shapes}")
    exact = curves["exact"]
    off = {name: each - exact for name, each in curves.items() if name != "exact"}
    across = scale([WINDOW, WINDOW + exact.shape[1] - 1], LEFT, WIDTH - RIGHT)
    colours: dict[str, str] = dict(zip(names, COLOURS, strict=False))
    parts = panel(curves, colours, across, TOP, BORDER, "nats a byte, training")
    noise = {"seeds": exact - exact.mean(0)}
    title = "less that of exact under the same seed; grey: of exact, seeds less their mean"
    parts += panel(noise | off, colours, across, BORDER + GAP, HEIGHT - BOTTOM, title)
    for i, name in enumerate(names):
        ends = [line["heldout"][1] for line in lines if line["plan"] == name]
        parts += entry(f"{name}: {np.mean(ends):.3f}", colours[name], TOP + 20 * i)
    x, y = WIDTH - RIGHT + 28, TOP + 20 * len(names) + 4
    parts.append(f'<text x="{x}" y="{y}">(held out, at the end)</text>')
    steps = f"step, running mean of {WINDOW}; {len(exact)} seeds"
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" class="mid">{steps}</text>')
    for step in ticks(WINDOW, WINDOW + exact.shape[1] - 1):
        said = f'y="{HEIGHT - BOTTOM + 18}" class="mid">{step:g}</text>'
        parts.append(f'<text x="{across(step):.1f}" {said}')
    return "\n".join([HEAD, *parts, "</svg>\n"])


def smoothed(lines: Sequence[Line], name: str) -> Curves:
    """Running means of a plan's losses, by seed. ValueError where they are too few for a curve."""
    own = sorted((line for line in lines if line["plan"] == name), key=lambda line: line["seed"])
    fewest = min(len(line["losses"]) for line in own)
    if fewest <= WINDOW:
        raise ValueError(f"{name} has {fewest} steps: a running mean of {WINDOW} needs more")
    kernel = np.full(WINDOW, 1 / WINDOW)
    return np.array([np.convolve(line["losses"], kernel, "valid") for line in own])


def panel(
    curves: dict[str, Curves],
    colours: dict[str, str],
    across: Callable[[float], float],
    top: int,
    base: int,
    title: str,
) -> list[str]:
    """Axes, and of each name the mean and what lies between the least and the most."""
    low = min(float(each.min()) for each in curves.values())
    high = max(float(each.max()) for each in curves.values())
    up = scale([low, high], base, top)
    end = WIDTH - RIGHT
    parts = [
        f'<path class="axis" d="M{LEFT} {top}V{base}H{end}"/>',
        f'<text x="{LEFT}" y="{top - 10}">{escape(title)}</text>',
    ]
    for value in ticks(low, high):
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{end}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{value:g}</text>')
    for name, each in curves.items():
        colour = colours.get(name, "currentColor")
        x = [across(WINDOW + i) for i in range(each.shape[1])]
        most, least, mean = ([up(v) for v in f(0)] for f in (each.max, each.min, each.mean))
        outline = [*zip(x, most, strict=True), *zip(x[::-1], least[::-1], strict=True)]
        parts.append(f'<path fill="{colour}" fill-opacity=".13" d="{path(outline)}Z"/>')
        if name in colours:
            drawn = path([*zip(x, mean, strict=True)])
            # what lies under another line is seen at both sides of it
            wide = ' style="stroke-width: 4; stroke-opacity: .5"' if name == "exact" else ""
            parts.append(
                f'<path class="line" stroke="{colour}"{wide} d="{drawn}">'
                f"<title>{escape(name)}</title></path>"
            )
    return parts


def path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between both."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]
