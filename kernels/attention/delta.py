"""Prompts whose hidden keys are made up for by rows that see all of them (Delta Attention, 2025).

Every EVERY-th query attends to all keys as well. What that adds to its own output stands for what
its followers miss, and they add a share of it: all of it, as in the paper, made most heads of the
trained model in examples/ worse, since what a head finds far away changes from token to token.
No row uses what a later one found. The last tiles of a prompt, which hold its question, and
decoded tokens have nothing to add and see all keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxopt.kernels.block_topk import reference as topk

from .spec import Attention
from .tiles import TILE_ELEMENTS, Tile, attend

EVERY = 64
"""Rows of a prompt that share one row that sees all keys: 1 / EVERY of dense attention."""


def corrected_rows(queries: int) -> int:
    """How many of the first queries of a call miss keys; the others see all."""
    return max(0, topk.tiles(queries) - topk.SPARED) * topk.TILE


def corrected(
    call: Attention,
    compute: Callable[[Attention], Tensor],
    ask: Callable[[Attention], Tensor],
) -> Tensor:
    """The output [B, N, H, Dv] of a call whose heads all have a `delta`.

    `compute` attends without it; `ask` returns what every EVERY-th query of a call finds when it
    sees all keys.
    """
    early = corrected_rows(call.q.shape[2])
    sparse = replace(call, delta=(0,) * call.q.shape[1])
    first = _first(sparse, early)
    asked = ask(first.without_limits())
    if any(call.top):
        out = compute(sparse)
        _add(out[:, :early], asked, call)
        return out
    out = compute(first)
    _add(out, asked, call)
    late = replace(sparse, q=call.q[:, :, early:]).without_limits()
    return torch.cat([out, compute(late)], 1)


def _add(out: Tensor, asked: Tensor, call: Attention) -> None:
    """Give rows [B, n, H, Dv] their share of what the asked ones among them missed."""
    missed = (asked - out[:, ::EVERY]) * _shares(call.delta, out.dtype, out.device)
    out.unflatten(1, (-1, EVERY)).add_(missed[:, :, None])
    out[:, ::EVERY] = asked


@functools.cache
def _shares(delta: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of each query head, [H, 1]; kept, so that a captured CUDA graph copies nothing."""
    with torch.inference_mode(False):
        return torch.tensor([[d / 1000] for d in delta], dtype=dtype).to(device)


def ask_reference(call: Attention) -> Tensor:
    """Dense causal attention of every EVERY-th query of `call`, [B, n / EVERY, H, Dv]."""
    q = call.q[:, :, ::EVERY]
    batch, heads, rows, _ = q.shape
    positions = torch.arange(rows, device=q.device)[:, None] * EVERY + call.offset
    size = max(1, TILE_ELEMENTS // (batch * heads * call.k.shape[2]))
    parts: list[Tensor] = []
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        end = (stop - 1) * EVERY + call.offset + 1
        seen = (torch.arange(end, device=q.device) <= positions[start:stop])[None, None]
        if call.mask is not None:
            seen = seen & (call.mask[:, None, None, :end] != 0)
        k, v = call.k[:, :, :end], call.v[:, :, :end]
        part = q[:, :, start:stop]
        parts.append(attend(Tile(part, k, v, seen, None, call.sinks, call.scale, call.softcap)))
    return torch.cat(parts, 2).transpose(1, 2)


def _first(call: Attention, count: int) -> Attention:
    """The first queries of a call, with the keys up to the last of them."""
    end = call.offset + count
    mask = None if call.mask is None else call.mask[:, :end]
    return replace(
        call, q=call.q[:, :, :count], k=call.k[:, :, :end], v=call.v[:, :, :end], mask=mask
    )
