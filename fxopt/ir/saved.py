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
class Image:
    """Another form in which a piece of memory waits for the backward.

    `pack(x, *pack_arguments)`, after the last op of the forward that reads x, returns the parts
    that are saved; `unpack(*parts, *unpack_arguments)`, before the first op of the backward that
    reads it, a tensor like x, with its strides. `rounding` is the relative error of that tensor
    that is to be expected (root mean square); 0: none.
    """

    pack: Callable[..., Any]
    pack_arguments: tuple[Any, ...]
    unpack: Callable[..., Any]
    unpack_arguments: tuple[Any, ...]
    rounding: float = 0.0
