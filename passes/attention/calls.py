"""What attention costs: the op call of one KV head and its query heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Match
from fxopt.ir.site import AttentionInfo
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.op import attention
from fxopt.kernels.block_topk import reference as topk


def attention_info(match: Match) -> AttentionInfo:
    """The facts of a matched attention site."""
    info = match.site.info
    assert isinstance(info, AttentionInfo)
    return info


def attention_call(
    info: AttentionInfo, scenario: Scenario, window: int = 0, sink_tokens: int = 0
) -> OpCall:
    """One KV head with its query heads; 1 / num_kv_heads of the op.

    Products of pairs that a query can see are counted, and each key once that some query sees.
    """
    if not 0 < window < scenario.length:
        window = sink_tokens = 0
    batch, queries, length = scenario.batch, scenario.queries, scenario.length
    group, size = info.num_heads // info.num_kv_heads, info.dtype.itemsize
    channels = info.head_dim + info.value_dim
    pairs = visible_pairs(queries, length, info.causal, window, sink_tokens)
    reached = min(length, window + queries - 1 + sink_tokens) if window else length
    rows = batch * group * queries
    near = f"w{window}s{sink_tokens}" if window else "dense"
    return OpCall(
        op="fxopt::attention",
        key=_key(info, scenario, near),
        flops=2.0 * batch * group * pairs * channels,
        bytes_read=(rows * info.head_dim + batch * reached * channels) * size,
        bytes_written=rows * info.value_dim * size,
        run=_runner(info, scenario, window, sink_tokens),
    )


def kept_tiles_call(info: AttentionInfo, scenario: Scenario, top: int) -> OpCall:
    """One KV head whose query heads keep `top` per mille of their key tiles; see `attend`.

    Calls that leave none out are dense ones. The estimate multiplies one query of a pool with all
    keys before it; its sums, and the lists of tiles, are written and read.
    """
    if not topk.hides_some(scenario.queries, scenario.length, top):
        return attention_call(info, scenario)
    batch, group = scenario.batch, info.num_heads // info.num_kv_heads
    queries, length = scenario.queries, scenario.length
    dense = attention_call(info, scenario)
    every = visible_pairs(queries, length, True, 0, 0)
    lines, tiles = batch * group * -(-queries // topk.TILE), -(-length // topk.TILE)
    sums = min(4 * lines * tiles * (topk.TILE // topk.POOL), topk.MOST_SUMS * 4)
    lists = 8 * lines * topk.kept_tiles(tiles, top)
    estimate = 2.0 * batch * group * every / topk.POOL * info.head_dim
    share = kept_pairs(queries, length, top) / every
    return replace(
        dense,
        key=_key(info, scenario, f"top{top}"),
        flops=share * dense.flops + estimate,
        bytes_read=dense.bytes_read + 4 * lines * tiles * (topk.TILE // topk.POOL) / 2 + lists,
        bytes_written=dense.bytes_written + 4 * lines * tiles * (topk.TILE // topk.POOL) / 2,
        temporary_bytes=sums + lists,
        launches=5,
        run=_runner(info, scenario, 0, 0, top),
    )


def kept_pairs(queries: int, length: int, top: int) -> int:
    """(query, key) pairs of one head that causal attention over kept tiles computes."""
    pairs = 0
    for start in range(0, queries, topk.TILE):
        stop = min(start + topk.TILE, queries)
        first, end = start + length - queries, stop + length - queries
        tiles = -(-end // topk.TILE)
        left_out = tiles - topk.kept_tiles(tiles, top)
        # What is left out lies before the first query of the tile.
        pairs += sum_of_range(first + 1, end) - (stop - start) * left_out * topk.TILE
    return pairs


def sum_of_range(first: int, last: int) -> int:
    """first + ... + last."""
    return (first + last) * (last - first + 1) // 2


def _key(info: AttentionInfo, scenario: Scenario, near: str) -> str:
    """What makes two attention calls cost the same."""
    extras = "".join(
        name
        for name, given in (("c", info.softcap), ("z", info.has_sinks), ("b", info.has_bias))
        if given
    )
    group = info.num_heads // info.num_kv_heads
    sizes = f"b{scenario.batch}g{group}n{scenario.queries}t{scenario.length}"
    sizes += f"d{info.head_dim}v{info.value_dim}"
    kind = f"{'causal' if info.causal else 'full'}{extras}"
    return f"attention/{near}/{kind}/{sizes}/{str(info.dtype).removeprefix('torch.')}"


def visible_pairs(queries: int, length: int, causal: bool, window: int, sink_tokens: int) -> int:
    """(query, key) pairs of one head of one sequence that a mask of this form lets through.

    Exact for causal attention; the two-sided window is counted as if no edge were near.
    """
    if not causal:
        return queries * (min(length, 2 * window - 1 + sink_tokens) if window else length)
    most = min(length, window + sink_tokens) if window else length

    def up_to(positions: int) -> int:
        rising = min(positions, most)
        return rising * (rising + 1) // 2 + (positions - rising) * most

    return up_to(length) - up_to(length - queries)


def _runner(
    info: AttentionInfo, scenario: Scenario, window: int, sink_tokens: int, top: int = 0
) -> Callable[[Any], Callable[[], Tensor]]:
    group = info.num_heads // info.num_kv_heads
    batch, queries, length = scenario.batch, scenario.queries, scenario.length

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(info.dtype)

        q = random(batch, group, queries, info.head_dim)
        k = random(batch, 1, length, info.head_dim)
        v = random(batch, 1, length, info.value_dim)
        sinks = random(group) if info.has_sinks else None
        bias = random(1, group, queries, length) if info.has_bias else None
        scale = 1.0 / math.sqrt(info.head_dim)
        return lambda: attention(
            q, k, v, None, bias, sinks,
            scale, info.causal, [window], info.softcap, [sink_tokens], [top],
        )  # fmt: skip

    return run
