"""The link to the host: when each copy runs beside the ops, and what has to be waited for.

One queue each way. Copies out start in the order in which the forward is done with their memory,
and the memory is given up where the copy is expected to have ended. Copies in end in the order in
which the backward needs them, and start as late as that allows.

Where the link is slower than the ops, memory piles up at the border: all copies out end after the
forward, and all copies in start with the backward. A depth bounds the queues, for which ops wait.
Their clock then stands still, so what is counted by it needs no more than to be set back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import fx


@dataclass(frozen=True)
class Copies:
    """Nodes before which memory is released, and before which copies in begin, by owner in the
    order of the queues; `wait` is the seconds that the step stands still for them."""

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
    depth: Mapping[fx.Node, int],
) -> Copies:
    """Place the copies of the owners in `done`: a copy out may begin before that node, a copy in
    must have ended before that of `needed`. `seconds` is what a copy takes.

    Of an owner in `depth` the memory is given up by the time that so many further copies out may
    begin, and its copy in begins once no more than so many before it have not been read.
    """
    out, waited_out = _out(clock, done, seconds, depth)
    back, waited_back = _back(clock, needed, seconds, depth)
    return Copies(out, back, waited_out + waited_back)


def _out(
    clock: Clock,
    done: Mapping[fx.Node, fx.Node],
    seconds: Callable[[fx.Node], float],
    depth: Mapping[fx.Node, int],
) -> tuple[dict[fx.Node, fx.Node], float]:
    nodes, place, starts = clock.forward, clock.place[0], clock.starts[0]
    order = sorted(done, key=lambda o: place[done[o]])
    begun = [place[done[owner]] for owner in order]
    lasts = _lasts(begun, [depth.get(owner) for owner in order], len(nodes) - 1)
    found: dict[fx.Node, fx.Node] = {}
    ended = wait = 0.0
    for owner, first, last in zip(order, begun, lasts, strict=True):
        ended = max(ended, starts[first]) + seconds(owner)
        found[owner] = nodes[min(bisect_right(starts, ended - 1e-12, lo=first), last)]
        wait += max(0.0, ended - starts[last])
        ended = min(ended, starts[last])
    return found, wait


def _back(
    clock: Clock,
    needed: Mapping[fx.Node, fx.Node],
    seconds: Callable[[fx.Node], float],
    depth: Mapping[fx.Node, int],
) -> tuple[dict[fx.Node, fx.Node], float]:
    nodes, place, starts = clock.backward, clock.place[1], clock.starts[1]
    order = sorted(needed, key=lambda o: place[needed[o]])
    reads = [place[needed[owner]] for owner in order]
    firsts = _firsts(reads, [depth.get(owner) for owner in order])
    begun: list[int] = []
    begin = float("inf")
    for owner, first, read in reversed([*zip(order, firsts, reads, strict=True)]):
        begin = max(min(begin, starts[read]) - seconds(owner), starts[first])
        begun.insert(0, bisect_right(starts, begin, hi=read + 1) - 1)
    found: dict[fx.Node, fx.Node] = {}
    ended = wait = 0.0
    for owner, first, read in zip(order, begun, reads, strict=True):
        found[owner] = nodes[first]
        ended = max(ended, starts[first]) + seconds(owner)
        wait += max(0.0, ended - starts[read])
        ended = min(ended, starts[read])
    return found, wait


def _lasts(begun: Sequence[int], depth: Sequence[int | None], end: int) -> list[int]:
    """The last place at which each copy out may end: where the copy so many behind it begins."""
    lasts = [
        begun[i + most] if most is not None and i + most < len(begun) else end
        for i, most in enumerate(depth)
    ]
    # one queue: what is before in it has ended by then
    return list(accumulate(reversed(lasts), min))[::-1]


def _firsts(reads: Sequence[int], depth: Sequence[int | None]) -> list[int]:
    """The first place at which each copy in may begin: once the copy so many before it was read,
    and where it is read itself at the latest."""
    firsts = [
        min(reads[i - most] + 1, reads[i]) if most is not None and i >= most else 0
        for i, most in enumerate(depth)
    ]
    # one queue: what is behind in it does not begin before
    return list(accumulate(firsts, max))
