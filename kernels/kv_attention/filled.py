"""A state that is filled once and only read after: keys and values of cross-attention.

It is the growing form (`layout.functional_names`) with every token in it. Nothing is appended, so
how many blocks and recent tokens there are is in the shapes, and reading waits for no device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import SIDES, append, stored_pieces
from .heads import Arguments, Attend, merge, take
from .layout import FIXED, FLOAT, Blocks, Layout, empty_past, layout_shapes, parse, split_state


def fill(k: Tensor, v: Tensor, mask: Tensor | None, layout: str) -> list[Tensor]:
    """The state of k [B, KV, T, D] and v [B, KV, T, Dv], packed as `layout` says.

    mask [B, T], nonzero where a token is no padding: padding enters no range.
    """
    parsed, num_kv_heads = parse(layout), k.shape[1]
    empty = empty_past(parsed, k.shape[0], num_kv_heads, k.shape[3], v.shape[3], k.dtype, k.device)
    found: list[Tensor] = []
    for heads, fmt, part in split_state(parsed, num_kv_heads, empty, growing=True):
        new = {"key": take(k, heads, 1), "value": take(v, heads, 1)}
        stored = new if fmt is None else append(part, new, mask, fmt)
        # A slice would keep all that was computed alive.
        found += [stored[name].clone(memory_format=torch.contiguous_format) for name in part]
    return found


def filled_attention(
    q: Tensor,
    state: Sequence[Tensor],
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    layout: str,
    attention: Attend | None = None,
) -> Tensor:
    """Attention of q [B, H, N, D] over all T tokens of a filled state; returns [B, N, H, Dv].

    mask [B, T]; bias as in `attend`. Packed tokens are seen through their image.
    """
    if attention is None:
        from fxopt.kernels.attention.reference import attention_reference

        attention = attention_reference
    arguments = Arguments(q, bias, sinks, scale, False, [0], softcap, [0])
    outputs: list[Tensor] = []
    parsed = parse(layout)
    named = sum(len(entry.heads) for entry in parsed.classes)
    classes = split_state(parsed, named or state[0].shape[1], state, growing=True)
    for heads, fmt, part in classes:
        keys, values = (_stored(part, side, fmt, q.dtype) for side in SIDES)
        chosen = arguments.select(heads, named or len(heads))
        outputs.append(chosen.attend(attention, keys, values, mask))
    return merge(outputs, [heads for heads, _, _ in classes]).contiguous()


def _stored(part: dict[str, Tensor], side: str, fmt: Blocks | None, dtype: torch.dtype) -> Tensor:
    return part[side] if fmt is None else torch.cat(stored_pieces(part, side, fmt, dtype), 2)


def filled_bytes(
    layout: Layout,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    length: int,
    element_size: int,
) -> int:
    """Bytes of a state that `fill` makes of `length` tokens."""
    dtype = FLOAT[element_size]
    shapes = layout_shapes(layout, batch, num_kv_heads, head_dim, value_dim, length, dtype)
    total = 0
    for (_, fmt), entry in zip(layout.resolve(num_kv_heads), shapes, strict=True):
        for name, (shape, kind) in entry.items():
            if fmt is not None and name.startswith("recent_"):
                rest = max(0, length - fmt.sink - fmt.packed(length))
                shape = (*shape[:2], rest, *shape[3:])
            elif fmt is not None and name.startswith("sink_"):
                shape = (*shape[:2], min(length, fmt.sink), *shape[3:])
            if name not in FIXED:
                total += math.prod(shape) * kind.itemsize
    return total
