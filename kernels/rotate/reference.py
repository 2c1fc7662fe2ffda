"""Rotary position embedding in plain PyTorch (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D] with channel i and i + D / 2 as a pair; cos and sin broadcast to x and have
    its dtype. Each product and the sum are rounded, as where they are calls of their own."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def rotate_both(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    query_mix: Tensor | None,
    key_mix: Tensor | None,
    heads: Sequence[int],
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D] and k [B, KV, N, D], both turned where there are cos and sin, and the channels
    of the KV heads `heads` (all of them, if none is named) times their matrices [heads, D, D]."""
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if query_mix is None or key_mix is None:
        return q, k
    named = list(heads) or list(range(k.shape[1]))
    return _mixed(q, query_mix, named, k.shape[1]), _mixed(k, key_mix, named, k.shape[1])


def _mixed(x: Tensor, matrices: Tensor, heads: Sequence[int], kv_heads: int) -> Tensor:
    group = x.shape[1] // kv_heads
    found = list(x.unbind(1))
    for place, head in enumerate(heads):
        for i in range(head * group, (head + 1) * group):
            found[i] = found[i] @ matrices[place]
    return torch.stack(found, 1)
