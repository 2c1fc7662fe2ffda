"""Sizes at which the growing form can be traced: no dimension is 0 or 1, or equal by chance."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fxopt.kernels.kv_attention.layout import FIXED, Layout, layout_shapes


def example_lengths(layouts: Iterable[Layout]) -> tuple[int, int]:
    """(past, queries) for tracing one graph over layers of these layouts.

    Every head class then has at least two blocks and two recent tokens, and packs at least two
    blocks more in the call.
    """
    formats = [entry.format for layout in layouts for entry in layout.classes if entry.format]
    if not formats:
        return 5, 3
    queries = 2 * max(fmt.group for fmt in formats) + 3
    past = max(fmt.sink + fmt.residual + 2 * fmt.group for fmt in formats) + 2
    while any(past - _sink(fmt.sink) - fmt.packed(past) < 2 for fmt in formats):
        past += 1
    return past, queries


def example_past(
    layout: Layout,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    past: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Zeros in the growing form with `past` tokens, as `example_lengths` chose them."""
    found: list[Tensor] = []
    shapes = layout_shapes(layout, batch, num_kv_heads, head_dim, value_dim, past, dtype)
    for (_, fmt), entry in zip(layout.resolve(num_kv_heads), shapes, strict=True):
        for name, (shape, kind) in entry.items():
            size = shape[2] if len(shape) > 2 else 0
            if fmt is not None and name.startswith("sink_"):
                size = _sink(fmt.sink)
            elif fmt is not None and name.startswith("recent_"):
                size = past - _sink(fmt.sink) - fmt.packed(past)
            if name not in FIXED:
                shape = (*shape[:2], size, *shape[3:])
                found.append(torch.zeros(shape, dtype=kind, device=device))
    return found


def _sink(tokens: int) -> int:
    """A tracer takes a dimension of 1 for a constant; which tokens are sinks matters to none."""
    return max(2, tokens) if tokens else 0
