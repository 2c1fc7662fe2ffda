"""What one KV head's cache costs: the op calls of decoding through it, of filling it, and of
rotating what goes there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.ops import mix_channels, rotate_both
from fxopt.ir.rewrite import Match
from fxopt.ir.site import AttentionInfo
from fxopt.ir.workload import Scenario
from fxopt.kernels.decode_topk.reference import tiles_read
from fxopt.kernels.kv_attention.filled import fill, filled_bytes
from fxopt.kernels.kv_attention.layout import (
    CHOICE,
    Blocks,
    HeadClass,
    Layout,
    allocate,
    left_out,
    split_state,
    state_bytes,
    tile_size,
)
from fxopt.kernels.kv_attention.op import (
    cached_attention,
    choose_anew,
    filled_attention,
    store_first,
)

_SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
}


def attention_info(match: Match) -> AttentionInfo:
    """The facts of a matched attention or cache site."""
    info = match.site.info
    assert isinstance(info, AttentionInfo)
    return info


def cached_calls(
    info: AttentionInfo, fmt: Blocks | None, scenario: Scenario, window: int = 0
) -> list[OpCall]:
    """`cached_call`, and where a choice of tiles is kept for `info.refresh` tokens the part of
    making one that falls to each of them."""
    call = cached_call(info, fmt, scenario, window)
    return [call, choosing_call(info, fmt, scenario)] if _keeps(info, scenario) else [call]


def _keeps(info: AttentionInfo, scenario: Scenario) -> bool:
    """Whether a call may read what another one chose."""
    return _chooses(info, scenario) and info.refresh > 1


def _chooses(info: AttentionInfo, scenario: Scenario) -> bool:
    return info.top_keys > 0 and scenario.queries == 1 and scenario.past > 0


def cached_call(
    info: AttentionInfo, fmt: Blocks | None, scenario: Scenario, window: int = 0
) -> OpCall:
    """One KV head and its query heads with the cache in `fmt` (None: exactly).

    With a past: attention over it and the new tokens, reading only `window` tokens if that is
    set, or a single token the tiles of `info.top_keys` of them and, unless they are kept from
    one before (`choosing_call`), what tells these apart (of cross-attention: over all
    `scenario.length` tokens, none of them new). Without one: only what filling the cache reads and
    writes. `state_bytes` are those at the length that the call ends with.
    """
    size = info.dtype.itemsize
    held = _bytes(info, fmt, scenario.batch, scenario.length, size)
    op = "fxopt::filled_attention" if info.cross else "fxopt::cached_attention"
    added = 0 if info.cross and scenario.past else scenario.queries
    new = scenario.batch * added * (info.head_dim + info.value_dim) * size
    if scenario.past == 0:
        return OpCall(
            op=op,
            key=f"kv_fill/{_signature(info, fmt, scenario, window)}",
            flops=0.0,
            bytes_read=new,
            bytes_written=held,
            state_bytes=held,
            share=info.num_kv_heads,
            family=f"kv_fill/{_family(info, fmt, 0)}",
            run=None if info.cross else _storer(info, fmt, scenario),
        )
    group = info.num_heads // info.num_kv_heads
    seen = min(scenario.length, window + scenario.queries - 1) if window else scenario.length
    seen -= hidden_keys(info, fmt, scenario)
    chooses = _chooses(info, scenario)
    ends = 0 if _keeps(info, scenario) else _ends(info, fmt, scenario)
    plain = replace(info, top_keys=0, refresh=1)
    stored = _bytes(plain, fmt, scenario.batch, scenario.length, size)
    read = stored * seen // max(1, scenario.length) + ends * (2 if fmt else size)
    rows = scenario.batch * group * scenario.queries
    return OpCall(
        op=op,
        key=f"kv_attention/{_signature(info, fmt, scenario, window)}",
        flops=2.0 * rows * seen * (info.head_dim + info.value_dim) + 2.0 * group * ends,
        bytes_read=read + new + rows * info.head_dim * size,
        bytes_written=new + rows * info.value_dim * size,
        state_bytes=held,
        temporary_bytes=_image_bytes(info, fmt, scenario),
        launches=3 if chooses else 1,
        share=info.num_kv_heads,
        family=f"kv_attention/{_family(info, fmt, window)}",
        run=_filled(info, fmt, scenario) if info.cross else _runner(info, fmt, scenario, window),
    )


def choosing_call(info: AttentionInfo, fmt: Blocks | None, scenario: Scenario) -> OpCall:
    """What it takes one KV head to choose tiles, as far as it falls to one token of those that the
    choice is kept for."""
    group, tokens = info.num_heads // info.num_kv_heads, info.refresh
    ends, size = _ends(info, fmt, scenario), info.dtype.itemsize
    query = scenario.batch * group * info.head_dim * size
    return OpCall(
        op="fxopt::cached_attention",
        key=f"kv_choice/{_signature(info, fmt, scenario, 0)}",
        flops=2.0 * group * ends / tokens,
        bytes_read=(ends * (2 if fmt else size) + query) / tokens,
        bytes_written=0.0,
        launches=2,
        share=info.num_kv_heads * tokens,
        family=f"kv_choice/{_family(info, fmt, 0)}",
        run=_chooser(info, fmt, scenario),
    )


def _ends(info: AttentionInfo, fmt: Blocks | None, scenario: Scenario) -> int:
    """The ends of each channel's range in each tile, of which an estimate for each row is made."""
    tiles = scenario.past // tile_size(fmt) if _chooses(info, scenario) else 0
    return 2 * scenario.batch * info.head_dim * tiles


def hidden_keys(info: AttentionInfo, fmt: Blocks | None, scenario: Scenario) -> int:
    """Keys of tiles that `info.top_keys` leave out of a call, which is then of a single token."""
    if scenario.queries != 1:
        return 0
    return left_out(fmt, scenario.past, info.top_keys) * tile_size(fmt)


def _layout(info: AttentionInfo, fmt: Blocks | None) -> Layout:
    return Layout((HeadClass((), fmt, info.top_keys, info.refresh),))


def rotation_call(info: AttentionInfo, scenario: Scenario) -> OpCall:
    """The new queries and keys of one KV head times a matrix of its channels each.

    As a launch of its own, though it is part of the one that computes rotary embeddings where there
    are any: at most that is priced too much. The queries and keys of cross-attention are a product
    each.
    """
    rows = scenario.batch * scenario.queries
    keys = 0 if info.cross and scenario.past else rows
    queries = rows * (info.num_heads // info.num_kv_heads)
    size, square = info.dtype.itemsize, info.head_dim**2
    moved = (queries + keys) * info.head_dim * size
    return OpCall(
        op="aten::bmm" if info.cross else "fxopt::rotate_both",
        key=f"kv_rotation/{_signature(info, None, scenario, 0)}",
        flops=2.0 * (queries + keys) * square,
        bytes_read=moved + 2 * square * size,
        bytes_written=moved,
        weight_bytes=2 * square * size,
        launches=2 if info.cross and keys else 1,
        share=info.num_kv_heads,
        family=f"kv_rotation/{_family(info, None, 0)}",
        run=_rotator(info, scenario, bool(keys)),
    )


def _rotator(
    info: AttentionInfo, scenario: Scenario, with_keys: bool
) -> Callable[[Any], Callable[[], Any]]:
    def run(device: Any) -> Callable[[], Any]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(info.dtype)

        q, k = (
            random(scenario.batch, heads, scenario.queries, info.head_dim)
            for heads in (info.num_heads, info.num_kv_heads)
        )
        matrices = random(info.num_kv_heads, info.head_dim, info.head_dim)
        if info.cross:
            sides = (q, k) if with_keys else (q,)
            return lambda: [mix_channels(side, matrices) for side in sides]
        return lambda: rotate_both(q, k, query_mix=matrices, key_mix=matrices)

    return run


def _bytes(info: AttentionInfo, fmt: Blocks | None, batch: int, length: int, size: int) -> int:
    layout = _layout(info, fmt)
    size_of = filled_bytes if info.cross else state_bytes
    return size_of(layout, batch, 1, info.head_dim, info.value_dim, length, size)


def _image_bytes(info: AttentionInfo, fmt: Blocks | None, scenario: Scenario) -> int:
    """What the reference holds for all heads of the op: both images, and integers and float32
    steps of one of them."""
    if fmt is None:
        return 0
    tokens = scenario.batch * info.num_kv_heads * scenario.length
    channels = info.head_dim + info.value_dim
    wide = max(info.head_dim, info.value_dim)
    return tokens * (2 * channels * info.dtype.itemsize + 9 * wide)


def _signature(info: AttentionInfo, fmt: Blocks | None, scenario: Scenario, window: int) -> str:
    sizes = f"b{scenario.batch}n{scenario.queries}p{scenario.past}"
    sizes += f"h{info.num_heads}kv{info.num_kv_heads}"
    return f"{sizes}/{_family(info, fmt, window)}"


def _family(info: AttentionInfo, fmt: Blocks | None, window: int) -> str:
    """Calls that differ in nothing but sizes."""
    near = f"w{window}" if window else "x" if info.cross else ""
    near += f"t{info.top_keys}" if info.top_keys else ""
    near += f"/{info.refresh}" if info.refresh > 1 else ""
    dims = f"d{info.head_dim}v{info.value_dim}"
    return f"{fmt or 'exact'}/{dims}{near}/{_SHORT.get(info.dtype, str(info.dtype))}"


def _runner(
    info: AttentionInfo, fmt: Blocks | None, scenario: Scenario, window: int
) -> Callable[[Any], Callable[[], Tensor]]:
    layout = _layout(info, fmt)
    heads, kv_heads = info.num_heads, info.num_kv_heads
    batch, queries = scenario.batch, scenario.queries

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(info.dtype)

        state = _held(info, layout, scenario, device)
        start = torch.tensor(scenario.past, device=device)
        q = random(batch, heads, queries, info.head_dim)
        k = random(batch, kv_heads, queries, info.head_dim)
        v = random(batch, kv_heads, queries, info.value_dim)
        sinks = random(heads) if info.has_sinks else None
        scale = 1.0 / math.sqrt(info.head_dim)
        # On a GPU steps are replayed, which read the length on the device.
        length = scenario.past if torch.device(device).type == "cpu" else None
        return lambda: cached_attention(
            q, k, v, state, start, None, None, sinks,
            scale, True, [window], info.softcap, [0], str(layout), length,
        )  # fmt: skip

    return run


def _chooser(
    info: AttentionInfo, fmt: Blocks | None, scenario: Scenario
) -> Callable[[Any], Callable[[], Any]]:
    layout = _layout(info, fmt)

    def run(device: Any) -> Callable[[], Any]:
        state = _held(info, layout, scenario, device)
        ((_, _, part),) = split_state(layout, info.num_kv_heads, state)
        # as if this token had chosen before, which it then does each time
        part[CHOICE[1]][..., 0] = scenario.past
        q = torch.randn(scenario.batch, info.num_heads, 1, info.head_dim, device=device)
        start = torch.tensor(scenario.past, device=device)
        scale = 1.0 / math.sqrt(info.head_dim)
        entry = layout.classes[0]
        return partial(choose_anew, q.to(info.dtype), part, start, entry, scale, scenario.past)

    return run


def _held(info: AttentionInfo, layout: Layout, scenario: Scenario, device: Any) -> list[Tensor]:
    """A state of `scenario.past` random tokens, in which the one before the next chose tiles."""
    state = _allocated(info, layout, scenario, device)
    for tensor in state:
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, device=device))
    for _, packed, part in split_state(layout, info.num_kv_heads, state):
        if packed is not None:
            starts = part["block_start"]
            places = torch.arange(starts.numel(), device=device) * packed.group
            starts.copy_(places.clamp(max=packed.packed(scenario.past)))
        if CHOICE[0] in part:
            size = tile_size(packed)
            whole = (packed.packed(scenario.past) if packed else scenario.past) // size
            read = min(tiles_read(info.top_keys, size), whole)
            places = torch.arange(read, device=device) * whole // max(1, read)
            part[CHOICE[0]][..., :read] = places
            part[CHOICE[1]].copy_(torch.tensor([scenario.past - 1, whole, read]))
    return state


def _allocated(
    info: AttentionInfo, layout: Layout, scenario: Scenario, device: Any
) -> list[Tensor]:
    return allocate(
        layout, scenario.batch, info.num_kv_heads, info.head_dim, info.value_dim, scenario.length,
        info.dtype, device,
    )  # fmt: skip


def _storer(
    info: AttentionInfo, fmt: Blocks | None, scenario: Scenario
) -> Callable[[Any], Callable[[], Any]]:
    """What a prefill does beside attending: its keys and values go to the cache."""
    layout = _layout(info, fmt)

    def run(device: Any) -> Callable[[], Any]:
        state = _allocated(info, layout, scenario, device)
        ((_, _, part),) = split_state(layout, info.num_kv_heads, state)
        shape = (scenario.batch, info.num_kv_heads, scenario.queries)
        new = {
            side: torch.randn(*shape, dim, device=device).to(info.dtype)
            for side, dim in (("key", info.head_dim), ("value", info.value_dim))
        }
        return partial(store_first, part, new, torch.tensor(0, device=device), fmt)

    return run


def _filled(
    info: AttentionInfo, fmt: Blocks | None, scenario: Scenario
) -> Callable[[Any], Callable[[], Tensor]]:
    layout = str(Layout((HeadClass((), fmt),)))
    heads, kv_heads = info.num_heads, info.num_kv_heads

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            made = torch.randn(scenario.batch, *shape, device=device, dtype=torch.float32)
            return made.to(info.dtype)

        q = random(heads, scenario.queries, info.head_dim)
        k = random(kv_heads, scenario.length, info.head_dim)
        v = random(kv_heads, scenario.length, info.value_dim)
        state, scale = fill(k, v, None, layout), 1.0 / math.sqrt(info.head_dim)
        return lambda: filled_attention(q, state, None, None, None, scale, info.softcap, layout)

    return run
