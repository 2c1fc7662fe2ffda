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


def copies(
    forward: Sequence[fx.Node],
    backward: Sequence[fx.Node],
    pace: Mapping[fx.Node, float],
    done: Mapping[fx.Node, fx.Node],
    needed: Mapping[fx.Node, fx.Node],
    seconds: Callable[[fx.Node], float],
) -> Copies:
    """Place the copies of the owners in `done`: a copy out may begin before that node, a copy in
    must have ended before that of `needed`. `pace` is what each node takes, `seconds` a copy."""
    out, waited_out = _out(forward, backward[0], pace, done, seconds)
    back, waited_back = _back(backward, pace, needed, seconds)
    return Copies(out, back, waited_out + waited_back)


def _out(
    forward: Sequence[fx.Node],
    after: fx.Node,
    pace: Mapping[fx.Node, float],
    done: Mapping[fx.Node, fx.Node],
    seconds: Callable[[fx.Node], float],
) -> tuple[dict[fx.Node, fx.Node], float]:
    nodes = [*forward, after]
    starts = _starts(forward, pace)
    place = {node: i for i, node in enumerate(nodes)}
    found: dict[fx.Node, fx.Node] = {}
    ended = 0.0
    for owner in sorted(done, key=lambda o: place[done[o]]):
        begun = place[done[owner]]
        ended = max(ended, starts[begun]) + seconds(owner)
        first = bisect_right(starts, ended - 1e-12, lo=begun)
        found[owner] = nodes[min(first, len(forward))]
    return found, max(0.0, ended - starts[-1])


def _back(
    backward: Sequence[fx.Node],
    pace: Mapping[fx.Node, float],
    needed: Mapping[fx.Node, fx.Node],
    seconds: Callable[[fx.Node], float],
) -> tuple[dict[fx.Node, fx.Node], float]:
    starts = _starts(backward, pace)
    place = {node: i for i, node in enumerate(backward)}
    order = sorted(needed, key=lambda o: place[needed[o]])
    found: dict[fx.Node, fx.Node] = {}
    begin = float("inf")
    for owner in reversed(order):
        last = place[needed[owner]]
        begin = min(begin, starts[last]) - seconds(owner)
        latest = bisect_right(starts, begin, hi=last + 1) - 1
        found[owner] = backward[max(latest, 0)]
    waits = accumulate(map(seconds, order))
    late = (end - starts[place[needed[o]]] for o, end in zip(order, waits, strict=True))
    return found, max(0.0, *late, 0.0)


def _starts(nodes: Sequence[fx.Node], pace: Mapping[fx.Node, float]) -> list[float]:
    """When each node starts, and the last ends."""
    return [0.0, *accumulate(pace.get(node, 0.0) for node in nodes)]
