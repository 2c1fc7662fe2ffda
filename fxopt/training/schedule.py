"""The step with saved tensors computed again or stored otherwise: what runs when, what is alive."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor, fx

from ..passes.activation.cut_cross_entropy import workspace_of
from .forms import Form
from .link import Copies, copies
from .step import Step, storage_of

Kind = Literal["run", "again", "pack", "release", "fetch", "unpack"]
CALLS = ("run", "again")
"""The kinds that run nodes of the unchanged step."""


@dataclass(frozen=True)
class Item:
    """One call of the step.

    "again" is the second run of a forward node, in the backward; "pack" makes the image of the
    memory that `node` owns, "unpack" the memory again; where these run beside other calls they end
    with "release" and begin with "fetch". `before` is the node that such a call stands before.
    """

    node: fx.Node
    kind: Kind = "run"
    before: fx.Node | None = None


@dataclass(frozen=True)
class Schedule:
    """The calls of a step in order. `again` are the forward nodes that run twice, `images` the
    owners that wait in another form."""

    step: Step
    items: tuple[Item, ...]
    again: frozenset[fx.Node]
    images: Mapping[fx.Node, Form] = field(default_factory=dict[fx.Node, Form])
    wait: float = 0.0
    """Seconds that the step stands still for copies."""

    def live(self) -> np.ndarray:
        """Bytes alive at each node of the unchanged step, in its order.

        Other calls count at the node that they stand before. Parameters and inputs are not
        counted; gradients and outputs are, to the end.
        """
        begin, last = _ranges(self)
        change = np.zeros(len(self.items) + 1)
        for key, start in begin.items():
            size = self._bytes(key)
            change[start] += size
            change[last[key] + 1] -= size
        alive = np.cumsum(change)[:-1] + _unread(self.step, self.items) + self._workspaces()
        starts = [0]
        for i, item in enumerate(self.items[:-1]):
            if item.kind == "run":
                starts.append(i + 1)
        return np.maximum.reduceat(alive, starts)

    def runs_again(self) -> list[fx.Node]:
        """The ops that are paid for a second time; views and parts of results are free."""
        return [
            n
            for n in self.step.forward
            if n in self.again and n.target is not operator.getitem and not self.step.is_view(n)
        ]

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

    def _bytes(self, key: tuple[fx.Node, str]) -> int:
        owner, state = key
        return self.images[owner].bytes if state == "image" else self.step.bytes.get(owner, 0)

    def _workspaces(self) -> np.ndarray:
        extra = np.zeros(len(self.items))
        replaced = self.replaced
        for i, item in enumerate(self.items):
            if item.kind == "pack":
                extra[i] = self.images[item.node].packing
            elif item.kind == "unpack":
                extra[i] = self.images[item.node].unpacking
            elif item.kind == "run" and item.node in replaced:
                extra[i] = self.images[replaced[item.node]].unpacking
        return extra

    @property
    def replaced(self) -> dict[fx.Node, fx.Node]:
        """The ops of the backward in whose place others read images, to the owners of these."""
        owners = [owner for owner, form in self.images.items() if form.image.replaces]
        return {self.step.reader(owner): owner for owner in owners}


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
    kept = ({*step.saved, *step.outputs, *stops} - set(dropped)) | step.outputs
    forward, reads = step.inside, step.reads
    blocked: dict[fx.Node, bool] = {}

    def made_again(node: fx.Node) -> bool:
        if node not in forward:
            return False
        owner = step.owner.get(node)
        if owner is None or owner in images:
            return True
        if owner.op == "placeholder" or owner in kept:
            return False
        op = step.maker(owner)
        if op not in blocked:
            blocked[op] = step.blocked(op) is not None
        return not blocked[op]

    items = _forward(step, images)
    replaced = {owner for owner, form in images.items() if form.image.replaces}
    made: set[fx.Node] = set()
    place = {node: i for i, node in enumerate(step.forward)}
    for node in step.backward:
        needed: set[fx.Node] = set()
        waiting = [n for n in reads[node] if step.owner.get(n) not in replaced]
        while waiting:
            source = waiting.pop()
            if source in made or source in needed or not made_again(source):
                continue
            needed.add(source)
            if source not in images:
                waiting += reads[source]
        _with_parts(needed, lambda n: made_again(n) and n not in images)
        for source in sorted(needed, key=place.__getitem__):
            items.append(Item(source, "unpack" if source in images else "again", node))
        made |= needed
        items.append(Item(node))
    again = frozenset(made - set(images))
    if not any(form.image.fetch for form in images.values()):
        return Schedule(step, tuple(items), again, images)
    placed = _copies(step, items, images)
    return Schedule(step, tuple(_with_copies(items, placed)), again, images, placed.wait)


def _copies(step: Step, items: Sequence[Item], images: Mapping[fx.Node, Form]) -> Copies:
    """Where the copies of those images begin and end that are made beside other calls."""
    beside = {owner for owner, form in images.items() if form.image.fetch}

    def of(kind: Kind) -> dict[fx.Node, fx.Node]:
        return {i.node: i.before for i in items if i.kind == kind and i.node in beside and i.before}

    done, needed = of("pack"), of("unpack")
    return copies(
        step.forward, step.backward, step.pace, done, needed, lambda o: images[o].transfer
    )


def _with_copies(items: Sequence[Item], placed: Copies) -> Iterator[Item]:
    extra: dict[fx.Node, list[Item]] = {}
    for owner, node in placed.release.items():
        extra.setdefault(node, []).append(Item(owner, "release", node))
    for owner, node in placed.fetch.items():
        extra.setdefault(node, []).append(Item(owner, "fetch", node))
    for item in items:
        if item.kind != "pack":
            yield from extra.pop(item.before or item.node, ())
        yield item


def _forward(step: Step, images: Mapping[fx.Node, Form]) -> list[Item]:
    """The forward; each of `images` is packed after the last op that reads its memory."""
    place = {node: i for i, node in enumerate(step.forward)}
    packed: dict[int, list[fx.Node]] = {}
    for owner in images:
        maker = step.maker(owner)
        # other results of the op are taken before
        near = [u for u in maker.users if _is_part(u, maker)]
        near += [u for n in step.views[owner] for u in (n, *n.users)]
        packed.setdefault(max(place[n] for n in near if n in place), []).append(owner)
    items: list[Item] = []
    following = (*step.forward[1:], *step.backward[:1])
    for i, (node, after) in enumerate(zip(step.forward, following, strict=True)):
        items.append(Item(node))
        items += [Item(owner, "pack", after) for owner in packed.get(i, ())]
    return items


def _with_parts(needed: set[fx.Node], made_again: Callable[[fx.Node], bool]) -> None:
    """Parts of a result are taken at once, so that the rest of it can go."""
    for node in list(needed):
        if not isinstance(node.meta.get("val"), Tensor):
            needed.update(u for u in node.users if _is_part(u, node) and made_again(u))


State = Literal["first", "again", "image"]
Key = tuple[fx.Node, State]
"""A piece of memory by the node that owns it: as the forward made it, as the backward made it
again, or its image."""


def _ranges(laid: Schedule) -> tuple[dict[Key, int], dict[Key, int]]:
    """Where each piece of memory is made and last needed; results and outputs to the end."""
    step, end = laid.step, len(laid.items) - 1
    early = ("pack", "release")
    opening = sum(item.kind in early for item in laid.items) + len(step.forward)
    begin: dict[Key, int] = {}
    last: dict[Key, int] = {}
    for i, item in enumerate(laid.items):
        for key in _touched(laid, item):
            begin.setdefault(key, opening if key[0].op == "placeholder" else i)
            last[key] = i
    for owner, state in last:
        # the caller holds what it gave and what it was given
        if state == "first" and (owner in step.outputs or owner.op == "placeholder"):
            last[owner, state] = end
    return begin, last


def _touched(laid: Schedule, item: Item) -> list[Key]:
    """The memory that a call reads or makes; of the placeholders only gradients count."""
    if item.kind in ("pack", "release"):
        return [(item.node, "first"), (item.node, "image")]
    if item.kind in ("fetch", "unpack"):
        return [(item.node, "image"), (item.node, "again")]
    step, found = laid.step, list[Key]()
    in_backward = item.kind == "again" or item.node not in step.inside
    for source in (*step.reads[item.node], item.node):
        owner = step.owner.get(source)
        if owner is None or (owner.op == "placeholder" and not _is_tangent(owner)):
            continue
        if item.kind == "run" and in_backward and _replaced(laid, owner):
            found.append((owner, "image"))
            continue
        # a view of kept memory may be taken again: the memory is the first run's
        again = in_backward and (owner in laid.again or owner in laid.images)
        found.append((owner, "again" if again else "first"))
    return found


def _replaced(laid: Schedule, owner: fx.Node) -> bool:
    """Whether the backward reads an image in place of an owner's memory."""
    return owner in laid.images and laid.images[owner].image.replaces


def _unread(step: Step, items: tuple[Item, ...]) -> np.ndarray:
    """Bytes of results with several parts that no part taken so far accounts for, and those that
    an op of ours takes meanwhile."""
    extra = np.zeros(len(items))
    for i, item in enumerate(items):
        value = item.node.meta.get("val")
        if not isinstance(value, list | tuple):
            continue
        held = {storage_of(t): t for t in value if isinstance(t, Tensor)}
        for source in step.reads[item.node]:
            if source in step.owner:
                held.pop(storage_of(source.meta["val"]), None)
        total = sum(t.untyped_storage().nbytes() for t in held.values())
        extra[i] = total + workspace_of(item.node)
        for j in _until_parted(items, i):
            if items[j].kind in CALLS:
                total -= step.bytes.get(step.owner[items[j].node], 0)
            extra[j] = total
    return extra


def _until_parted(items: tuple[Item, ...], whole: int) -> list[int]:
    """The items up to the last one that takes a part of a result; images may be made between."""
    found: list[int] = []
    taken = 0
    for j in range(whole + 1, len(items)):
        own = items[j].kind in CALLS
        if own and not _is_part(items[j].node, items[whole].node):
            break
        found.append(j)
        taken = len(found) if own else taken
    return found[:taken]


def _is_part(node: fx.Node, whole: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0] is whole


def _is_tangent(node: fx.Node) -> bool:
    return str(node.target).startswith("tangents")
