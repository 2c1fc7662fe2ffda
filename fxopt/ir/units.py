"""Quantities as people write them: "12ms", "8GiB", "40%", "0.7x", and back again."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
BYTES = {
    "b": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)},
}
# The units that measured values are shown in, largest first.
SHOWN: dict[str, list[tuple[str, float]]] = {
    "s": [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)],
    "bytes": [(f"{p}iB", 1024.0**i) for i, p in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))]
    + [("B", 1.0)],
}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Limit:
    """The most that a row may measure: `value` in `unit`, or a ratio of the model as handed over.

    `unit` is "s", "bytes", "nats" or "" and names what the row is measured in either way;
    `text` is how the user wrote the limit.
    """

    value: float
    relative: bool
    unit: str
    text: str

    def absolute(self, baseline: float) -> float:
        """The limit in `unit`, given what the original model measures."""
        return self.value * baseline if self.relative else self.value


def parse_seconds(value: object) -> Limit:
    """A latency: a number of seconds, "12ms", or "0.7x" of the original's."""
    number, unit = _split(value)
    if unit == "x":
        return Limit(number, True, "s", f"{number:g}x")
    if unit == "%":
        raise ValueError(f"a share of the original's latency is written '{number / 100:g}x'")
    if not unit and isinstance(value, str):
        raise ValueError(f"has no unit: write '{number:g}x', '{number:g}ms' or '{number:g}s'")
    if unit and unit not in SECONDS:
        raise ValueError(f"{unit!r} is not a unit of time (ns, us, ms, s)")
    return Limit(number * SECONDS[unit or "s"], False, "s", _text(value, f"{number:g} s"))


def parse_bytes(value: object) -> Limit:
    """A size: a number of bytes, "8GiB", "500MB", or "40%" of the original's."""
    number, unit = _split(value)
    if unit == "%":
        return Limit(number / 100, True, "bytes", f"{number:g}%")
    if unit == "x":
        raise ValueError(f"a share of the original's size is written '{number * 100:g}%'")
    if not unit and isinstance(value, str):
        share = number * 100 if 0 < number <= 1 else number
        raise ValueError(f"has no unit: write '{share:g}%' or '{number:g}B'")
    if unit and unit.lower() not in BYTES:
        raise ValueError(f"{unit!r} is not a unit of size (KB, MB, GB, KiB, MiB, GiB)")
    size = number * BYTES[unit.lower() or "b"]
    if 0 < size < 1:
        raise ValueError(f"less than one byte; a share of the original is '{number * 100:g}%'")
    return Limit(size, False, "bytes", _text(value, format_value(size, "bytes")))


def parse_number(value: object, unit: str) -> Limit:
    """A plain number, as quality rows take."""
    number, suffix = _split(value)
    if suffix:
        raise ValueError(f"takes a plain number, without {suffix!r}")
    return Limit(number, False, unit, f"{number:g}")


def _split(value: object) -> tuple[float, str]:
    """The number and the unit ("" for none) of what the user wrote."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"takes a number or a text, not {type(value).__name__}")
    if not isinstance(value, str):
        return float(value), ""
    found = _NUMBER.fullmatch(value)
    if found is None:
        raise ValueError("is not a number with a unit")
    return float(found[1]), found[2]


def _text(value: object, otherwise: str) -> str:
    return value.strip() if isinstance(value, str) else otherwise


def so_many(count: int, noun: str) -> str:
    """A count of what has a regular plural: "1 site", "2 sites"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_value(value: float | None, unit: str) -> str:
    """A measured quantity for people: three digits, in the unit that suits its size."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "inf" if value > 0 else "nan" if math.isnan(value) else "-inf"
    if unit == "s" and value == 0:
        return "0 s"
    if unit in SHOWN:
        return _scaled(value, SHOWN[unit])
    return f"{value:.3g} {unit}".strip()


def _scaled(value: float, units: list[tuple[str, float]]) -> str:
    # by what is shown: 999.9 µs is 1 ms, not 1000 µs
    unit, factor = next((u for u in units if abs(value) >= 0.9995 * u[1]), units[-1])
    number = value / factor
    digits = f"{number:.0f}" if abs(number) >= 100 or number == 0 else f"{number:.3g}"
    return f"{digits} {unit}"
