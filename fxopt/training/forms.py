"""Ways for a saved tensor to get to the backward, priced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ..ir.saved import Image


@dataclass(frozen=True)
class Form:
    """An image of a piece of memory. `label` tells it from the others of a site.

    `bytes` while it waits on the device; `packing` and `unpacking` are bytes that these take
    beside what they make; `seconds` is what both take. `error` is the square of the relative error
    of the gradients that is expected of it, which adds up over tensors; 0: exact. `host` bytes lie
    in host memory, and `transfer` seconds take them there beside other calls, and as many back;
    what was packed takes `packed` bytes on the device meanwhile.
    """

    image: Image
    label: str
    bytes: int
    packing: int = 0
    unpacking: int = 0
    seconds: float = 0.0
    error: float = 0.0
    host: int = 0
    transfer: float = 0.0
    packed: int = 0

    @property
    def bounded(self) -> bool:
        """Whether ops wait so that few copies are under way at once."""
        return self.image.carrier is not None and self.image.carrier.depth is not None

    @property
    def restores(self) -> bool:
        """Whether what is computed from the tensor that comes back is what it was."""
        return not self.error and not self.image.replaces


State = Literal["first", "sent", "image", "fetched", "again"]
"""Memory as the forward made it, its codes on their way to elsewhere, what waits for the backward,
the codes on their way back, and the memory as the backward made it again."""

Call = Literal["pack", "send", "release", "fetch", "arrive", "unpack"]
"""What is called for an image, in order; copies end with "release" and "arrive"."""

OUTWARD: tuple[Call, ...] = ("pack", "send", "release")
"""Those of the forward."""


def states(image: Image, call: Call) -> tuple[State, State]:
    """The memory that a call for an image reads and makes, or makes whole."""
    leaving: State = "sent" if image.pack else "first"
    coming: State = "fetched" if image.pack else "again"
    if call == "pack":
        return "first", "sent" if image.carrier else "image"
    if call == "unpack":
        return "fetched" if image.carrier else "image", "again"
    return (leaving, "image") if call in OUTWARD else ("image", coming)


Treatment = Form | Literal["again"]
Choices = Mapping[fx.Node, Treatment]
"""What happens to saved memory, by owner; the owners that are not named are kept."""


def again(choices: Choices) -> frozenset[fx.Node]:
    """The owners that are computed again."""
    return frozenset(owner for owner, chosen in choices.items() if not isinstance(chosen, Form))


def images(choices: Choices) -> dict[fx.Node, Form]:
    """The owners that wait in another form."""
    return {owner: chosen for owner, chosen in choices.items() if isinstance(chosen, Form)}


@torch.no_grad()
def parts_of(image: Image, value: Any) -> tuple[Any, ...]:
    """What packing the fake tensor `value` returns; itself, where nothing packs it."""
    if image.pack is None:
        return (value,)
    packed = image.pack(value, *image.pack_arguments)
    return packed if isinstance(packed, tuple) else (packed,)


@torch.no_grad()
def waiting(image: Image, value: Any) -> tuple[Any, ...]:
    """What waits for the backward in place of the fake tensor `value`."""
    parts = parts_of(image, value)
    return tuple(map(image.carrier.send, parts)) if image.carrier else parts
