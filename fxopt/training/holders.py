"""Who holds the memory of a scheduled step at each of its calls: the plain count, call by call."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import get_args

import numpy as np
from torch import Tensor, fx

from ..ir.evidence import Holder
from ..ir.saved import Image
from ..passes.activation.cut_cross_entropy import EARLY
from .forms import OUTWARD, Call, State
from .schedule import Schedule
from .step import Step, storage_of

Piece = tuple[fx.Node, State]
"""A piece of memory by the node that owns it."""
TURNS: dict[State, Call] = {"first": "send", "again": "arrive"}
"""The item at which memory that is copied beside other calls begins, or ends, to be on its way."""


def border(laid: Schedule) -> int:
    """The first item of the backward; images are packed in the forward."""
    for i, item in enumerate(laid.items):
        inside = item.kind == "run" and item.node in laid.step.inside
        if not inside and item.kind not in OUTWARD:
            return i
    return len(laid.items)


def held(laid: Schedule) -> dict[Holder, np.ndarray]:
    """Bytes alive while each item runs, by who holds them; those who never hold any are left out.

    Parameters and inputs are not counted; gradients and outputs are, to the end.
    """
    begin, last = _lives(laid)
    change = {name: np.zeros(len(laid.items) + 1) for name in get_args(Holder)}
    turns = {(item.kind, item.node): i for i, item in enumerate(laid.items)}
    opening = border(laid)
    for piece, start in begin.items():
        size = _size(laid, piece)
        for name, first, end in _stretches(laid, piece, start, last[piece], opening, turns):
            change[name][first] += size
            change[name][end + 1] -= size
    found = {name: np.cumsum(values)[:-1] for name, values in change.items()}
    found["temporary"] += _unowned(laid)
    return {name: values for name, values in found.items() if values.any()}


def _size(laid: Schedule, piece: Piece) -> int:
    owner, state = piece
    if state in ("first", "again"):
        return laid.step.bytes.get(owner, 0)
    form = laid.images[owner]
    return form.bytes if state == "image" else form.packed


def _stretches(
    laid: Schedule,
    piece: Piece,
    start: int,
    end: int,
    opening: int,
    turns: Mapping[tuple[str, fx.Node], int],
) -> Iterator[tuple[Holder, int, int]]:
    """Who holds a piece of memory, from which item to which."""
    owner, state = piece
    image = laid.images[owner].image if owner in laid.images else Image()
    if state in ("sent", "fetched"):
        yield "offloaded", start, end
    elif state == "image":
        yield "offloaded" if image.carrier else "codes", start, end
    elif image.carrier and not image.pack:
        # memory that is copied out waits for the copy's end, and is there before the copy in ends
        turn = turns[TURNS[state], owner]
        before, after = ("temporary", "offloaded") if state == "first" else ("offloaded", "again")
        yield before, start, turn - 1
        yield after, turn, end
    elif state == "again":
        yield "again", start, end
    elif owner in laid.step.outputs:
        yield "gradients" if _is_gradient(laid.step, owner) else "outputs", start, end
    else:
        yield "kept" if start < opening <= end else "temporary", start, end


def _is_gradient(step: Step, owner: fx.Node) -> bool:
    """Whether memory that the caller gets is made in the backward, or early, with the loss, which
    is the first result of its op."""
    if owner not in step.inside:
        return True
    return step.maker(owner).target is EARLY and bool(owner.args[1] != 0)


def _lives(laid: Schedule) -> tuple[dict[Piece, int], dict[Piece, int]]:
    """The items at which each piece of memory is made and last needed."""
    opening, end = border(laid), len(laid.items) - 1
    begin: dict[Piece, int] = {}
    last: dict[Piece, int] = {}
    for i in range(len(laid.items)):
        for piece in _touched(laid, i):
            begin.setdefault(piece, opening if piece[0].op == "placeholder" else i)
            last[piece] = i
    for owner, state in last:
        # the caller holds what it gave and what it was given
        if state == "first" and (owner in laid.step.outputs or owner.op == "placeholder"):
            last[owner, state] = end
    return begin, last


def _touched(laid: Schedule, i: int) -> Iterator[Piece]:
    """The memory that an item reads or makes; of the placeholders only gradients count."""
    item, step = laid.items[i], laid.step
    if item.kind not in ("run", "again"):
        yield from laid.touched(item)
        return
    in_backward = item.kind == "again" or item.node not in step.inside
    for source in (*step.reads[item.node], item.node):
        owner = step.owner.get(source)
        if owner is None or (owner.op == "placeholder" and not _is_tangent(owner)):
            continue
        if item.kind == "run" and in_backward and _replaced(laid, owner):
            yield owner, "image"
            continue
        # a view of kept memory may be taken again: the memory is the first run's
        yield owner, laid.backward_state(owner) if in_backward else "first"


def _replaced(laid: Schedule, owner: fx.Node) -> bool:
    """Whether the backward reads what waits in place of an owner's memory as it is."""
    return owner in laid.images and laid.images[owner].image.replaces


def _is_tangent(node: fx.Node) -> bool:
    return str(node.target).startswith("tangents")


def _unowned(laid: Schedule) -> np.ndarray:
    """Bytes at each item that belong to no piece: workspaces, and results with several parts that
    were not yet taken."""
    extra = np.zeros(len(laid.items))
    waiting: dict[int, int] = {}
    whole: fx.Node | None = None
    replaced = laid.replaced
    for i, item in enumerate(laid.items):
        if item.kind in ("pack", "unpack"):
            form = laid.images[item.node]
            extra[i] = form.packing if item.kind == "pack" else form.unpacking
        elif item.kind in ("run", "again"):
            if item.node.target is operator.getitem and item.node.args[0] is whole:
                waiting.pop(storage_of(item.node.meta["val"]), None)
            else:
                whole, waiting = item.node, _parts(laid.step, item.node)
                extra[i] = laid.step.workspace(item.node)
            if item.kind == "run" and item.node in replaced:
                extra[i] += laid.images[replaced[item.node]].unpacking
        extra[i] += sum(waiting.values())
    return extra


def _parts(step: Step, node: fx.Node) -> dict[int, int]:
    """Bytes of what an op with several results makes, by storage."""
    value = node.meta.get("val")
    if not isinstance(value, list | tuple):
        return {}
    made = [t for t in value if isinstance(t, Tensor)]
    found = {storage_of(t): t.untyped_storage().nbytes() for t in made}
    for source in step.reads[node]:
        if source in step.owner:
            found.pop(storage_of(source.meta["val"]), None)
    return found
