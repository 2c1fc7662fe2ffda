"""Attention without loops or branches on data: what torch.export and ONNX get."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fxopt.kernels.block_topk import reference as topk
from fxopt.kernels.hip import reference as halved

from . import skip as skips
from .delta import EVERY
from .grid import Dilation, dilations, near_keys
from .spec import per_head
from .tiles import softmax, sum_dtype


def attention_traceable(
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
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    grid: Sequence[int] = (),
    near: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    """`fxopt::attention` in standard operators, for any batch and length.

    The same result as `attention_reference` up to rounding; scores [B, H, N, T] exist whole.
    """
    batch, heads, queries, dim = q.shape
    kv, keys = k.shape[1], k.shape[2]
    dtype = sum_dtype(q)
    grouped = q.to(dtype).reshape(batch, kv, heads // kv, queries, dim) * scale
    scores = grouped @ k.to(dtype).unsqueeze(2).mT
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        shape = (bias.shape[0], *((1, 1) if bias.shape[1] == 1 else (kv, heads // kv)))
        scores = scores + bias.reshape(*shape, *bias.shape[2:])
    windows, spacings = per_head("window", window, kv), dilations(dilation, kv, tuple(grid))
    first = per_head("sink_tokens", sink_tokens, kv)
    seen = visible(queries, keys, mask, causal, windows, first, q.device, spacings)
    if any(top):
        kept = kept_keys(q, k, mask, scale, softcap, top, hip, mass)
        seen = kept if seen is None else seen & kept
    if any(near):
        close = near_keys(queries, tuple(grid), per_head("near", near, kv), spacings, q.device)
        seen = close if seen is None else seen & close
    logit = None if sinks is None else sinks.to(dtype).reshape(1, kv, heads // kv, 1, 1)
    if any(skip):
        limits = per_head("skip", skip, heads, "query heads")
        hidden = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        matter = kept_by_maximum(hidden, mask, windows, limits, logit)
        seen = matter if seen is None else seen & matter

    def attended(shown: Tensor | None) -> Tensor:
        hidden = scores if shown is None else scores.masked_fill(~shown, -torch.inf)
        return softmax(hidden, logit)[0] @ v.to(dtype).unsqueeze(2)

    out = attended(seen)
    if any(delta):
        every = visible(queries, keys, mask, causal, [0], [0], q.device)
        shares = torch.tensor(per_head("delta", delta, heads, "query heads"), device=q.device)
        out = _corrected(out, attended(every), shares.to(dtype).reshape(kv, heads // kv, 1, 1))
    out = out.reshape(batch, heads, queries, v.shape[3])
    return out.transpose(1, 2).contiguous().to(q.dtype)


def _corrected(sparse: Tensor, dense: Tensor, per_mille: Tensor) -> Tensor:
    """What `delta` makes of outputs [B, KV, H / KV, N, Dv], for heads with a share [KV, H / KV]."""
    rows = torch.arange(sparse.shape[3], device=sparse.device)
    late = rows // topk.TILE >= topk.tiles(sparse.shape[3]) - topk.SPARED
    asked = late | (rows % EVERY == 0)
    missed = (dense - sparse).index_select(3, rows // EVERY * EVERY)
    out = torch.where(asked[:, None], dense, sparse + missed * (per_mille / 1000))
    return torch.where((per_mille > 0).any(1, keepdim=True), out, sparse)


def kept_keys(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float, top: Sequence[int],
    hip: Sequence[int], mass: Sequence[int],
) -> Tensor:  # fmt: skip
    """Which keys lie in the tiles that each query head keeps, [B, KV, H / KV, N, T]."""
    kv = k.shape[1]
    shares, halves = per_head("top", top, kv), per_head("hip", hip, kv)
    kinds = {h for h, t in zip(halves, shares, strict=True) if t}
    asking = partial(topk.chosen_tiles, mass=per_head("mass", mass, kv))
    ways = [halved.chosen_tiles if h else asking for h in sorted(kinds)]
    chosen, *others = (way(q, k, mask, scale, softcap, shares) for way in ways)
    if others:
        # Not by `where`, which onnxruntime has not for booleans.
        own = _by_head(halves, q.device) > 0
        chosen = (own & others[0]) | (~own & chosen)
    rows = torch.arange(q.shape[2], device=q.device)
    columns = torch.arange(k.shape[2], device=q.device)
    return chosen.index_select(3, rows // topk.TILE).index_select(4, columns // topk.TILE)


def kept_by_maximum(
    scores: Tensor, mask: Tensor | None, window: Sequence[int], skip: Sequence[int],
    logit: Tensor | None,
) -> Tensor:  # fmt: skip
    """Which keys lie in tiles that are not left out, [B, KV, H / KV, N, T], from masked scores."""
    device, kv, (queries, keys) = scores.device, scores.shape[1], scores.shape[3:]
    limit = skips.limits(skip, scores.dtype, device).reshape(kv, -1, 1, 1)
    positions = torch.arange(queries, device=device) + (keys - queries)
    windows = _by_head(window, device)
    kept = skips.kept(scores, positions, keys, mask, windows, limit, logit)
    short = torch.zeros(1, dtype=torch.int64, device=device) + queries <= skips.LEAST_QUERIES
    return kept | short


def visible(
    queries: int,
    keys: int,
    mask: Tensor | None,
    causal: bool,
    window: Sequence[int],
    sink_tokens: Sequence[int],
    device: torch.device,
    dilation: Sequence[Dilation] = (1,),
) -> Tensor | None:
    """Which keys are seen, [B or 1, KV or 1, 1, N or 1, T]; None where all are."""
    rows = torch.arange(queries, device=device) + (keys - queries)
    return visible_from(rows, keys, mask, causal, window, sink_tokens, dilation)


def visible_from(
    positions: Tensor,
    keys: int,
    mask: Tensor | None,
    causal: bool,
    window: Sequence[int],
    sink_tokens: Sequence[int],
    dilation: Sequence[Dilation] = (1,),
) -> Tensor | None:
    """`visible` for queries at some positions [N]."""
    device, rows = positions.device, positions[:, None]
    columns = torch.arange(keys, device=device)
    seen: Tensor | None = None
    if any(window):
        far = torch.iinfo(torch.int64).max
        apart, widths = (rows - columns).abs(), _by_head([w or far for w in window], device)
        near = apart < widths
        pairs = zip(window, dilation, strict=False)
        each = [d if w and isinstance(d, int) else 1 for w, d in pairs]
        if any(d > 1 for d in each):
            spacings = _by_head(each, device)
            near = (apart % spacings == 0) & (apart < widths * spacings)
            near = near | (torch.full((1,), keys, device=device) <= widths)
        if any(sink_tokens):
            near = near | (_rank(columns, mask) <= _by_head(sink_tokens, device))
        seen = near
    if causal:
        earlier = (columns <= rows)[None, None, None]
        seen = earlier if seen is None else seen & earlier
    if mask is not None:
        unmasked = (mask != 0)[:, None, None, None]
        seen = unmasked if seen is None else seen & unmasked
    return seen


def _by_head(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[None, :, None, None, None]


def _rank(columns: Tensor, mask: Tensor | None) -> Tensor:
    """Unmasked keys up to each one; hidden keys need none, since the mask hides them anyway."""
    if mask is None:
        return (columns + 1)[None, None, None, None]
    return (mask != 0).to(torch.int64).cumsum(1)[:, None, None, None]
