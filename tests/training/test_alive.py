"""Bytes alive: what is counted against the unchanged step is what a walk over all calls finds."""

from __future__ import annotations

import operator
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.training.forms import again, images
from fxopt.training.schedule import Item, Schedule, schedule
from tests.training.test_images import at_random, saved_of, taken_apart

Example = tuple[nn.Module, dict[str, Any]]


def walked(laid: Schedule) -> list[int]:
    """Most bytes alive at each node: every call in turn, with what was made and is still needed."""
    touched = [list(memory_of(laid, item)) for item in laid.items]
    last = {key: i for i, keys in enumerate(touched) for key in keys}
    for owner, state in last:
        if state == "first" and (owner.op == "placeholder" or owner in laid.step.outputs):
            last[owner, state] = len(touched)
    given = {key for key in last if key[0].op == "placeholder"}
    alive: set[Any] = set()
    found: list[int] = []
    highest = 0
    for i, (item, keys) in enumerate(zip(laid.items, touched, strict=True)):
        in_forward = item.kind in ("pack", "release") or item.node in laid.step.inside
        if item.kind in ("again", "fetch", "unpack") or not in_forward:
            alive |= given
        alive |= set(keys)
        total = sum(size_of(laid, *key) for key in alive) + untaken(laid, i)
        if item.kind == "pack":
            total += laid.images[item.node].packing
        if item.kind == "unpack":
            total += laid.images[item.node].unpacking
        if item.kind == "run" and item.node in laid.replaced:
            total += laid.images[laid.replaced[item.node]].unpacking
        highest = max(highest, total)
        alive = {key for key in alive if last[key] > i}
        if item.kind == "run":
            found.append(highest)
            highest = 0
    return found


def memory_of(laid: Schedule, item: Item) -> Any:
    if item.kind in ("pack", "release"):
        yield from [(item.node, "first"), (item.node, "image")]
        return
    if item.kind in ("fetch", "unpack"):
        yield from [(item.node, "image"), (item.node, "again")]
        return
    twice = item.kind == "again" or item.node not in laid.step.inside
    for node in (*item.node.all_input_nodes, item.node):
        owner = laid.step.owner.get(node)
        if owner is None or (owner.op == "placeholder" and "tangents" not in str(owner.target)):
            continue
        moved = owner in laid.again or owner in laid.images
        if item.kind == "run" and twice and owner in laid.replaced.values():
            yield owner, "image"
            continue
        yield owner, "again" if twice and moved else "first"


def size_of(laid: Schedule, owner: fx.Node, state: str) -> int:
    if state == "image":
        return laid.images[owner].bytes
    return owner.meta["val"].untyped_storage().nbytes()


def untaken(laid: Schedule, i: int) -> int:
    """Bytes of the last result with several parts, as long as parts of it are being taken."""
    own = ("run", "again")
    parts_of_it = [
        item.kind not in own or item.node.target is operator.getitem for item in laid.items
    ]
    whole = next((j for j in range(i, -1, -1) if not parts_of_it[j]), 0)
    node = laid.items[whole].node
    value = node.meta.get("val")
    if not isinstance(value, list | tuple):
        return 0
    parts: dict[int, fx.Node] = {}
    for j in range(whole + 1, len(laid.items)):
        if not parts_of_it[j]:
            break
        if laid.items[j].kind in own and laid.items[j].node.args[0] is node:
            parts[j] = laid.items[j].node
    if i > max(parts, default=whole):
        return 0
    given = {n.meta["val"].untyped_storage()._cdata for n in node.all_input_nodes}
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in value
        if isinstance(t, Tensor)
    }
    taken = {p.meta["val"].untyped_storage()._cdata for j, p in parts.items() if j <= i}
    return sum(size for key, size in storages.items() if key not in given | taken)


@pytest.mark.parametrize("seed", range(3))
def test_counted_as_walked(example: Example, seed: int) -> None:
    step = taken_apart(example)
    saved = saved_of(step)
    random.seed(seed)
    torch.manual_seed(seed)
    kinds: set[str] = set()
    for stops in ((), (), random.sample(list(saved.others.values()), 3)):
        choices = at_random(saved)
        laid = schedule(step, again(choices), stops, images(choices))
        kinds |= {item.kind for item in laid.items}
        assert laid.live().tolist() == walked(laid)
    assert {"again", "pack"} <= kinds


def test_an_unchanged_step(example: Example) -> None:
    laid = schedule(taken_apart(example), ())
    assert laid.live().tolist() == walked(laid)
    assert not laid.extras
