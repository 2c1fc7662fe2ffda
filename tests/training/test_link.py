"""Copies to the host: where they begin and end, and what the step waits for, by simulation."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.training.link import Clock, copies


def simulated(order: list[tuple[float, float]], end: float) -> float:
    """Seconds beyond `end` at which copies (earliest start, seconds) end that run one by one."""
    clock = 0.0
    for earliest, seconds in order:
        clock = max(clock, earliest) + seconds
    return max(0.0, clock - end)


def stalled(order: list[tuple[float, float]]) -> float:
    """Seconds that ops stand still for copies (needed at, seconds) that all start at once."""
    clock = late = 0.0
    for needed, seconds in order:
        clock += seconds
        late += max(0.0, clock - needed - late)
    return late


@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 2**31))
def test_placement_against_a_simulation(count: int, moved: int, seed: int) -> None:
    draw = random.Random(seed)
    forward: list[Any] = [f"f{i}" for i in range(count)]
    backward: list[Any] = [f"b{i}" for i in range(count)]
    pace = {node: draw.choice([0.0, 1.0, 2.5]) for node in (*forward, *backward)}
    owners: list[Any] = [f"o{i}" for i in range(moved)]
    seconds = {owner: draw.choice([0.5, 1.0, 4.0]) for owner in owners}
    done = {owner: draw.randrange(count + 1) for owner in owners}
    needed = {owner: draw.randrange(count) for owner in owners}
    nodes = [*forward, backward[0]]
    clock = Clock.of(forward, backward, pace)
    found = copies(
        clock, {o: nodes[i] for o, i in done.items()}, {o: backward[i] for o, i in needed.items()},
        seconds.__getitem__,
    )  # fmt: skip

    def starts(side: list[Any]) -> list[float]:
        return [sum(pace[n] for n in side[:i]) for i in range(len(side) + 1)]

    out, back = starts(forward), starts(backward)
    queue = sorted(owners, key=lambda o: done[o])
    need = sorted(owners, key=lambda o: needed[o])
    wait = simulated([(out[done[o]], seconds[o]) for o in queue], out[-1])
    wait += stalled([(back[needed[o]], seconds[o]) for o in need])
    assert found.wait == pytest.approx(wait)
    clock = 0.0
    for owner in queue:
        clock = max(clock, out[done[owner]]) + seconds[owner]
        released = nodes.index(found.release[owner])
        assert released >= done[owner]
        # memory goes where the copy has ended, and no op later
        assert out[released] >= clock - 1e-9 or released == count
        assert released == done[owner] or out[released - 1] < clock
    begun = [back[backward.index(found.fetch[o])] for o in need]
    assert begun == sorted(begun)
    for owner in need:
        fetched = backward.index(found.fetch[owner])
        assert fetched <= needed[owner]
        assert back[needed[owner]] - back[fetched] >= seconds[owner] or fetched == 0
    if not stalled([(back[needed[o]], seconds[o]) for o in need]):
        clock = 0.0
        for owner in need:
            clock = max(clock, back[backward.index(found.fetch[owner])]) + seconds[owner]
            assert clock <= back[needed[owner]] + 1e-9


def test_nothing_to_copy() -> None:
    nodes: Any = ["f"], ["b"]
    assert copies(Clock.of(*nodes, {}), {}, {}, lambda _: 1.0).wait == 0
