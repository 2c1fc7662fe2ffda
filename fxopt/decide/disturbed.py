"""Whether timings were left alone: what else runs on a machine makes equal calls differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.units import format_value

LARGE = 1.5
"""From this ratio of the upper to the lower quartile of equal calls on, it is said."""
OFTEN = 0.25
"""The share of op calls that vary so, or were not timed, from which on it is said."""
SAID = "latency: timings were disturbed, as by other processes"
"""How the note begins."""


@dataclass(frozen=True)
class Spread:
    """The quartiles of so many runs of one call, in seconds."""

    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        ordered, last = sorted(times), len(times) - 1
        return cls(ordered[last // 4], ordered[last - last // 4], len(times))

    @property
    def ratio(self) -> float:
        return self.high / self.low if self.low else 1.0

    def per(self, count: int) -> Spread:
        """That of one of `count` equal calls that each run consists of."""
        return Spread(self.low / count, self.high / count, self.runs)

    def __str__(self) -> str:
        return f"{format_value(self.low, 's')} to {format_value(self.high, 's')}"


def notes(
    spreads: Mapping[str, tuple[Spread, Spread] | None], varied: int = 0, measured: int = 0
) -> list[str]:
    """One note where timings varied much; none where they did not.

    `spreads` are those of each kind of call, of the original and of the result; so many of the
    `measured` op calls `varied` too (`Measured.disturbed`).
    """
    texts = [
        f"half of {before.runs} runs of {name} took {before} in the original and {after} in the "
        "result"
        for name, (before, after) in ((n, pair) for n, pair in spreads.items() if pair)
        if max(before.ratio, after.ratio) >= LARGE
    ]
    if varied > OFTEN * measured:
        texts.append(f"{varied} of {measured} op calls" + " too" * bool(texts))
    if not texts:
        return []
    return [f"{SAID}: {'; '.join(texts)}; measure again when nothing else runs"]


def untimed(told: int, calls: int) -> list[str]:
    """One note where so many of the op calls had to be told by others that predicted seconds rest
    on them."""
    if told <= OFTEN * calls:
        return []
    return [
        f"latency: there was no time to time {told} of {calls} op calls: predicted seconds are "
        "told by the others, and by the roofline; the next plan of this model times more"
    ]
