"""What a rewrite of a saved tensor asks for: how its memory gets to the backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

MARK = "fxopt_saved"
"""Metadata of a node that says how its memory gets to the backward: `AGAIN` or an `Image`."""

AGAIN: Final = "again"
"""The ops that made the memory run again."""


@dataclass(frozen=True)
class Carrier:
    """Copies of tensors to elsewhere and back, made while other ops run.

    `send(x)` begins a copy and returns what it writes; from `sent(there, x)` on, which returns
    `there`, the memory of x may be used. `fetch(there, size, stride, device)` begins the way back;
    `fetched(x, there)` returns x, whole.

    Copies are waited for as little as they can be. With a `depth` no more than so many wait or run
    each way while ops run, however long these wait then: 0, none; each is waited for at once.
    """

    send: Callable[..., Any]
    sent: Callable[..., Any]
    fetch: Callable[..., Any]
    fetched: Callable[..., Any]
    depth: int | None = None


@dataclass(frozen=True)
class Image:
    """Another form in which a piece of memory waits for the backward.

    `pack(x, *pack_arguments)`, after the last op of the forward that reads x, returns a tuple of
    the tensors that are saved, the parts; `unpack(*parts, *unpack_arguments)`, before the first op
    of the backward that reads it, a tensor like x, with its strides. `rounding` is the relative
    error of that tensor that is to be expected (root mean square); 0: none.

    With `replaces` x does not come back at all: `unpack(gradient, part, *unpack_arguments)` takes
    the place of the one op of the backward that reads it. `pack` returns the one part alone.

    With `shares` nothing waits at all: x is made of other tensors that the step saves,
    `unpack(*tensors, *unpack_arguments)`, which the step knows (`Step.shared`).

    With a `carrier` the parts wait elsewhere; so does x itself where nothing packs it.
    """

    pack: Callable[..., Any] | None = None
    pack_arguments: tuple[Any, ...] = ()
    unpack: Callable[..., Any] | None = None
    unpack_arguments: tuple[Any, ...] = ()
    rounding: float = 0.0
    replaces: bool = False
    shares: bool = False
    carrier: Carrier | None = None
