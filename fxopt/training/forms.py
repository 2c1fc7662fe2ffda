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
    in host memory, and `transfer` seconds take them there beside other calls, and as many back.
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

    @property
    def restores(self) -> bool:
        """Whether what is computed from the tensor that comes back is what it was."""
        return not self.error and not self.image.replaces


Treatment = Form | Literal["again"]
Choices = Mapping[fx.Node, Treatment]
"""What happens to saved memory, by owner; the owners that are not named are kept."""


def again(choices: Choices) -> frozenset[fx.Node]:
    """The owners that are computed again."""
    return frozenset(owner for owner, chosen in choices.items() if not isinstance(chosen, Form))


def images(choices: Choices) -> dict[fx.Node, Form]:
    """The owners that wait in another form."""
    return {owner: chosen for owner, chosen in choices.items() if isinstance(chosen, Form)}


def parts_of(image: Image, value: Any) -> tuple[Any, ...]:
    """What packing the fake tensor `value` returns."""
    with torch.no_grad():
        packed = image.pack(value, *image.pack_arguments)
    return packed if isinstance(packed, tuple) else (packed,)
