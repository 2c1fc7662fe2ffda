"""Attention through a cache that is written in place: what runs while generating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fxopt.kernels.decode_topk.reference import TILE

from .heads import Arguments, Attend, merge, take
from .kept import (
    Tiles,
    attend_kept,
    check,
    chooses,
    exact_tiles,
    kept_places,
    leaves_some,
    note_ranges,
    packed_tiles,
)
from .layout import Blocks, parse, split_state
from .packing import pack_side, unpack_side
from .pages import room, store, stored

SIDES = ("key", "value")
Part = dict[str, Tensor]
Kernels = Callable[
    [Arguments, Part, Part, Tensor, Tensor | None, Blocks | None, int | None], Tensor
]


def cached_attention_mutating(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    start: Tensor,
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
    kernels: Kernels | None = None,
    length: int | None = None,
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    """`fxopt::cached_attention` in plain PyTorch.

    The new tokens are attended exactly and packed afterwards. `attention` computes what is
    exact; `kernels`, where given, compute a head class and store its tokens. `length` is what
    `start` holds; without it the call may wait for the device. Raises ValueError when the state
    has no room, or when the mask does not cover the past and the new tokens.
    """
    if attention is None:
        from fxopt.kernels.attention.reference import attention_reference

        attention = attention_reference
    num_kv_heads = k.shape[1]
    parsed = parse(layout)
    top_keys = parsed.top_keys(num_kv_heads)
    arguments = Arguments(
        q, bias, sinks, scale, causal, window, softcap, sink_tokens, top, delta, top_keys, hip,
        mass, skip, parsed.refresh(num_kv_heads),
    )  # fmt: skip
    outputs: list[Tensor] = []
    classes = split_state(parsed, num_kv_heads, state)
    for heads, fmt, part in classes:
        chosen = arguments.select(heads, num_kv_heads)
        check(chosen)
        new = {"key": take(k, heads, 1), "value": take(v, heads, 1)}
        if kernels is not None:
            outputs.append(kernels(chosen, new, part, start, mask, fmt, length))
            continue
        begin = tokens_before(q.shape[2], start, mask, length)
        if fmt is None:
            outputs.append(attend_exact(attention, chosen, new, part, mask, begin))
        else:
            outputs.append(attend_image(attention, chosen, new, part, mask, fmt, begin))
            append_packed(part, fmt, new, mask, begin)
    return merge(outputs, [heads for heads, _, _ in classes]).contiguous()


def tokens_before(queries: int, start: Tensor, mask: Tensor | None, length: int | None) -> int:
    """The value of `start`; waits for the device only where neither `length` nor the mask tells."""
    if length is None:
        if mask is not None and start.device.type != "cpu":
            return mask.shape[1] - queries
        length = int(start)
    if mask is not None and mask.shape[1] != length + queries:
        raise ValueError(
            f"the mask covers {mask.shape[1]} tokens, the cache holds {length} and {queries} "
            "are new: it has to cover both"
        )
    return length


def attend_exact(
    attention: Attend, chosen: Arguments, new: Part, part: Part, mask: Tensor | None, begin: int
) -> Tensor:
    """Attention over the stored and the new tokens of an exact head class, which are stored."""
    keys, values = append_exact(part, new, mask, begin)
    if chooses(chosen, begin // TILE, TILE):
        tiles, held = exact_tiles(part, begin), (part, None)
        if leaves_some(chosen, tiles):
            rest = [x[:, :, begin // TILE * TILE :] for x in (keys, values)]
            return attend_kept(attention, chosen, tiles, held, rest, mask, begin)
        kept_places(chosen, part, tiles, mask, begin)
    return chosen.attend(attention, keys, values, mask)


def attend_image(
    attention: Attend,
    chosen: Arguments,
    new: Part,
    part: Part,
    mask: Tensor | None,
    fmt: Blocks,
    begin: int,
) -> Tensor:
    """Attention over the stored tokens, packed ones dequantised, and the new ones."""
    if begin == 0:
        return chosen.attend(attention, new["key"], new["value"], mask)
    used = blocks_used(part)
    if chooses(chosen, used, fmt.group):
        tiles, held = packed_tiles(part, fmt, used), (part, fmt)
        if leaves_some(chosen, tiles):
            apart = ([*_exact_pieces(part, side, fmt, begin), new[side]] for side in SIDES)
            rest = [torch.cat(pieces, 2) for pieces in apart]
            return attend_kept(attention, chosen, tiles, held, rest, mask, begin)
        kept_places(chosen, part, tiles, mask, begin)
    keys, values = (
        torch.cat([*_pieces(part, side, fmt, begin, chosen.q.dtype), new[side]], 2)
        for side in SIDES
    )
    return chosen.attend(attention, keys, values, mask)


def append_exact(part: Part, new: Part, mask: Tensor | None, begin: int) -> tuple[Tensor, Tensor]:
    """Write the new tokens; all keys and values so far, as views."""
    end = begin + new["key"].shape[2]
    capacity = part["key"].shape[2]
    if end > capacity:
        raise ValueError(_full(end, capacity))
    for side in SIDES:
        part[side].narrow(2, begin, end - begin).copy_(new[side])
    note_ranges(part, begin, end, mask)
    return part["key"].narrow(2, 0, end), part["value"].narrow(2, 0, end)


def gather(part: Part, side: str, fmt: Blocks, begin: int, dtype: torch.dtype) -> Tensor:
    """The stored tokens [B, h, begin, D] in order, packed ones through their image."""
    return torch.cat(_pieces(part, side, fmt, begin, dtype), 2)


def _pieces(part: Part, side: str, fmt: Blocks, begin: int, dtype: torch.dtype) -> list[Tensor]:
    starts: list[int] = part["block_start"].tolist()
    used = blocks_used(part)
    blocks = stored(part, (side, f"{side}_scale", f"{side}_zero"), used)
    image = unpack_side(blocks, side, fmt.bits(side), dtype).flatten(2, 3)
    if used * fmt.group != starts[-1]:
        image = image[:, :, _slots(starts[: used + 1], fmt.group, image.device)]
    *sink, newest = _exact_pieces(part, side, fmt, begin)
    return [*sink, image, newest]


def _exact_pieces(part: Part, side: str, fmt: Blocks, begin: int) -> list[Tensor]:
    """What of the stored tokens is no block: the sink, if the format has one, and recent ones."""
    newest = recent(part, side, int(part["block_start"][-1]), begin - fmt.sink)
    return [part[f"sink_{side}"][:, :, : min(begin, fmt.sink)], newest] if fmt.sink else [newest]


def tiles_of(part: Part, fmt: Blocks | None, begin: int) -> Tiles:
    """The whole tiles of a class of `begin` tokens."""
    return exact_tiles(part, begin) if fmt is None else packed_tiles(part, fmt, blocks_used(part))


def blocks_used(part: Part) -> int:
    """Blocks that hold tokens."""
    return int((part["block_start"].diff() > 0).sum())


def _slots(starts: list[int], group: int, device: torch.device) -> Tensor:
    """Where the tokens of blocks lie that hold fewer than `group` of them."""
    slots = [
        block * group + place
        for block, (low, high) in enumerate(pairwise(starts))
        for place in range(high - low)
    ]
    return torch.tensor(slots, device=device)


def recent(part: Part, side: str, low: int, high: int) -> Tensor:
    """The unpacked tokens of positions [low, high) from the sink's end, out of their ring."""
    ring = part[f"recent_{side}"]
    if high <= low:
        return ring[:, :, :0]
    return ring[:, :, torch.arange(low, high, device=ring.device) % ring.shape[2]]


def append_packed(part: Part, fmt: Blocks, new: Part, mask: Tensor | None, begin: int) -> None:
    """Store the new tokens: the sink first, then whole blocks, the newest in the ring."""
    queries = new["key"].shape[2]
    to_sink = min(queries, max(0, fmt.sink - begin))
    low, end = max(0, begin - fmt.sink), max(0, begin + queries - fmt.sink)
    starts = part["block_start"]
    old = int(starts[-1])
    packed = max(old, fmt.packed(begin + queries))
    bounds = block_bounds(old, packed, fmt.group)
    used = blocks_used(part)
    if used + len(bounds) > room(part) or end - packed > part["recent_key"].shape[2]:
        raise ValueError(_full(begin + queries, _capacity(part, fmt)))
    for side in SIDES:
        x = new[side]
        if to_sink:
            part[f"sink_{side}"][:, :, begin : begin + to_sink] = x[:, :, :to_sink]
        x = x[:, :, to_sink:]
        if bounds:
            before = recent(part, side, old, min(low, packed))
            tail = torch.cat([before, x[:, :, : max(0, packed - low)]], 2)
            _pack(part, side, fmt, tail, mask, bounds, used)
        kept = max(packed, low)
        if end > kept:
            ring = part[f"recent_{side}"]
            places = torch.arange(kept, end, device=ring.device) % ring.shape[2]
            ring[:, :, places] = x[:, :, kept - low :]
    if bounds:
        ends = torch.tensor([high for _, high in bounds], device=starts.device)
        starts[used + 1 : used + 1 + len(bounds)] = ends
        starts[used + 1 + len(bounds) :] = packed


def block_bounds(old: int, packed: int, group: int) -> list[tuple[int, int]]:
    """Positions of the blocks to pack; the first is short where a crop cut one before."""
    bounds: list[tuple[int, int]] = []
    while old < packed:
        high = (old // group + 1) * group
        bounds.append((old, high))
        old = high
    return bounds


def _pack(
    part: Part,
    side: str,
    fmt: Blocks,
    tail: Tensor,
    mask: Tensor | None,
    bounds: list[tuple[int, int]],
    used: int,
) -> None:
    """Pack `tail` [B, h, tokens, D], which begins at the first bound, into blocks from `used`."""
    low, high = bounds[0][0], bounds[-1][1]
    short = fmt.group - (bounds[0][1] - low)
    valid = None
    if mask is not None:
        valid = mask[:, fmt.sink + low : fmt.sink + high] != 0
    if short:
        # The slots that stay free at the end of the first block.
        hole = bounds[0][1] - low
        free = tail.new_zeros(*tail.shape[:2], short, tail.shape[3])
        tail = torch.cat([tail[:, :, :hole], free, tail[:, :, hole:]], 2)
        if valid is None:
            valid = torch.ones(tail.shape[0], high - low, dtype=torch.bool, device=tail.device)
        padding = valid.new_zeros(valid.shape[0], short)
        valid = torch.cat([valid[:, :hole], padding, valid[:, hole:]], 1)
    fresh = tail.unflatten(2, (len(bounds), fmt.group))
    if valid is not None:
        valid = valid.reshape(-1, 1, len(bounds), fmt.group, 1)
    for name, value in pack_side(fresh, valid, side, fmt.bits(side)).items():
        store(part, name, used, value)


def _capacity(part: Part, fmt: Blocks) -> int:
    return fmt.sink + room(part) * fmt.group + part["recent_key"].shape[2]


def _full(needed: int, capacity: int) -> str:
    return (
        f"the KV cache has room for about {capacity} tokens and {needed} are needed; "
        f"call cache.reserve({needed}) before the model, or allocate a larger cache"
    )
