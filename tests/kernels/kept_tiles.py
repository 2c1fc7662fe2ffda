"""Calls of attention over some key tiles, and what they should give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.attention.blocks import TileLists
from fxopt.kernels.block_topk.reference import SPARED, TILE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Kept = Callable[[Tensor, Tensor, Tensor, int, int, dict[str, Any]], list[int]]
"""(q [N, D], k [T, D], shown [T], start, stop, call): the tiles that queries `start` to `stop` of
one head keep, in float64; "top" and "mass" of the call are that head's numbers."""


def make(
    queries: int, keys: int, kv: int = 2, group: int = 2, batch: int = 2, dim: int = 16,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    q, k, v = (
        torch.randn(batch, n, h, dim, device=DEVICE).to(dtype).transpose(1, 2)
        for n, h in ((queries, kv * group), (keys, kv), (keys, kv))
    )
    call: dict[str, Any] = {
        # Sharp enough for tiles to differ.
        "q": 2 * q, "k": k, "v": v, "mask": None, "bias": None, "sinks": None,
        "scale": dim**-0.5, "causal": True, "window": [0], "softcap": 0.0, "sink_tokens": [0],
        "top": [200], "delta": [0], "grid": [], "near": [0], "dilation": [1], "hip": [0],
        "mass": [0],
    }  # fmt: skip
    assert options.keys() <= call.keys()
    return call | options


def left_padded(batch: int, keys: int, padding: int) -> Tensor:
    mask = torch.ones(batch, keys, dtype=torch.int64, device=DEVICE)
    mask[0, :padding] = 0
    return mask


CASES: list[dict[str, Any]] = [
    {"queries": 1300, "keys": 1300},
    {"queries": 1409, "keys": 1409, "kv": 1, "group": 3, "batch": 1, "softcap": 3.0},
    {"queries": 1500, "keys": 1500, "batch": 2, "padding": 301},
    # After a past whose length is no multiple of a tile.
    {"queries": 400, "keys": 1501, "batch": 2, "padding": 127, "top": [100, 0]},
    {"queries": 1536, "keys": 1536, "top": [0, 50], "window": [200, 0], "group": 1},
    {"queries": 1537, "keys": 1537, "top": [300, 10], "sinks": True},
]


def case(given: dict[str, Any], **options: Any) -> dict[str, Any]:
    given = given | options
    padding, sinks = given.pop("padding", 0), given.pop("sinks", False)
    call = make(**given)
    batch, heads, keys = *call["q"].shape[:2], call["k"].shape[2]
    if padding:
        call["mask"] = left_padded(batch, keys, padding)
    if sinks:
        call["sinks"] = torch.randn(heads, device=DEVICE)
    return call


def candidates(shown: Tensor, start: int, stop: int, past: int) -> list[int]:
    """The tiles with a visible key that queries `start` to `stop` can see."""
    tiles = range((stop - 1 + past) // TILE + 1)
    return [t for t in tiles if shown[t * TILE : t * TILE + TILE].any()]


def is_spared(start: int, queries: int) -> bool:
    return start // TILE >= -(-queries // TILE) - SPARED


def kept_keys(call: dict[str, Any], kept: Kept) -> Tensor:
    """bool [B, H, N, T], one tile after another in float64."""
    q, k, mask = call["q"].double(), call["k"].double(), call["mask"]
    batch, heads, queries, _ = q.shape
    kv, keys = k.shape[1:3]
    seen = torch.zeros(batch, heads, queries, keys, dtype=torch.bool, device=q.device)
    for b in range(batch):
        shown = torch.ones(keys, dtype=torch.bool, device=q.device)
        shown = shown if mask is None else mask[b] != 0
        for h in range(heads):
            own = {n: call[n][h // (heads // kv) % len(call[n])] for n in ("top", "mass")}
            for start in range(0, queries, TILE):
                stop = min(start + TILE, queries)
                tiles = kept(q[b, h], k[b, h // (heads // kv)], shown, start, stop, call | own)
                for tile in tiles:
                    seen[b, h, start:stop, tile * TILE : tile * TILE + TILE] = True
        seen[b] &= shown
    return seen & torch.ones(queries, keys, device=q.device).tril(keys - queries).bool()


def definition(call: dict[str, Any], kept: Kept) -> Tensor:
    group = call["q"].shape[1] // call["k"].shape[1]
    q = call["q"].double()
    k, v = (call[name].double().repeat_interleave(group, 1) for name in "kv")
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ k.mT * call["scale"]
    if call["softcap"]:
        scores = call["softcap"] * torch.tanh(scores / call["softcap"])
    seen = kept_keys(call, kept)
    distance = torch.arange(queries, device=q.device)[:, None] + keys - queries
    distance = distance - torch.arange(keys, device=q.device)
    for head, window in enumerate(call["window"] * (k.shape[1] // len(call["window"]))):
        if window:
            seen[:, head] &= distance < window
    scores = scores.masked_fill(~seen, -torch.inf)
    if call["sinks"] is not None:
        logit = call["sinks"].double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logit], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., :keys]
    return (weights @ v).transpose(1, 2)


def listed(lists: TileLists, call: Any) -> Tensor:
    """Which tiles stand on lists, bool [B, H, query tiles, key tiles]; each once, in order, and
    whole where a full tile should be."""
    batch, heads, rows = lists.full_count.shape
    found = torch.zeros(
        batch, heads, rows, -(-call.k.shape[2] // TILE), dtype=torch.bool, device=call.k.device
    )
    first = torch.arange(rows) * TILE + call.offset
    for count, tiles in (lists.tensors()[:2], lists.tensors()[2:]):
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in count.shape)).tolist():
            line = tiles[b, h, i, : count[b, h, i]].long()
            assert (line.diff() > 0).all()
            assert not found[b, h, i, line].any()
            found[b, h, i, line] = True
    # A full tile is seen whole: it is over before the first query, and nothing of it is hidden.
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in found.shape[:3])).tolist():
        for tile in lists.full[b, h, i, : lists.full_count[b, h, i]].tolist():
            assert tile * TILE + TILE - 1 <= first[i]
            assert call.mask is None or call.mask[b, tile * TILE : tile * TILE + TILE].all()
    return found
