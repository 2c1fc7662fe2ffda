"""Pinned host memory, allocated once for each size and lent from step to step."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.errors import FxoptError


class Pool:
    """Buffers of exact sizes, by size.

    PyTorch's own pinned allocator rounds up to powers of two. What is lent comes back when the
    last tensor over it dies: after the backward, or when a graph is dropped without one. Copies
    out of it may still be queued then, so all copies of a pool must be on one stream.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self.bytes = 0

    def take(self, size: int, *, pin: bool) -> Tensor:
        """`size` bytes, uint8 [size]; FxoptError where the host has no more to pin."""
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()
        except IndexError:
            block = self._new(size, pin)
        # a view of its own is what tells that nobody holds it any more
        lent = block.numpy()[:]
        weakref.finalize(lent, free.append, block).atexit = False
        return torch.from_numpy(lent)

    def _new(self, size: int, pin: bool) -> Tensor:
        block = torch.empty(size, dtype=torch.uint8)
        if pin:
            runtime: Any = torch.cuda.cudart()
            if int(runtime.cudaHostRegister(block.data_ptr(), size, 0)):
                raise FxoptError(
                    f"activation.offload: the host cannot pin {size} bytes beside {self.bytes}; "
                    "leave the rewrite out with rewrites=, or raise the limit of locked memory"
                )
        self.bytes += size
        return block
