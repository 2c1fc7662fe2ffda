"""Memory at every point of a program: a peak is the largest of sums, not a sum of peaks.

Rows of `PEAK_ROWS` are held once a point. A point is the widest moment of one large intermediate,
or of all that lies in none ("rest"): what shrinks one intermediate changes its own point alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..ir.site import Site, TemporaryInfo

PEAK_ROWS = ("memory", "activations")
REST = "rest"

Points = Mapping[str, float]
"""Bytes of temporaries at each point while every site is kept."""


def points(live: Mapping[str, int], sites: Iterable[Site], wanted: Collection[str]) -> Points:
    """The points of a graph, from the bytes alive at each of its nodes by name.

    `wanted` are the keys of the sites that get a point of their own.
    """
    inside = {
        node: site.key
        for site in sites
        if isinstance(site.info, TemporaryInfo) and site.key in wanted
        for node in site.info.nodes
    }
    found: dict[str, float] = {REST: 0.0}
    for node, alive in live.items():
        point = inside.get(node, REST)
        found[point] = max(found.get(point, 0.0), float(alive))
    return found


def shifted(at: Points, by: float) -> Points:
    """All points moved together: what a measured peak differs by from the largest of them."""
    return {point: alive + by for point, alive in at.items()}


def row_at(row: str, point: str) -> str:
    """The solver's name of `row` at one point."""
    return f"{row}@{point}"


def row_of(name: str) -> str:
    """The row that a name of `row_at` belongs to; any other name itself."""
    return name.partition("@")[0]
