"""What attention costs: the op call of one KV head and its query heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.cost import OpCall
from fxopt.ir.ops import ATTEND
from fxopt.ir.rewrite import Editor, Match, Refusal
from fxopt.ir.site import AttentionInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention import skip as skips
from fxopt.kernels.attention.delta import EVERY, corrected_rows
from fxopt.kernels.attention.grid import Dilation, density, listed
from fxopt.kernels.attention.op import attention
from fxopt.kernels.attention.spec import per_head
from fxopt.kernels.block_topk import reference as topk
from fxopt.kernels.hip import reference as halved

SHARE_STEP = 10
"""Per mille of the tiles, in steps of which what is expected to be kept is timed."""
PLANTED, SPREAD = 60.0, 0.01
"""Nats that tiles to be left out lie below others where they are timed, without a cap on the
scores, and what is left of the spread of random scores there: any cap is wider."""
CORRECTION_LAUNCHES = 10
"""The asked rows, their lists of tiles, and what they add."""


def refusal(site: Site) -> Refusal | None:
    """Why no rewrite that hides keys by their place serves a site; None if one may."""
    if not isinstance(site.info, AttentionInfo):
        return Refusal(f"{site.family} site: the rewrite serves attention")
    if site.blocked is not None:
        return Refusal(site.blocked)
    if site.info.cross:
        return Refusal("cross attention: queries and keys do not share positions")
    return None


def attention_info(match: Match) -> AttentionInfo:
    """The facts of a matched attention site."""
    info = match.site.info
    assert isinstance(info, AttentionInfo)
    return info


def with_value(site: Site, editor: Editor, name: str, value: int, count: int) -> tuple[int, ...]:
    """The option `name` of a site's op, a number for each of `count` KV heads, with `value` for the
    site's head, or for all where it has none."""
    given: Any = editor.node(site).kwargs.get(name, ATTEND.parameters[name].default)
    values = per_head(name, given, count)
    for head in range(count) if site.head is None else (site.head,):
        values[head] = value
    return tuple(values)


def attention_call(
    info: AttentionInfo, scenario: Scenario, window: int = 0, sink_tokens: int = 0
) -> OpCall:
    """One KV head with its query heads: a share of the op that computes all heads alike.

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
        share=info.num_kv_heads,
        family=_family(info, near),
        run=_runner(info, scenario, window, sink_tokens),
    )


def kept_tiles_call(
    info: AttentionInfo,
    scenario: Scenario,
    top: int,
    hip: bool = False,
    mass: int = 0,
    density: float | None = None,
) -> OpCall:
    """One KV head whose query heads keep `top` per mille of their key tiles, or as many of them as
    hold `mass` per mille of the attention; see `attend`.

    Calls that leave none out are dense ones. The lists of tiles are written and read. With `mass`
    the part of the tiles `density` is expected to be kept, of all query tiles but the last; it is
    timed as that share of them.
    """
    dense = attention_call(info, scenario)
    queries, length = scenario.queries, scenario.length
    if not topk.hides_some(queries, length, top, mass):
        return dense
    if mass and density is not None:
        # A share without a minimum: a mass that is reached by nothing less.
        share = min(top, max(1, round(100 * density)) * SHARE_STEP)
        top, mass = share, 1000
    heads = scenario.batch * info.num_heads // info.num_kv_heads
    every = visible_pairs(queries, length, True, 0, 0)
    squares = topk.tiles(queries) * topk.tiles(length)
    kept = kept_pairs(queries, length, top, mass)
    estimate = _halving(info, scenario, top) if hip else _asking(info, scenario)
    lists, near = 4 * heads * squares, f"{'hip' if hip else 'top'}{top}"
    near += f"m{mass}" if mass else ""
    listed = 4 * heads * kept // topk.TILE**2  # entries behind a count are never touched
    return replace(
        dense,
        key=_key(info, scenario, near),
        flops=dense.flops * kept / every + estimate.flops,
        bytes_read=dense.bytes_read + estimate.read + listed,
        bytes_written=dense.bytes_written + estimate.written + listed,
        temporary_bytes=estimate.temporary + min(lists, 4 * topk.MOST_ENTRIES),
        launches=estimate.launches + 2,
        family=_family(info, near),
        run=_runner(info, scenario, 0, 0, top, hip=int(hip), mass=mass),
    )


@dataclass(frozen=True)
class _Estimate:
    """What choosing tiles for one KV head costs; sizes in bytes."""

    flops: float
    read: int
    written: int
    temporary: int
    launches: int


def _asking(info: AttentionInfo, scenario: Scenario) -> _Estimate:
    """Some queries are multiplied with all keys before them; the sums are written and read."""
    heads = scenario.batch * info.num_heads // info.num_kv_heads
    queries, length = scenario.queries, scenario.length
    every = visible_pairs(queries, length, True, 0, 0)
    squares = topk.tiles(queries) * topk.tiles(length)
    sums = 4 * heads * squares * topk.TILE // topk.STRIDE
    flops = 2.0 * heads * every / topk.STRIDE * info.head_dim
    # Causality leaves half of the sums out.
    return _Estimate(flops, sums // 2, sums // 2, min(sums, 4 * topk.MOST_SUMS), 2)


def _halving(info: AttentionInfo, scenario: Scenario, top: int) -> _Estimate:
    """The keys are read for their ranges; of the chunks that a tile of queries looks at these are
    read, multiplied with some queries, and scores are written and read."""
    heads = scenario.batch * info.num_heads // info.num_kv_heads
    size, rows = info.dtype.itemsize, topk.TILE // halved.STRIDE
    looked, depth = looked_at(scenario.queries, scenario.length, top), halved.halvings(top)
    channels = 2 * halved.BOXES * info.head_dim  # middles and widths of a chunk
    keys = scenario.batch * scenario.length * info.head_dim * size
    # Chunks of all levels are less than twice as many as the tiles.
    ranges = 2 * scenario.batch * topk.tiles(scenario.length) * channels * size
    scores = 4 * heads * rows * looked
    return _Estimate(
        flops=2.0 * heads * looked * rows * channels,
        read=keys + heads * looked * channels * size + scores,
        written=ranges + scores,
        temporary=min(scores, 4 * topk.MOST_SUMS) + ranges,
        launches=8 * (depth + 1),
    )


def looked_at(queries: int, length: int, top: int) -> int:
    """Chunks of keys that one head estimates, tile by tile of its queries, level by level."""
    depth, total = halved.halvings(top), 0
    for number in range(topk.tiles(queries) - topk.SPARED):
        seen = topk.tiles((number + 1) * topk.TILE + length - queries)
        kept = topk.kept_tiles(seen, top)
        # The first level looks at all.
        found = -(-seen // 2**depth)
        total += found
        for level in range(depth - 1, -1, -1):
            found = min(2 * min(found, kept), -(-seen // 2**level))
            total += found
    return total


def skipping_call(info: AttentionInfo, scenario: Scenario, density: float) -> OpCall:
    """One KV head whose query heads compute all scores, and of the tiles that may be left out weigh
    the part `density`; see `attend`.

    Short calls are dense ones. What is timed is a call of which that part is left, in steps of one
    per cent.
    """
    dense = attention_call(info, scenario, info.window)
    if scenario.queries <= skips.LEAST_QUERIES:
        return dense
    percent = max(1, round(100 * density))
    kept = f"skip{100 - percent}" + (f"w{info.window}" if info.window else "")
    return replace(
        dense,
        key=_key(info, scenario, kept),
        flops=dense.flops * skipping_products(info, scenario, density),
        family=_family(info, kept),
        run=_runner(info, scenario, info.window, 0, left=percent),
    )


def skipping_products(info: AttentionInfo, scenario: Scenario, density: float) -> float:
    """Part of the products of dense attention that is made where of the tiles that may be left out
    the part `density` is left."""
    visited, may = skips.tiles(scenario.queries, scenario.length, info.window)
    out = (1 - density) * may / visited
    return 1 - out * info.value_dim / (info.head_dim + info.value_dim)


def neighborhood_call(
    info: AttentionInfo, scenario: Scenario, near: int, dilation: Dilation = 1
) -> OpCall:
    """One KV head whose query heads see the tiles that are near on the site's grid; see `attend`.

    Queries, keys and values are copied to their places, and the result back from them.
    """
    dense = attention_call(info, scenario)
    moved = dense.bytes_read + dense.bytes_written
    spaced = "" if dilation == 1 else f"every{dilation_label(dilation)}"
    kept = f"near{near}{spaced}g{'x'.join(map(str, info.grid))}"
    return replace(
        dense,
        key=_key(info, scenario, kept),
        flops=dense.flops * density(info.grid, near, dilation),
        bytes_read=dense.bytes_read + moved,
        bytes_written=dense.bytes_written + moved,
        temporary_bytes=int(moved),
        launches=5,
        family=_family(info, kept),
        run=_runner(info, scenario, 0, 0, near=near, dilation=dilation),
    )


def dilated_call(info: AttentionInfo, scenario: Scenario, window: int, dilation: int) -> OpCall:
    """One KV head under a dilated window of a sequence that is not causal; see `attend`.

    Queries, keys and values are copied to the tokens of equal rest, and the result back.
    """
    dense = attention_call(info, scenario)
    if window >= scenario.length:
        return dense
    moved, kept = dense.bytes_read + dense.bytes_written, f"w{window}every{dilation}"
    rests = -(-scenario.length // dilation)
    return replace(
        dense,
        key=_key(info, scenario, kept),
        flops=dense.flops * min(rests, 2 * window - 1) / scenario.length,
        bytes_read=dense.bytes_read + moved,
        bytes_written=dense.bytes_written + moved,
        temporary_bytes=int(moved),
        launches=5,
        family=_family(info, kept),
        run=_runner(info, scenario, window, 0, dilation=dilation),
    )


def dilation_label(dilation: Dilation) -> str:
    """2 as "2", (1, 2, 2) as "1x2x2"."""
    return str(dilation) if isinstance(dilation, int) else "x".join(map(str, dilation))


def kept_pairs(queries: int, length: int, top: int, mass: int = 0) -> int:
    """(query, key) pairs of one head that causal attention over kept tiles computes, with `mass`
    at most."""
    pairs = visible_pairs(queries, length, True, 0, 0)
    for number in range(topk.tiles(queries) - topk.SPARED):
        # What is left out lies before the first query of the tile.
        seen = topk.tiles((number + 1) * topk.TILE + length - queries)
        pairs -= topk.TILE**2 * (seen - topk.kept_tiles(seen, top, mass))
    return pairs


def corrected_call(
    info: AttentionInfo, scenario: Scenario, window: int = 0, sink_tokens: int = 0, top: int = 0
) -> OpCall:
    """One KV head under a window or a share of tiles, corrected by rows that see all keys.

    Prompts cost the pairs that are computed, those of the asked rows among them, and reading and
    writing outputs again; decoding is dense.
    """
    dense, early = attention_call(info, scenario), corrected_rows(scenario.queries)
    if not early:
        return dense
    first = replace(scenario, queries=early)
    last = replace(scenario, queries=scenario.queries - early, past=scenario.past + early)
    near = f"top{top}" if top else f"w{window}s{sink_tokens}"
    parts = (
        [kept_tiles_call(info, scenario, top)]
        if top
        else [attention_call(info, first, window, sink_tokens), attention_call(info, last)]
    )
    asked = early // EVERY
    pairs = asked * (scenario.past + 1) + EVERY * asked * (asked - 1) // 2
    heads = scenario.batch * info.num_heads // info.num_kv_heads
    channels, size = info.head_dim + info.value_dim, info.dtype.itemsize
    outputs = heads * early * info.value_dim * size
    keys = scenario.batch * first.length * channels * size
    return replace(
        dense,
        key=_key(info, scenario, f"{near}d{EVERY}"),
        flops=sum(part.flops for part in parts) + 2.0 * heads * pairs * channels,
        bytes_read=sum(part.bytes_read for part in parts) + keys + 2 * outputs,
        bytes_written=sum(part.bytes_written for part in parts) + outputs,
        temporary_bytes=max(part.temporary_bytes for part in parts) + outputs,
        launches=sum(part.launches for part in parts) + CORRECTION_LAUNCHES,
        family=_family(info, f"{near}d{EVERY}"),
        run=_runner(info, scenario, window, sink_tokens, top, delta=1000),
    )


def longest_prompt(scenarios: Sequence[Scenario]) -> Scenario | None:
    """The longest call of those that bring more tokens than see all keys in any case."""
    prompts = [scenario for scenario in scenarios if corrected_rows(scenario.queries)]
    return max(prompts, key=lambda scenario: scenario.length, default=None)


def _key(info: AttentionInfo, scenario: Scenario, near: str) -> str:
    """What makes two attention calls cost the same."""
    extras = "".join(
        name
        for name, given in (("c", info.softcap), ("z", info.has_sinks), ("b", info.has_bias))
        if given
    )
    sizes = f"b{scenario.batch}h{info.num_heads}kv{info.num_kv_heads}"
    sizes += f"n{scenario.queries}t{scenario.length}d{info.head_dim}v{info.value_dim}"
    kind = f"{'causal' if info.causal else 'full'}{extras}"
    return f"attention/{near}/{kind}/{sizes}/{str(info.dtype).removeprefix('torch.')}"


def _family(info: AttentionInfo, near: str) -> str:
    """Attention calls that differ in nothing but sizes; see `_key`."""
    kept, kind, _, dtype = _key(info, Scenario("", 1, 1, 0), near).split("/")[1:]
    return f"attention/{kept}/{kind}/d{info.head_dim}v{info.value_dim}/{dtype}"


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


def _plant(q: Tensor, k: Tensor, left: int, softcap: float = 0.0) -> int:
    """Have about `left` per cent of the key tiles score far above the others, in random scores of
    queries [B, H, N, D] and keys, at a scale of D ** -0.5. Returns the limit, in hundredths of a
    nat, that lies between them."""
    tiles = torch.arange(-(-k.shape[2] // skips.KEY_TILE), device=k.device)
    high = tiles * left % 100 < left  # evenly spread, the first among them
    keys = high.repeat_interleave(skips.KEY_TILE)[: k.shape[2]]
    q *= SPREAD
    q[..., 0] = math.sqrt(PLANTED) * q.shape[3] ** 0.25
    k[..., 0] = torch.where(keys, math.sqrt(PLANTED) * q.shape[3] ** 0.25, 0.0).to(k.dtype)
    highest = softcap * math.tanh(PLANTED / softcap) if softcap else PLANTED
    return max(1, round(highest / 2 / skips.UNIT))


def _runner(
    info: AttentionInfo,
    scenario: Scenario,
    window: int,
    sink_tokens: int,
    top: int = 0,
    delta: int = 0,
    near: int = 0,
    dilation: Dilation = 1,
    hip: int = 0,
    mass: int = 0,
    left: int = 0,
) -> Callable[[Any], Callable[[], Tensor]]:
    heads, kv_heads = info.num_heads, info.num_kv_heads
    batch, queries, length = scenario.batch, scenario.queries, scenario.length

    def run(device: Any) -> Callable[[], Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float32).to(info.dtype)

        q = random(batch, heads, queries, info.head_dim)
        k = random(batch, kv_heads, length, info.head_dim)
        v = random(batch, kv_heads, length, info.value_dim)
        limit = _plant(q, k, left, info.softcap) if left else 0
        sinks = random(heads) if info.has_sinks else None
        bias = random(1, heads, queries, length) if info.has_bias else None
        scale, spacings = 1.0 / math.sqrt(info.head_dim), listed([dilation] * kv_heads, info.grid)
        return lambda: attention(
            q, k, v, None, bias, sinks,
            scale, info.causal, [window], info.softcap, [sink_tokens], [top], [delta],
            info.grid, [near], spacings, [hip], [mass], [limit],
        )  # fmt: skip

    return run
