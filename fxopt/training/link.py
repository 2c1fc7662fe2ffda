"""The link to the host: when each copy runs beside the ops, and what has to be waited for.

One queue each way. Copies out start in the order in which the forward is done with their memory,
and the memory is given up where the copy is expected to have ended. Copies in end in the order in
which the backward needs them, and start as late as that allows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import fx


@dataclass(frozen=True)
class Copies:
    """Nodes before which memory is released, and before which copies in begin, by owner; `wait` is
    the seconds that the step stands still for them."""

    release: dict[fx.Node, fx.Node]
    fetch: dict[fx.Node, fx.Node]
    wait: float


@dataclass(frozen=True)
class Clock:
    """The nodes of each half, the end of the forward being the first node of the backward; their
    numbers; and when each starts and the last ends."""

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    place: tuple[Mapping[fx.Node, int], Mapping[fx.Node, int]]
    starts: tuple[list[float], list[float]]

    @classmethod
    def of(
        cls, forward: Sequence[fx.Node], backward: Sequence[fx.Node], pace: Mapping[fx.Node, float]
    ) -> Clock:
        """`pace` is what each node takes, in seconds."""
        nodes = (*forward, backward[0]), tuple(backward)
        places = [{node: i for i, node in enumerate(half)} for half in nodes]
        starts = [
            [0.0, *accumulate(pace.get(node, 0.0) for node in half)] for half in (forward, backward)
        ]
        return cls(*nodes, (places[0], places[1]), (starts[0], starts[1]))


def copies(
    clock: Clock,
    done: Mapping[fx.Node, fx.Node],
    needed: Mapping[fx.Node, fx.Node],
    seconds: Callable[[fx.Node], float],
) -> Copies:
    """Place the copies of the owners in `done`: a copy out may begin before that node, a copy in
    must have ended before that of `needed`. `seconds` is what a copy takes."""
    out, waited_out = _out(clock, done, seconds)
    back, waited_back = _back(clock, needed, seconds)
    return Copies(out, back, waited_out + waited_back)


def _out(
    clock: Clock, done: Mapping[fx.Node, fx.Node], seconds: Callable[[fx.Node], float]
) -> tuple[dict[fx.Node, fx.Node], float]:
    nodes, place, starts = clock.forward, clock.place[0], clock.starts[0]
    found: dict[fx.Node, fx.Node] = {}
    ended = 0.0
    for owner in sorted(done, key=lambda o: place[done[o]]):
        begun = place[done[owner]]
        ended = max(ended, starts[begun]) + seconds(owner)
        first = bisect_right(starts, ended - 1e-12, lo=begun)
        found[owner] = nodes[min(first, len(nodes) - 1)]
    return found, max(0.0, ended - starts[-1])


def _back(
    clock: Clock, needed: Mapping[fx.Node, fx.Node], seconds: Callable[[fx.Node], float]
) -> tuple[dict[fx.Node, fx.Node], float]:
    nodes, place, starts = clock.backward, clock.place[1], clock.starts[1]
    order = sorted(needed, key=lambda o: place[needed[o]])
    found: dict[fx.Node, fx.Node] = {}
    begin = float("inf")
    for owner in reversed(order):
        last = place[needed[owner]]
        begin = min(begin, starts[last]) - seconds(owner)
        latest = bisect_right(starts, begin, hi=last + 1) - 1
        found[owner] = nodes[max(latest, 0)]
    waits = accumulate(map(seconds, order))
    late = (end - starts[place[needed[o]]] for o, end in zip(order, waits, strict=True))
    return found, max(0.0, *late, 0.0)
