"""Dilated windows of sequences: tokens that leave one rest are a sequence of their own.

Under a window w and a dilation d a token sees those nearer than w * d whose distance d divides
(Longformer, arXiv 2004.05150). The tokens of one rest modulo d, in their order, then have an
ordinary window of w. So a batch of sequences becomes one of d times as many, each shorter, and any
kernel with windows serves it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Attention


def is_dilated(call: Attention) -> bool:
    """Whether a call whose heads are alike has a dilated window."""
    return bool(call.window[0]) and call.dilation[0] != 1


def spacing(call: Attention) -> int:
    """The one dilation of the windows of a call."""
    (found,) = {d for d in call.dilation if isinstance(d, int)}
    return found


def folded(call: Attention) -> Attention:
    """A call with windows of one dilation as one without, on d times as many sequences: [B * d, H,
    ceil(N / d), D]. Keys that fill up a sequence are masked."""
    each, keys = spacing(call), call.k.shape[2]
    q, k, v = (fold(x, 2, each) for x in (call.q, call.k, call.v))
    mask = call.mask
    if mask is None and keys % each:
        mask = torch.ones(q.shape[0] // each, keys, dtype=torch.bool, device=q.device)
    # A window that reaches past both ends hides nothing.
    window = tuple(w if w < k.shape[2] else 0 for w in call.window)
    return replace(
        call, q=q, k=k, v=v, mask=None if mask is None else fold(mask, 1, each),
        window=window, dilation=(1,) * call.num_kv_heads,
    )  # fmt: skip


def unfolded(call: Attention, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, N, H, Dv] and log-sum-exp [B, H, N] of a call from those of `folded`."""
    each, length = spacing(call), call.q.shape[2]
    return unfold(out, 1, each, length), unfold(lse, 2, each, length)


def fold(x: Tensor, dim: int, each: int) -> Tensor:
    """[B, ..., N, ...] as [B * each, ..., ceil(N / each), ...], zeros behind the end."""
    missing = -x.shape[dim] % each
    x = F.pad(x, [0, 0] * (x.dim() - dim - 1) + [0, missing]) if missing else x
    return x.unflatten(dim, (-1, each)).movedim(dim + 1, 1).flatten(0, 1)


def unfold(x: Tensor, dim: int, each: int, length: int) -> Tensor:
    """What `fold` made [B * each, ..., n, ...] as [B, ..., length, ...], contiguous."""
    x = x.unflatten(0, (-1, each)).movedim(1, dim + 1).flatten(dim, dim + 1)
    return x.narrow(dim, 0, length).contiguous()
