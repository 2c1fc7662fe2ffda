"""Copies to the host: where they begin and end, and what the step waits for, by simulation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.training.link import Clock, Copies, copies


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


@dataclass
class Case:
    """A step of few ops and copies at random; nodes and owners are names."""

    forward: list[Any]
    backward: list[Any]
    pace: dict[Any, float]
    owners: list[Any]
    seconds: dict[Any, float]
    done: dict[Any, int]
    needed: dict[Any, int]

    @classmethod
    def drawn(cls, count: int, moved: int, draw: random.Random) -> Case:
        forward, backward = ([f"{half}{i}" for i in range(count)] for half in "fb")
        owners: list[Any] = [f"o{i}" for i in range(moved)]
        return cls(
            forward,
            backward,
            {node: draw.choice([0.0, 1.0, 2.5]) for node in (*forward, *backward)},
            owners,
            {owner: draw.choice([0.5, 1.0, 4.0]) for owner in owners},
            {owner: draw.randrange(count + 1) for owner in owners},
            {owner: draw.randrange(count) for owner in owners},
        )

    def placed(self, depth: dict[Any, int]) -> Copies:
        nodes = [*self.forward, self.backward[0]]
        clock = Clock.of(self.forward, self.backward, self.pace)
        done = {o: nodes[i] for o, i in self.done.items()}
        needed = {o: self.backward[i] for o, i in self.needed.items()}
        return copies(clock, done, needed, self.seconds.__getitem__, depth)

    def released(self, found: Copies) -> dict[Any, int]:
        """The ops of the forward before which memory goes."""
        nodes = [*self.forward, self.backward[0]]
        return {owner: nodes.index(node) for owner, node in found.release.items()}

    def fetched(self, found: Copies) -> dict[Any, int]:
        """The ops of the backward before which copies in begin."""
        return {owner: self.backward.index(node) for owner, node in found.fetch.items()}

    def waited(self, half: list[Any], begun: dict[Any, int], ended: dict[Any, int]) -> float:
        """Seconds for which ops stand still, by a clock that goes from op to op; copies that begin
        at one op are queued in the order of `begun`."""
        clock = link = wait = 0.0
        ends: dict[Any, float] = {}
        for place in range(len(half) + 1):
            for owner in begun:
                if begun[owner] == place:
                    link = ends[owner] = max(link, clock) + self.seconds[owner]
            late = max((ends[o] - clock for o in self.owners if ended[o] == place), default=0.0)
            clock, wait = clock + max(late, 0.0), wait + max(late, 0.0)
            clock += self.pace[half[place]] if place < len(half) else 0.0
        return wait


CASES = st.integers(1, 12), st.integers(0, 8), st.integers(0, 2**31)


@given(*CASES)
def test_placement_against_a_simulation(count: int, moved: int, seed: int) -> None:
    case = Case.drawn(count, moved, random.Random(seed))
    owners, seconds, done, needed = case.owners, case.seconds, case.done, case.needed
    found = case.placed({})

    def starts(side: list[Any]) -> list[float]:
        return [sum(case.pace[n] for n in side[:i]) for i in range(len(side) + 1)]

    out, back = starts(case.forward), starts(case.backward)
    queue = sorted(owners, key=lambda o: done[o])
    need = sorted(owners, key=lambda o: needed[o])
    wait = simulated([(out[done[o]], seconds[o]) for o in queue], out[-1])
    wait += stalled([(back[needed[o]], seconds[o]) for o in need])
    assert found.wait == pytest.approx(wait)
    clock, ends, begins = 0.0, case.released(found), case.fetched(found)
    for owner in queue:
        clock, released = max(clock, out[done[owner]]) + seconds[owner], ends[owner]
        assert released >= done[owner]
        # memory goes where the copy has ended, and no op later
        assert out[released] >= clock - 1e-9 or released == count
        assert released == done[owner] or out[released - 1] < clock
    begun = [back[begins[o]] for o in need]
    assert begun == sorted(begun)
    for owner in need:
        fetched = begins[owner]
        assert fetched <= needed[owner]
        assert back[needed[owner]] - back[fetched] >= seconds[owner] or back[fetched] == 0
    if not stalled([(back[needed[o]], seconds[o]) for o in need]):
        clock = 0.0
        for owner in need:
            clock = max(clock, back[begins[owner]]) + seconds[owner]
            assert clock <= back[needed[owner]] + 1e-9


@given(*CASES)
def test_bounds_are_waited_for_and_hold_memory_no_longer(count: int, moved: int, seed: int) -> None:
    """Any mixture of bounds: the wait by a simulation, and no end of a copy out is later, no
    begin of a copy in earlier, than without."""
    draw = random.Random(seed)
    case = Case.drawn(count, moved, draw)
    assert [*case.placed({}).fetch] == sorted(case.owners, key=lambda o: case.needed[o])
    depth = {o: n for o in case.owners if (n := draw.choice([None, 0, 1, 2])) is not None}
    free, found = case.placed({}), case.placed(depth)
    released, fetched = case.released(found), case.fetched(found)
    wait = case.waited(case.forward, case.done, released)
    wait += case.waited(case.backward, fetched, case.needed)
    assert found.wait == pytest.approx(wait)
    assert found.wait >= free.wait - 1e-9
    before, after = case.released(free), case.fetched(free)
    for owner in case.owners:
        assert case.done[owner] <= released[owner] <= before[owner]
        assert after[owner] <= fetched[owner] <= case.needed[owner]


@given(*CASES, st.integers(0, 3))
def test_no_more_than_so_many_are_under_way(count: int, moved: int, seed: int, most: int) -> None:
    case = Case.drawn(count, moved, random.Random(seed))
    found = case.placed(dict.fromkeys(case.owners, most))
    released, fetched = case.released(found), case.fetched(found)
    for op in range(count):
        assert sum(case.done[o] <= op < released[o] for o in case.owners) <= most
        assert sum(fetched[o] <= op < case.needed[o] for o in case.owners) <= most
    if most == 0:
        assert found.wait == pytest.approx(2 * sum(case.seconds.values()))


def test_nothing_to_copy() -> None:
    nodes: Any = ["f"], ["b"]
    assert copies(Clock.of(*nodes, {}), {}, {}, lambda _: 1.0, {}).wait == 0
