"""Attention through a cache as a function: state in, state out, for export.

The past grows: dimension 2 of each of its tensors counts sink tokens, blocks or recent tokens,
and 0 is allowed, so that one graph serves prefill and decode. All sizes are arithmetic on the
sizes of inputs (never on those of intermediate slices, which a tracer may take for constants),
and nothing depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.decode_topk.reference import (
    TILE,
    as_bias,
    kept_keys,
    kept_tiles,
    ranges,
    shown_tiles,
)

from .heads import Arguments, Attend, block_mask, merge, take
from .kept import check, packed_ranges
from .layout import Blocks, parse, split_state
from .packing import join_blocks, pack_side, unpack_side

SIDES = ("key", "value")


def cached_attention_functional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Sequence[Tensor],
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    layout: str,
    attention: Attend | None = None,
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> tuple[Tensor, list[Tensor]]:
    """`fxopt::cached_attention` with the state as a value: (out, present).

    `past` holds, class by class, the tensors that `layout.functional_names` lists, each with a
    dimension 2 that grows (`layout.empty_past` makes one of length 0). Stored bytes equal those
    of the mutating op. mask [B, past + N] covers the past as well. ValueError where tiles are read
    that an earlier token chose: what they are does not grow.
    """
    if attention is None:
        from fxopt.kernels.attention import attention_traceable

        attention = attention_traceable
    num_kv_heads = k.shape[1]
    _same_length([q, k, v])
    parsed = parse(layout)
    if parsed.keeps_choices:
        raise ValueError(f"layout '{layout}' keeps which tiles are read, and a past does not")
    top_keys = parsed.top_keys(num_kv_heads)
    arguments = Arguments(
        q, bias, sinks, scale, causal, window, softcap, sink_tokens, top, delta, top_keys, hip,
        mass, skip, parsed.refresh(num_kv_heads),
    )  # fmt: skip
    outputs: list[Tensor] = []
    present: list[Tensor] = []
    classes = split_state(parsed, num_kv_heads, past, growing=True)
    for heads, fmt, part in classes:
        new = {"key": take(k, heads, 1), "value": take(v, heads, 1)}
        chosen = arguments.select(heads, num_kv_heads)
        check(chosen)
        for side in ("sink_", "", "recent_"):
            if f"{side}key" in part:
                _same_length([part[f"{side}key"], part[f"{side}value"]])
        if fmt is None:
            full = {side: torch.cat([part[side], new[side]], 2) for side in SIDES}
            if any(chosen.top_keys):
                chosen = _of_kept_tiles(chosen, part, full["key"], mask, None)
            outputs.append(chosen.attend(attention, full["key"], full["value"], mask))
            present.extend(full.values())
            continue
        keys, values = (
            torch.cat([*stored_pieces(part, side, fmt, q.dtype), new[side]], 2) for side in SIDES
        )
        if any(chosen.top_keys):
            chosen = _of_kept_tiles(chosen, part, keys, mask, fmt)
        outputs.append(chosen.attend(attention, keys, values, mask))
        present.extend(append(part, new, mask, fmt).values())
    return merge(outputs, [heads for heads, _, _ in classes]).contiguous(), present


def _of_kept_tiles(
    chosen: Arguments,
    part: dict[str, Tensor],
    keys: Tensor,
    mask: Tensor | None,
    fmt: Blocks | None,
) -> Arguments:
    """`chosen` with a bias that hides all but the kept tiles from the token of a call of one.

    Ranges of exact keys are found again in each call: hidden keys are read as well here.
    """
    total, queries = keys.shape[2], chosen.q.shape[2]
    if fmt is None:
        # One tile more than there are, since no size of a trace may be 0 or 1.
        size, first, room = TILE, 0, (total + TILE - 1) // TILE + 1
        more = room * TILE - total
        known = None if mask is None else F.pad(mask, (0, more))
        low, high = ranges(F.pad(keys, (0, 0, 0, more)), known)
        whole: Any = (total - queries) // TILE
    else:
        size, first, whole = fmt.group, fmt.sink, part["key"].shape[2]
        room = whole + 1
        low, high = (F.pad(x, (0, 0, 0, 1)) for x in packed_ranges(part, fmt))
    one = torch.arange(1, device=keys.device)
    shown = shown_tiles(mask, first + torch.arange(room + 1, device=keys.device) * size)
    top_keys, last = chosen.top_keys[0], chosen.q.narrow(2, queries - 1, 1)
    kept = kept_tiles(last, low, high, shown, one + whole, top_keys, size, chosen.scale)
    seen = kept_keys(kept, one + whole, total, first, size) | (one + queries > 1)
    return replace(chosen, bias=as_bias(seen, chosen.q))


def stored_pieces(
    part: dict[str, Tensor], side: str, fmt: Blocks, dtype: torch.dtype
) -> list[Tensor]:
    """All stored keys (or values) in the order of positions, as the attention reads them."""
    image = unpack_side(part, side, fmt.bits(side), dtype)
    batch, heads, blocks, group, channels = image.shape
    pieces = [image.reshape(batch, heads, blocks * group, channels), part[f"recent_{side}"]]
    return [part[f"sink_{side}"], *pieces] if fmt.sink else pieces


def append(
    part: dict[str, Tensor], new: dict[str, Tensor], mask: Tensor | None, fmt: Blocks
) -> dict[str, Tensor]:
    """The present: sink filled first, then blocks packed up to the schedule, the rest recent."""
    old_blocks = part["key"].shape[2]
    old_sink = part["sink_key"].shape[2] if fmt.sink else 0
    unpacked = old_sink + part["recent_key"].shape[2] + new["key"].shape[2]
    length = unpacked + old_blocks * fmt.group
    due = (length - fmt.sink - fmt.residual) // fmt.group
    fresh_blocks: Any = torch.sym_max(due, old_blocks) - old_blocks
    packed = fresh_blocks * fmt.group
    # A sink that is not full comes with no block and nothing recent, so that what is exact is
    # always one run of positions, and no slice of it is empty in a trace.
    sink: Any = torch.sym_min(length, fmt.sink)
    valid = block_mask(mask, sink + old_blocks * fmt.group, fresh_blocks, fmt.group)
    present: dict[str, Tensor] = {}
    for side in SIDES:
        pieces = [part[f"recent_{side}"], new[side]]
        if fmt.sink:
            pieces.insert(0, part[f"sink_{side}"])
        exact = torch.cat(pieces, 2)
        batch, heads, _, channels = exact.shape
        if fmt.sink:
            present[f"sink_{side}"] = exact.narrow(2, 0, sink)
        fresh = exact.narrow(2, sink, packed)
        fresh = fresh.reshape(batch, heads, fresh_blocks, fmt.group, channels)
        for name, value in pack_side(fresh, valid, side, fmt.bits(side)).items():
            present[name] = join_blocks(part[name], value)
        rest = unpacked - sink - packed
        present[f"recent_{side}"] = exact.narrow(2, sink + packed, rest)
    return present


def _same_length(tensors: Sequence[Tensor]) -> None:
    """Tell a tracer that these tensors grow together."""
    for tensor in tensors[1:]:
        torch._check(tensor.shape[2] == tensors[0].shape[2])  # pyright: ignore[reportPrivateUsage]
