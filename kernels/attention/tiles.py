"""A few queries with the keys that they can reach, and the two ways to attend on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.block_topk import reference as topk
from fxopt.kernels.hip import reference as halved

from . import grid as grids
from . import skip as skips
from .spec import Attention, in_order, pick, put, query_heads

Spans = Sequence[tuple[int, int]]

# Elements of the largest temporary of a tile: its mask, or its scores.
TILE_ELEMENTS = 2**22


@dataclass(frozen=True)
class Part:
    """A call whose heads have one window, share of tiles or neighbourhood, and the query heads of
    the whole that it stands for.

    Under a neighbourhood its tokens stand `in_order`, and `tokens` [N] says which they are. `rank`
    [B or 1, T] counts unmasked keys from 1 (T + 1 for masked ones); `sink_end` is the column behind
    the last sink token. Both only where there are sink tokens. `boxes` are what chunks of keys are
    estimated by, where they are halved.
    """

    call: Attention
    heads: list[int]
    rank: Tensor | None
    sink_end: int
    tokens: Tensor | None
    boxes: halved.Boxes | None

    def put(self, out: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Write rows [B, n, heads of the part, ...] to those of the whole [B, N, H, ...]."""
        if self.tokens is None:
            put(out[:, start:stop], 2, self.heads, values)
        else:
            out[:, self.tokens[start:stop, None], self.heads] = values

    def pick(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The rows of the whole that `put` would write."""
        if self.tokens is None:
            return pick(x[:, start:stop], 2, self.heads)
        return x[:, self.tokens[start:stop, None], self.heads]


@dataclass(frozen=True)
class Tile:
    """q [B, H, n, D], k [B, KV, S, D], v [B, KV, S, Dv]; `visible` [B or 1, 1 or H, n, S] or None
    where all keys are seen; bias [B or 1, H or 1, n or 1, S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float


def without_idle_mask(call: Attention) -> Attention:
    """Drop a mask that hides nothing; asking would stall any device but the CPU."""
    if call.mask is None or call.mask.device.type != "cpu" or not bool((call.mask != 0).all()):
        return call
    return replace(call, mask=None)


def parts(call: Attention) -> Iterator[Part]:
    """The call split into heads of equal window, sink, kept tiles and neighbourhood; nothing where
    there is no row."""
    for heads in call.head_groups() if call.q.shape[0] else ():
        part, tokens = call.heads(heads), None
        if part.near[0]:
            tokens, _ = grids.places(part.grid, part.dilation[0], part.q.device)
            part = in_order(part)
        rank = _rank(part) if part.sink_tokens[0] else None
        rows = query_heads(heads, call.group_size)
        boxes = None
        if part.hip[0]:
            with torch.no_grad():
                boxes = halved.boxes(part.k, part.mask, halved.halvings(part.top[0]))
        yield Part(part, rows, rank, _sink_end(part, rank), tokens, boxes)


def tiles(part: Part) -> Iterator[tuple[int, int]]:
    """Query ranges whose temporaries stay small and whose keys are mostly seen."""
    call = part.call
    batch, heads, queries, _ = call.q.shape
    keys, size = call.k.shape[2], 512
    if call.top[0] or call.near[0] or any(call.skip):
        size = grids.TILE if call.near[0] else topk.TILE
        return ((start, min(start + size, queries)) for start in range(0, queries, size))
    if call.window[0]:
        size = max(64, min(size, call.window[0] // 2))
        keys = min(keys, 2 * call.window[0] + size + part.sink_end)
    copies = heads if is_explicit(call) or call.bias is not None else 1
    size = max(1, min(size, TILE_ELEMENTS // max(1, batch * copies * keys)))
    return ((start, min(start + size, queries)) for start in range(0, queries, size))


def tile(part: Part, start: int, stop: int) -> Tile:
    """Queries [start, stop) and the keys that at least one of them can reach."""
    call = part.call
    if call.top[0] and start < (topk.tiles(call.q.shape[2]) - topk.SPARED) * topk.TILE:
        return _of_kept_tiles(call, part.boxes, start, stop)
    if any(call.skip):
        return _of_tiles_that_matter(part, start, stop)
    spans = _spans(part, start + call.offset, stop - 1 + call.offset)
    bias = call.bias
    if bias is not None:
        bias = narrow(bias if bias.shape[2] == 1 else bias[:, :, start:stop], spans, -1)
    return Tile(
        call.q[:, :, start:stop],
        narrow(call.k, spans, 2),
        narrow(call.v, spans, 2),
        _visible(part, spans, start + call.offset, stop - 1 + call.offset),
        bias,
        call.sinks,
        call.scale,
        call.softcap,
    )


def _of_kept_tiles(call: Attention, boxes: halved.Boxes | None, start: int, stop: int) -> Tile:
    """One tile of queries with the keys that each query head keeps, gathered: KV is H then."""
    batch, heads = call.q.shape[:2]
    end = stop + call.offset
    q, k, v = call.q[:, :, start:stop], call.k[:, :, :end], call.v[:, :, :end]
    mask = None if call.mask is None else call.mask[:, :end]
    with torch.no_grad():
        options = (mask, call.scale, call.softcap, call.top)
        if boxes is None:
            chosen = topk.chosen_tiles(q, k, *options, call.mass, spared=0)
        else:
            chosen = halved.choose(q, boxes, end, *options, spared=0)
        chosen = chosen.flatten(1, 3)  # the one query tile has no dimension left
        most = topk.kept_tiles(chosen.shape[2], call.top[0])
        if call.mass[0]:
            most = int(chosen.sum(2).max())
        places = (~chosen).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :most]
        columns = places[..., None] * topk.TILE + torch.arange(topk.TILE, device=q.device)
        kept = chosen.gather(2, places)[..., None] & (columns < end)
        columns, kept = columns.flatten(2).clamp(max=end - 1), kept.flatten(2)
        if mask is not None:
            kept = kept & (mask != 0)[:, None].expand(-1, heads, -1).gather(2, columns)
        rows = torch.arange(start + call.offset, end, device=q.device)
        seen = kept[:, :, None] & (columns[:, :, None] <= rows[:, None])

    rows_of = columns.reshape(batch, call.num_kv_heads, -1)
    entry = torch.arange(batch, device=q.device)[:, None, None]
    kv_head = torch.arange(call.num_kv_heads, device=q.device)[:, None]

    def gathered(x: Tensor) -> Tensor:
        return x[entry, kv_head, rows_of].view(batch, heads, -1, x.shape[3])

    return Tile(q, gathered(k), gathered(v), seen, None, call.sinks, call.scale, call.softcap)


def _of_tiles_that_matter(part: Part, start: int, stop: int) -> Tile:
    """One tile of queries and the keys up to them, those of tiles that are left out hidden."""
    call = part.call
    first, end = start + call.offset, stop + call.offset
    q, k, v = call.q[:, :, start:stop], call.k[:, :, :end], call.v[:, :, :end]
    seen = _visible(part, ((0, end),), first, end - 1)
    tile = Tile(q, k, v, seen, None, call.sinks, call.scale, call.softcap)
    with torch.no_grad():
        scores, device = masked_scores(tile), call.q.device
        window = torch.tensor(call.window[:1], device=device)[:, None, None, None]
        matter = skips.kept(
            scores, torch.arange(first, end, device=device), call.k.shape[2], call.mask, window,
            skips.limits(call.skip, scores.dtype, device)[:, None, None],
            None if call.sinks is None else call.sinks.to(scores.dtype)[:, None, None],
        )  # fmt: skip
    return replace(tile, visible=matter if seen is None else matter & seen)


def narrow(x: Tensor, spans: Spans, dim: int) -> Tensor:
    """The entries of dimension `dim` that lie in `spans`."""
    pieces = [x.narrow(dim, begin, end - begin) for begin, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def is_explicit(call: Attention) -> bool:
    """Whether the library's op cannot express the call."""
    return call.softcap > 0 or call.sinks is not None


def attend(t: Tile) -> Tensor:
    """[B, H, n, Dv]; rows that see no key are 0."""
    if not t.q.numel() or not t.k.shape[2]:
        return t.q.new_zeros(*t.q.shape[:3], t.v.shape[3])
    if t.softcap > 0 or t.sinks is not None:
        return explicit(t)[0]
    return fused(t)


def fused(t: Tile) -> Tensor:
    """Through `F.scaled_dot_product_attention`."""
    allowed = t.visible
    if t.bias is not None:
        allowed = t.bias.to(t.q.dtype)
        if t.visible is not None:
            allowed = allowed.masked_fill(~t.visible, -torch.inf)
    batch, heads, queries, dim = t.q.shape
    groups = heads // t.k.shape[1]
    if queries > 1 or groups == 1:
        return F.scaled_dot_product_attention(
            t.q, t.k, t.v, allowed, scale=t.scale, enable_gqa=groups > 1
        )
    # The heads of a group as the queries of one head: keys and values are read once.
    if allowed is not None and allowed.shape[1] > 1:
        allowed = allowed.reshape(allowed.shape[0], -1, groups, allowed.shape[3])
    q = t.q.reshape(batch, -1, groups, dim)
    out = F.scaled_dot_product_attention(q, t.k, t.v, allowed, scale=t.scale)
    return out.reshape(batch, heads, 1, -1)


def explicit(t: Tile) -> tuple[Tensor, Tensor]:
    """By the formula, in float32 at least: output [B, H, n, Dv] in q's dtype and lse [B, H, n]."""
    batch, heads, queries, _ = t.q.shape
    kv, keys = t.k.shape[1:3]
    rows = heads // kv * queries
    dtype = sum_dtype(t.q)
    if not keys:
        lse = t.q.new_full((batch, heads, queries), -torch.inf, dtype=dtype)
        if t.sinks is not None:
            lse = t.sinks.to(dtype)[:, None].expand_as(lse)
        return t.q.new_zeros(batch, heads, queries, t.v.shape[3]), lse
    scores = masked_scores(t)
    logit = None if t.sinks is None else t.sinks.to(dtype)[:, None, None]
    weights, lse = softmax(scores, logit)
    out = weights.view(batch, kv, rows, keys) @ t.v.to(dtype)
    return out.view(batch, heads, queries, t.v.shape[3]).to(t.q.dtype), lse.squeeze(-1)


def masked_scores(t: Tile) -> Tensor:
    """What softmax takes, -inf for what is not seen: [B, H, n, S], in float32 at least."""
    (batch, heads, queries, dim), kv, dtype = t.q.shape, t.k.shape[1], sum_dtype(t.q)
    q = t.q.to(dtype).reshape(batch, kv, heads // kv * queries, dim) * t.scale
    scores = (q @ t.k.to(dtype).mT).view(batch, heads, queries, -1)
    if t.softcap > 0:
        scores = t.softcap * torch.tanh(scores / t.softcap)
    if t.bias is not None:
        scores = scores + t.bias
    return scores if t.visible is None else scores.masked_fill(~t.visible, -torch.inf)


def softmax(scores: Tensor, logit: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [..., S] and logarithm of their sum [..., 1], with one more `logit` a row.

    A row of -inf alone has weights 0, also in its gradient, and -inf as logarithm.
    """
    highest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    if logit is not None:
        highest = torch.maximum(highest, logit.detach())
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    if logit is not None:
        total = total + (logit - highest).exp()
    return weights / total.masked_fill(total == 0, 1.0), highest + total.log()


def sum_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(q.dtype, torch.float32)


def _spans(part: Part, first: int, last: int) -> Spans:
    """Columns that a query at positions `first` to `last` can reach, as a few ranges."""
    call = part.call
    if call.near[0]:
        return grids.spans(call.grid, call.near[0], call.dilation[0], first // grids.TILE)
    window, total = call.window[0], call.k.shape[2]
    end = last + 1 if call.causal else last + window if window else total
    end = max(0, min(total, end))
    begin = min(end, max(0, first - window + 1)) if window else 0
    if part.rank is None:
        return ((begin, end),)
    sink_end = min(part.sink_end, end) if call.causal else part.sink_end
    if sink_end >= begin:
        return ((0, max(end, sink_end)),)
    return ((0, sink_end), (begin, end))


def _visible(part: Part, spans: Spans, first: int, last: int) -> Tensor | None:
    call, device = part.call, part.call.q.device
    window = call.window[0]
    rows = torch.arange(first, last + 1, device=device)[:, None]
    columns = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
    conditions: list[Tensor] = []
    if window:
        near = ((rows - columns).abs() < window)[None, None]
        if part.rank is not None:
            near = near | (narrow(part.rank, spans, 1) <= call.sink_tokens[0])[:, None, None]
        conditions.append(near)
    if call.causal and last > first:
        conditions.append((columns <= rows)[None, None])
    if call.mask is not None:
        conditions.append(narrow(call.mask != 0, spans, 1)[:, None, None])
    if not conditions:
        return None
    seen = conditions[0]
    for condition in conditions[1:]:
        seen = seen & condition
    return seen.expand(seen.shape[0], 1, last + 1 - first, -1)


def _rank(call: Attention) -> Tensor:
    total = call.k.shape[2]
    if call.mask is None:
        return torch.arange(1, total + 1, device=call.q.device)[None]
    unmasked = call.mask != 0
    return unmasked.cumsum(1).masked_fill(~unmasked, total + 1)


def _sink_end(call: Attention, rank: Tensor | None) -> int:
    if rank is None:
        return 0
    if call.mask is None:
        return min(call.sink_tokens[0], call.k.shape[2])
    columns = (rank <= call.sink_tokens[0]).any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 0
