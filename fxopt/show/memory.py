"""Who holds the memory of a training step, over its ops: a drawing, a table and a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import get_args

from fxopt.ir.decision import KEEP
from fxopt.ir.evidence import Holder, Memory, Policy
from fxopt.ir.units import SHOWN, format_value

NAMES: dict[str, str] = {
    "weights": "parameters and buffers",
    "gradients": "gradients",
    "outputs": "outputs",
    "kept": "kept for the backward",
    "codes": "codes of rounded tensors",
    "offloaded": "on the way to or from the host",
    "again": "made again in the backward",
    "temporary": "temporaries and workspaces",
}
"""Who holds memory, in the order in which they are stacked."""
PATTERNS = {
    "gradients": "M0 3H6",
    "outputs": "M0 0L6 6",
    "codes": "M0 3H6M3 0V6",
    "offloaded": "M3 2V4M2 3H4",
    "again": "M0 6L6 0",
    "temporary": "M3 0V6",
}
"""What is drawn on a tile of six by six, so that colour alone tells nothing apart."""

WIDTH, LEFT, RIGHT, TOP, BASE = 920, 78, 16, 46, 330
LETTER = 6.4
"""Pixels of a letter."""
KEY, ROW = 226, 22
"""Pixels of an entry of the legend, and from one line of it to the next."""


def composition(memory: Memory) -> dict[str, int]:
    """Who holds how much where the predicted peak stands, the weights first."""
    top = peak_point(memory)
    return {"weights": memory.weights} | {
        name: memory.holders[name][top] for name in get_args(Holder) if name in memory.holders
    }


def peak_point(memory: Memory) -> int:
    """The point at which most is predicted to be alive."""
    predicted = memory.predicted
    return max(range(len(predicted)), key=predicted.__getitem__)


def sentence(memory: Memory) -> str:
    """The peak, and who holds it."""
    peak = memory.weights + max(memory.predicted)
    text = f"The peak is {_size(peak)} as predicted"
    if memory.measured is not None:
        text += f" and {_size(memory.weights + max(memory.measured))} as measured"
    if memory.limit is not None:
        text += f", {_size(memory.weights + memory.limit)} are allowed by {memory.limited_by}"
    text += f". It stands at {memory.peak_at}" if memory.peak_at else ""
    parts = [f"{NAMES[name]} {_size(size)}" for name, size in composition(memory).items() if size]
    return f"{text}: {', '.join(parts)}."


def policies(memory: Memory) -> tuple[list[str], list[list[str]]]:
    """What happens to the saved tensors, as a table: its heads, and a line for each policy."""
    heads = ["saved tensors", "number", "their bytes", "wait on the device", "paid"]
    lines = [
        [
            _name(policy),
            str(policy.tensors),
            _size(policy.bytes),
            _size(policy.waiting),
            format_value(policy.seconds, "s") if policy.rewrite != KEEP else "-",
        ]
        for policy in memory.policies
    ]
    if any(policy.host for policy in memory.policies):
        heads.insert(4, "in host memory")
        for line, policy in zip(lines, memory.policies, strict=True):
            line.insert(4, _size(policy.host))
    return heads, lines


def _name(policy: Policy) -> str:
    return "kept" if policy.rewrite == KEEP else f"{policy.rewrite} {policy.label}".strip()


def _size(value: float) -> str:
    return format_value(value, "bytes")


def svg(memory: Memory) -> str:
    """The drawing as a page of its own, for light and dark."""
    return f"{drawing(memory).replace('>', f'>{_alone()}', 1)}\n"


def drawing(memory: Memory) -> str:
    """The drawing, to stand in a page that has its styles; no text of a plan becomes markup."""
    plot = _Plot(memory)
    legend = _legend(memory)
    height = BASE + 62 + ROW * math.ceil(len(legend) / _columns())
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="memory" viewBox="0 0 {WIDTH} {height}" '
        'role="img" aria-labelledby="memory-title memory-said">'
    )
    said = f"Ops in the order of the program, forward then backward. {sentence(memory)}"
    parts = [
        '<title id="memory-title">Bytes alive over a training step</title>',
        f'<desc id="memory-said">{escape(said)}</desc>',
        f"<defs>{''.join(map(_pattern, PATTERNS))}</defs>",
        *plot.axes(),
        *plot.areas(),
        *plot.measured(),
        *plot.marks(),
        *plot.spans(),
        *(_entry(i, *each) for i, each in enumerate(legend)),
    ]
    return "\n".join([head, *parts, "</svg>"])


@dataclass(frozen=True)
class _Plot:
    """Where things stand: points across, bytes upward."""

    memory: Memory

    @property
    def top(self) -> float:
        """The most bytes that have to fit."""
        memory = self.memory
        most = max(*memory.predicted, *(memory.measured or ()), memory.limit or 0)
        return 1.04 * (memory.weights + most) or 1.0

    def x(self, point: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * point / max(len(self.memory.predicted), 1)

    def y(self, size: float) -> float:
        return BASE - (BASE - TOP) * size / self.top

    def areas(self) -> Iterator[str]:
        """One on the other, each with what it is and its most."""
        count = len(self.memory.predicted)
        below = [0] * count
        sizes = {"weights": [self.memory.weights] * count, **self.memory.holders}
        for name in NAMES:
            if not any(sizes.get(name, ())):
                continue
            above = [a + b for a, b in zip(below, sizes[name], strict=True)]
            path = f"M{self.x(0):.1f} {self.y(below[0]):.1f}{self._steps(above)}"
            path += self._steps(below[::-1], back=True)
            title = f"{NAMES[name]}: up to {_size(max(sizes[name]))}"
            yield f'<path {_fill(name)} d="{path}Z"><title>{title}</title></path>'
            below = above

    def measured(self) -> Iterator[str]:
        """The measured curve, on a wider line of the page's colour that parts it from areas."""
        if self.memory.measured is None:
            return
        values = [self.memory.weights + size for size in self.memory.measured]
        path = f"M{self.x(0):.1f} {self.y(values[0]):.1f}{self._steps(values)}"
        yield f'<path class="halo" d="{path}"/><path class="measured" d="{path}"/>'

    def _steps(self, values: Sequence[float], back: bool = False) -> str:
        """Level over each point, and up or down between; from the right to the left if `back`."""
        count, parts, place = len(values), list[str](), ""
        for i, value in enumerate(values):
            level = f"V{self.y(value):.1f}"
            parts += [level] if level != place else []
            place = level
            if i + 1 == count or self.y(values[i + 1]) != self.y(value):
                parts.append(f"H{self.x(count - 1 - i if back else i + 1):.1f}")
        return "".join(parts)

    def axes(self) -> Iterator[str]:
        """Bytes upward, with a line across at round ones."""
        yield f'<path class="axis" d="M{LEFT} {TOP}V{BASE}H{WIDTH - RIGHT}"/>'
        for size in [0.0, *_ticks(self.top)]:
            y = self.y(size)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{_size(size)}</text>'
        yield f'<text x="4" y="{TOP - 28}" class="strong">bytes alive</text>'

    def marks(self) -> Iterator[str]:
        """The limit, the predicted peak, and where the backward begins."""
        memory = self.memory
        border = self.x(memory.border)
        yield f'<path class="border" d="M{border:.1f} {TOP - 12}V{BASE + 22}"/>'
        yield f'<text class="end strong" x="{border - 8:.1f}" y="{TOP - 6}">forward ←</text>'
        yield f'<text class="strong" x="{border + 8:.1f}" y="{TOP - 6}">→ backward</text>'
        peak = memory.weights + max(memory.predicted)
        allowed = None if memory.limit is None else memory.weights + memory.limit
        if allowed is not None:
            yield _across("limit", self.y(allowed))
        yield _across("peak", self.y(peak))

    def spans(self) -> Iterator[str]:
        """The layers below the axis: a tick where each begins, and its name where there is room."""
        ends = [*(span.start for span in self.memory.spans), len(self.memory.predicted)]
        for span, (start, end) in zip(self.memory.spans, pairwise(ends), strict=True):
            left, right = self.x(start), self.x(end)
            name = _short(span.name)
            fits = LETTER * len(name) + 4 <= right - left
            most = max(self.memory.predicted[start:end]) + self.memory.weights
            side = "backward" if start >= self.memory.border else "forward"
            title = f"{span.name or 'the model'}, {side}: up to {_size(most)} predicted"
            if self.memory.measured is not None:
                seen = max(self.memory.measured[start:end]) + self.memory.weights
                title += f", {_size(seen)} measured"
            yield f'<path class="tick" d="M{left:.1f} {BASE}V{BASE + 5}"/>'
            label = f'<text class="mid" x="{(left + right) / 2:.1f}" y="{BASE + 18}">'
            yield (
                f"<g><title>{escape(title)}</title>"
                f'<rect class="hit" x="{left:.1f}" y="{BASE}" width="{right - left:.1f}" '
                'height="24"/>' + (f"{label}{escape(name)}</text>" if fits else "") + "</g>"
            )


def _short(name: str) -> str:
    """The end of a module's name: "h.3" of "transformer.h.3"."""
    *rest, last = name.split(".")
    return f"{rest[-1]}.{last}" if rest and last.isdecimal() else last


def _across(kind: str, y: float) -> str:
    return f'<path class="{kind}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'


def _ticks(top: float) -> list[float]:
    """Round sizes up to `top`, in the unit that suits it."""
    unit = next((size for _, size in SHOWN["bytes"] if top >= size), 1.0)
    rough = top / unit / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough) * unit
    return [step * n for n in range(1, int(top / step) + 1)]


def _legend(memory: Memory) -> list[tuple[str, str]]:
    """What the drawing has: a class and a name each."""
    held = {name for name, values in memory.holders.items() if any(values)}
    held |= {"weights"} if memory.weights else set()
    found = [(name, text) for name, text in NAMES.items() if name in held]
    if memory.measured is not None:
        found.append(("measured", f"measured, at most {_size(_most(memory, memory.measured))}"))
    found.append(("peak", f"predicted peak {_size(_most(memory, memory.predicted))}"))
    if memory.limit is not None:
        allowed = _size(memory.weights + memory.limit)
        found.append(("limit", f"limit {allowed}, by {memory.limited_by}"))
    return found


def _most(memory: Memory, values: Sequence[int]) -> int:
    return memory.weights + max(values)


def _columns() -> int:
    return (WIDTH - LEFT) // KEY + 1


def _entry(index: int, kind: str, text: str) -> str:
    """An entry of the legend: a sample and what it is."""
    row, column = divmod(index, _columns())
    x, y = 14 + KEY * column, BASE + 50 + ROW * row
    if kind in NAMES:
        sample = f'<rect {_fill(kind)} x="{x}" y="{y - 11}" width="20" height="13"/>'
    else:
        sample = f'<path class="{kind}" d="M{x} {y - 4}H{x + 20}"/>'
    return f'{sample}<text x="{x + 27}" y="{y}">{escape(text)}</text>'


def _fill(name: str) -> str:
    """What an area is filled with: its colour, under its pattern if it has one."""
    painted = f' fill="url(#memory-{name})"' if name in PATTERNS else ""
    return f'class="area{"" if name in PATTERNS else f" {name}"}"{painted}'


def _pattern(name: str) -> str:
    return (
        f'<pattern id="memory-{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect class="{name}" width="6" height="6"/><path class="hatch" d="{PATTERNS[name]}"/>'
        "</pattern>"
    )


def style() -> str:
    """The rules of the drawing, which follow the colour scheme of the page that it stands in."""
    return (Path(__file__).parent / "web" / "memory.css").read_text(encoding="utf-8")


def _alone() -> str:
    """The rules for a file of its own: plain colours, and those for dark behind a query, since not
    all that shows an SVG knows `light-dark`."""
    light, dark = (_COLOURS.sub(rf"\{side}", style()) for side in (1, 2))
    return f"<style>\n{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n</style>"


_COLOURS = re.compile(r"light-dark\((#\w+), (#\w+)\)")
