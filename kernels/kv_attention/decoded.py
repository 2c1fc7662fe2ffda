"""What decoding through a packed cache computes, in one pass over a whole sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxopt.kernels.decode_topk.reference import (
    TILE,
    as_bias,
    choosers,
    kept_keys,
    kept_tiles,
    ranges,
    shown_tiles,
    tiles_read,
)

from .filled import fill, filled_attention
from .heads import Arguments, Attend, block_mask, merge, take
from .kept import check, packed_ranges
from .layout import Blocks, first_choice, parse, tile_size
from .packing import pack_side, unpack_side

QUERIES = 64
"""Decoded tokens whose masks exist at a time, where each reads tiles of its own."""


def decoded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    layout: str,
    prompt: int,
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
    attention: Attend | None = None,
) -> Tensor:
    """The outputs of a prefill of `prompt` tokens and one decoding step for each further one.

    Arguments as `fxopt.ir.ops.attend` without a state, k and v of as many tokens as q. A query at
    position i >= prompt sees the packed image of the keys that a cache of i tokens has packed and
    the exact ones above, in heads that read some tiles of both alone those that it chooses, or
    that were chosen for it; a query of the prompt
    sees every key exactly, or those of the tiles that `top` keeps or `skip` does not leave out of
    the prompt, and is corrected by `delta`. Beside the result it takes one copy of the keys and
    values of a head class. Keys of another sequence (not `causal`) were all stored before:
    every query sees the image of what `fill` packs of them.
    """
    if attention is None:
        from fxopt.kernels.attention.reference import attention_reference

        attention = attention_reference
    total = q.shape[2]
    num_kv_heads = k.shape[1]
    if not causal:
        state = fill(k, v, mask, layout)
        return filled_attention(q, state, mask, bias, sinks, scale, softcap, layout, attention)
    if k.shape[2] != total:
        raise ValueError(
            "decoded_attention needs whole sequences of causal self-attention; got "
            f"{total} queries and {k.shape[2]} keys"
        )
    parsed = parse(layout)
    top_keys = parsed.top_keys(num_kv_heads)
    arguments = Arguments(
        q, bias, sinks, scale, causal, window, softcap, sink_tokens, top, delta, top_keys, hip,
        mass, skip, parsed.refresh(num_kv_heads),
    )  # fmt: skip
    classes = parsed.resolve(num_kv_heads)
    outputs: list[Tensor] = []
    for heads, fmt in classes:
        chosen = arguments.select(heads, num_kv_heads)
        check(chosen)
        keys, values = take(k, heads, 1), take(v, heads, 1)
        alike = not any((*chosen.top, *chosen.delta, *chosen.skip, *chosen.top_keys))
        if (fmt is None or fmt.packed(total - 1) == 0) and alike:
            outputs.append(chosen.attend(attention, keys, values, mask))
        else:
            outputs.append(_decode(chosen, keys, values, mask, fmt, min(prompt, total), attention))
    return merge(outputs, [heads for heads, _ in classes]).contiguous()


def _decode(
    arguments: Arguments,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    fmt: Blocks | None,
    prompt: int,
    attention: Attend,
) -> Tensor:
    """One head class: the queries in runs that see the same boundary, images copied in between."""
    total = k.shape[2]
    mixed_k, mixed_v = (k, v) if fmt is None else (k.clone(), v.clone())
    packed = 0
    ends = ranges(k, mask) if fmt is None else (k[:, :, :0], k[:, :, :0])
    outputs: list[Tensor] = []
    for low, high, boundary in query_runs(total, prompt, fmt):
        if fmt is not None and boundary > packed:
            span = slice(fmt.sink + packed, fmt.sink + boundary)
            blocks = (boundary - packed) // fmt.group
            valid = block_mask(mask, fmt.sink + packed, blocks, fmt.group)
            mixed_k[:, :, span], stored = _image(k[:, :, span], valid, "key", fmt)
            mixed_v[:, :, span], _ = _image(v[:, :, span], valid, "value", fmt)
            if any(arguments.top_keys):
                fresh = packed_ranges(stored, fmt)
                ends = (torch.cat([ends[0], fresh[0]], 2), torch.cat([ends[1], fresh[1]], 2))
            packed = boundary
        bias = arguments.bias
        if bias is not None:
            bias = (bias if bias.shape[2] == 1 else bias[:, :, low:high])[..., :high]
        run = replace(
            arguments if high <= prompt else arguments.past_prompt(k.shape[1]),
            q=arguments.q[:, :, low:high], bias=bias,
        )  # fmt: skip
        seen = None if mask is None else mask[:, :high]
        keys, values = mixed_k[:, :, :high], mixed_v[:, :, :high]
        if low >= prompt and any(arguments.top_keys):
            by = choosers(
                torch.arange(low, high, device=k.device), first_choice(fmt, prompt),
                arguments.refresh[0],
            )  # fmt: skip
            asked = arguments.q.index_select(2, by)
            outputs += _of_kept_tiles(run, asked, by, keys, values, seen, ends, fmt, attention)
        else:
            outputs.append(run.attend(attention, keys, values, seen))
    return torch.cat(outputs, 1)


def _of_kept_tiles(
    run: Arguments,
    asked: Tensor,
    by: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ends: tuple[Tensor, Tensor],
    fmt: Blocks | None,
    attention: Attend,
) -> Iterator[Tensor]:
    """The last queries of a sequence, each over the tiles that the query `asked` chose for it, at
    position `by` [N], of those that were whole then; some at a time, as what each of them sees is
    a mask of its own."""
    begin, end = k.shape[2] - run.q.shape[2], k.shape[2]
    for low in range(begin, end, QUERIES):
        high = min(end, low + QUERIES)
        rows = slice(low - begin, high - begin)
        q, whole = run.q[:, :, rows], _whole(by[rows], fmt)
        seen = _read(asked[:, :, rows], ends, mask, whole, high, fmt, run.top_keys[0], run.scale)
        known = None if mask is None else mask[:, :high]
        part = replace(run, q=q, bias=None if seen is None else as_bias(seen, q))
        yield part.attend(attention, k[:, :, :high], v[:, :, :high], known)


def keys_read(
    q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, fmt: Blocks | None, top_keys: int,
    scale: float, refresh: int = 1, prompt: int = 0,
) -> Tensor:  # fmt: skip
    """Which keys the tokens at positions `rows` [R] read when they are decoded from a head class
    of `top_keys`, later ones included: bool [B, KV, R, T].

    q [B, H, T, D], k [B, KV, T, D] and mask [B, T] are those of the whole sequence, which is
    decoded behind `prompt` tokens.
    """
    rows = choosers(rows, first_choice(fmt, prompt), refresh)
    q, whole = q.index_select(2, rows), _whole(rows, fmt)
    if fmt is None:
        ends = ranges(k, mask)
    else:
        blocks = fmt.packed(k.shape[2]) // fmt.group
        keys = k[:, :, fmt.sink : fmt.sink + blocks * fmt.group].unflatten(2, (blocks, fmt.group))
        valid = block_mask(mask, fmt.sink, blocks, fmt.group)
        ends = packed_ranges(pack_side(keys, valid, "key", fmt.key_bits), fmt)
    seen = _read(q, ends, mask, whole, k.shape[2], fmt, top_keys, scale)
    if seen is not None:
        return seen
    return torch.ones(*k.shape[:2], len(rows), k.shape[2], dtype=torch.bool, device=k.device)


def _whole(rows: Tensor, fmt: Blocks | None) -> Tensor:
    """How many tiles are whole when the tokens at positions `rows` come."""
    if fmt is None:
        return rows // TILE
    packed = [fmt.packed(row) // fmt.group for row in rows.tolist()]
    return torch.tensor(packed, dtype=rows.dtype, device=rows.device)


def _read(
    q: Tensor, ends: tuple[Tensor, Tensor], mask: Tensor | None, whole: Tensor, keys: int,
    fmt: Blocks | None, top_keys: int, scale: float,
) -> Tensor | None:  # fmt: skip
    """Which of `keys` positions each query reads, by the ranges of the tiles, the first `whole` [N]
    of which are whole when it comes; None where there are too few tiles to leave some out."""
    size, first, tiles = tile_size(fmt), fmt.sink if fmt else 0, ends[0].shape[2]
    if tiles <= tiles_read(top_keys, size):
        return None
    shown = shown_tiles(mask, first + torch.arange(tiles + 1, device=q.device) * size)
    kept = kept_tiles(q, *ends, shown, whole, top_keys, size, scale)
    return kept_keys(kept, whole, keys, first, size)


def query_runs(total: int, prompt: int, fmt: Blocks | None) -> list[tuple[int, int, int]]:
    """(first, end, boundary): queries that see as many packed tokens, the prompt's none."""
    runs = [(0, prompt, 0)] if prompt else []
    low = prompt
    if fmt is None:
        return [*runs, (prompt, total, 0)] if prompt < total else runs
    while low < total:
        boundary = fmt.packed(low)
        high = min(total, boundary + fmt.group + fmt.sink + fmt.residual)
        runs.append((low, high, boundary))
        low = high
    return runs


def _image(
    x: Tensor, valid: Tensor | None, side: str, fmt: Blocks
) -> tuple[Tensor, dict[str, Tensor]]:
    """`x` [B, h, blocks * group, D] as it comes back from packed storage, and what is stored."""
    bits = fmt.bits(side)
    stored = pack_side(x.unflatten(2, (-1, fmt.group)), valid, side, bits)
    return unpack_side(stored, side, bits, x.dtype).flatten(2, 3), stored
