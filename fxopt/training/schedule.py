"""The step with saved tensors computed again or stored otherwise: what runs when."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor, fx

from . import alive
from .forms import Call, Form, State, states
from .lifetimes import is_part
from .link import Copies, copies
from .step import Step

Kind = Literal["run", "again"] | Call


@dataclass(frozen=True)
class Item:
    """One call of the step.

    "again" is the second run of a forward node, in the backward; the others are for the image of
    the memory that `node` owns. `before` is the node that such a call stands before.
    """

    node: fx.Node
    kind: Kind = "run"
    before: fx.Node | None = None


Extras = dict[fx.Node, list[Item]]
"""The calls that stand before nodes of the unchanged step, in order."""


@dataclass(frozen=True)
class Schedule:
    """A step and the calls that are inserted into it. `again` are the forward nodes that run
    twice, `images` the owners that wait in another form."""

    step: Step
    extras: Extras
    again: frozenset[fx.Node]
    images: Mapping[fx.Node, Form] = field(default_factory=dict[fx.Node, Form])
    wait: float = 0.0
    """Seconds that the step stands still for copies."""

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All calls of the step in order."""
        nodes = (*self.step.forward, *self.step.backward)
        return tuple(item for n in nodes for item in (*self.extras.get(n, ()), Item(n)))

    @property
    def replaced(self) -> dict[fx.Node, fx.Node]:
        """The ops of the backward in whose place others read images, to the owners of these."""
        owners = [owner for owner, form in self.images.items() if form.image.replaces]
        return {self.step.reader(owner): owner for owner in owners}

    def live(self) -> np.ndarray:
        """Bytes alive at each node of the unchanged step, in its order; see `alive.live`."""
        return alive.live(self)

    def touched(self, item: Item) -> list[tuple[fx.Node, State]]:
        """The memory that a call for an image reads or makes."""
        image = self.images[item.node].image
        if not image.shares:
            return [(item.node, state) for state in states(image, item.kind)]  # pyright: ignore
        read = (self.step.owner[n] for n in made_of(self.step, item.node) if n.op != "placeholder")
        return [(item.node, "again"), *((owner, self.backward_state(owner)) for owner in read)]

    def backward_state(self, owner: fx.Node) -> State:
        """Which memory of an owner the backward reads: what it made again, or the forward's."""
        return "again" if owner in self.again or owner in self.images else "first"

    def runs_again(self) -> list[fx.Node]:
        """The ops that are paid for a second time; views and parts of results are free."""
        step, place = self.step, self.step.lifetimes.place
        paid = [n for n in self.again if n.target is not operator.getitem and not step.is_view(n)]
        return sorted(paid, key=place.__getitem__)

    def starts(self) -> frozenset[fx.Node]:
        """The owners of the forward's memory that second runs start from."""
        step, made = self.step, {*self.again, *self.images}
        found: set[fx.Node] = set()
        for node in self.again:
            for source in step.reads[node]:
                owner = step.owner.get(source)
                own = owner is step.owner.get(node) and owner in self.images
                if owner in step.inside and not own and (owner in self.images or owner not in made):
                    found.add(owner)
        return frozenset(found)


def schedule(
    step: Step,
    dropped: Collection[fx.Node],
    stops: Collection[fx.Node] = (),
    images: Mapping[fx.Node, Form] | None = None,
) -> Schedule:
    """Run `dropped` owners again, each just before the backward first needs it.

    What they are computed from is saved where the step saves it anyway, where it is one of
    `stops`, or where its op cannot run twice; else it is computed again as well. `images` are
    packed once the forward has read them, and unpacked just before the backward first needs them.
    """
    images = images or {}
    gone, stops = set(dropped) - step.outputs, set(stops)
    forward, reads, saved = step.inside, step.reads, step.kept
    blocked: dict[fx.Node, bool] = {}

    def made_again(node: fx.Node) -> bool:
        if node not in forward:
            return False
        owner = step.owner.get(node)
        if owner is None or owner in images:
            return True
        kept = owner not in gone and (owner in saved or owner in stops)
        if kept or owner.op == "placeholder":
            return False
        op = step.maker(owner)
        if op not in blocked:
            blocked[op] = step.blocked(op) is not None
        return not blocked[op]

    extras = _packs(step, images)
    replaced = {owner for owner, form in images.items() if form.image.replaces}
    shared = {owner for owner, form in images.items() if form.image.shares}
    made: set[fx.Node] = set()
    place = step.lifetimes.place
    needs: dict[fx.Node, list[fx.Node]] = {}
    for node in step.read_back({*gone, *images}):
        needed: set[fx.Node] = set()
        waiting = [n for n in reads[node] if step.owner.get(n) not in replaced]
        while waiting:
            source = waiting.pop()
            if source in made or source in needed or not made_again(source):
                continue
            needed.add(source)
            if source not in images:
                waiting += reads[source]
            elif source in shared:
                waiting += made_of(step, source)
        _with_parts(needed, lambda n: made_again(n) and n not in images)
        made |= needed
        if needed:
            # after what it is made of, which the forward makes later
            needs[node] = sorted(needed, key=lambda n: (step.owner.get(n) in shared, place[n]))
    wait = 0.0
    if any(form.image.carrier for form in images.values()):
        placed = _copies(step, extras, needs, images)
        for owner, node in placed.release.items():
            extras.setdefault(node, []).append(Item(owner, "release", node))
        for owner, node in placed.fetch.items():
            extras.setdefault(node, []).append(Item(owner, "fetch", node))
        wait = placed.wait
    for node, sources in needs.items():
        items = (Item(s, kind, node) for s in sources for kind in _back(images.get(s)))
        extras.setdefault(node, []).extend(items)
    return Schedule(step, extras, frozenset(made - set(images)), images, wait)


def _copies(
    step: Step,
    packs: Extras,
    needs: Mapping[fx.Node, list[fx.Node]],
    images: Mapping[fx.Node, Form],
) -> Copies:
    """Where the copies of those images begin and end that are made beside other calls."""
    beside = {owner for owner, form in images.items() if form.image.carrier}
    done = {i.node: node for node, items in packs.items() for i in items if i.node in beside}
    needed = {o: node for node, sources in needs.items() for o in sources if o in beside}
    carriers = {owner: images[owner].image.carrier for owner in beside}
    depth = {o: c.depth for o, c in carriers.items() if c and c.depth is not None}
    return copies(step.clock, done, needed, lambda o: images[o].transfer, depth)


def _packs(step: Step, images: Mapping[fx.Node, Form]) -> Extras:
    """Each of `images` is made after the last op of the forward that reads its memory."""
    known = step.lifetimes
    following = (*step.forward[1:], step.backward[0])
    extras: Extras = {}
    for owner in (o for o, form in images.items() if not form.image.shares):
        maker = step.maker(owner)
        # other results of the op are taken before
        near = [known.place[u] for u in maker.users if is_part(u, maker)]
        after = following[max(known.in_forward[owner], *near, 0)]
        made = (Item(owner, kind, after) for kind in _out(images[owner]))
        extras.setdefault(after, []).extend(made)
    return extras


def _out(form: Form) -> tuple[Call, ...]:
    """The calls that make an image; its copies end later."""
    packed: tuple[Call, ...] = ("pack",) if form.image.pack else ()
    return (*packed, "send") if form.image.carrier else packed


def _back(form: Form | None) -> tuple[Kind, ...]:
    """The calls that make memory again; the copies of an image began before."""
    if form is None:
        return ("again",)
    packed: tuple[Kind, ...] = ("unpack",) if form.image.unpack else ()
    return ("arrive", *packed) if form.image.carrier else packed


def made_of(step: Step, owner: fx.Node) -> list[fx.Node]:
    """The nodes that an owner is made of in the backward if it waits as nothing of its own."""
    return [node for node in step.shared[owner] if node is not None]


def _with_parts(needed: set[fx.Node], made_again: Callable[[fx.Node], bool]) -> None:
    """Parts of a result are taken at once, so that the rest of it can go."""
    for node in list(needed):
        if not isinstance(node.meta.get("val"), Tensor):
            needed.update(u for u in node.users if is_part(u, node) and made_again(u))
