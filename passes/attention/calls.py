"""What attention costs: the op call of one KV head and its query heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Match
from fxopt.ir.site import AttentionInfo
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.op import attention


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
    extras = "".join(
        name
        for name, given in (("c", info.softcap), ("z", info.has_sinks), ("b", info.has_bias))
        if given
    )
    sizes = f"b{batch}g{group}n{queries}t{length}d{info.head_dim}v{info.value_dim}"
    kind = f"{'causal' if info.causal else 'full'}{extras}"
    return OpCall(
        op="fxopt::attention",
        key=f"attention/{near}/{kind}/{sizes}/{str(info.dtype).removeprefix('torch.')}",
        flops=2.0 * batch * group * pairs * channels,
        bytes_read=(rows * info.head_dim + batch * reached * channels) * size,
        bytes_written=rows * info.value_dim * size,
        run=_runner(info, scenario, window, sink_tokens),
    )


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
    info: AttentionInfo, scenario: Scenario, window: int, sink_tokens: int
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
            scale, info.causal, [window], info.softcap, [sink_tokens],
        )  # fmt: skip

    return run
