"""Attention in plain PyTorch: exact semantics, time and memory that follow the window.

Queries go in tiles, so that no [N, T] tensor exists for long inputs (Rabe and Staats,
Self-attention Does Not Need O(n²) Memory, 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import ask_reference, corrected
from .dilated import fold, folded, is_dilated, spacing, unfold, unfolded
from .spec import Attention, bind
from .tiles import (
    Tile,
    attend,
    explicit,
    fused,
    parts,
    sum_dtype,
    tile,
    tiles,
    without_idle_mask,
)


def attention_reference(
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
    """`fxopt::attention` on any device and in any floating dtype.

    Shapes and meaning as in `fxopt.ir.ops.attend`; scores are scaled, then capped, then biased.
    Returns [B, N, H, Dv], contiguous, in q's dtype; sums are kept in float32 at least.
    Differentiable. Raises ValueError for head counts and lists that do not fit.
    """
    return compute(
        bind(
            q, k, v, mask, bias, sinks,
            scale, causal, window, softcap, sink_tokens, top, delta, grid, near, dilation, hip,
            mass, skip,
        )
    )  # fmt: skip


def attention_with_lse(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`attention_reference` and, for each row, the logarithm of the sum of its exponentials.

    Returns ([B, N, H, Dv], lse [B, H, N] in float32, or float64 for float64 inputs). lse counts
    the sink logit; it is -inf where a query sees no key. For a subset S of the keys,
    o - o_S = (1 - exp(lse_S - lse)) * (mean of v under the dropped weights - o_S).
    Raises ValueError where rows are corrected: theirs is no sum over keys.
    """
    call = bind(*inputs, **options)
    if any(call.delta):
        raise ValueError("attention: rows that delta corrects have no log-sum-exp")
    return _with_lse(call)


def _with_lse(call: Attention) -> tuple[Tensor, Tensor]:
    out, q = _empty(call), call.q
    lse = torch.empty(q.shape[:3], dtype=sum_dtype(q), device=q.device)
    for part in parts(without_idle_mask(call)):
        if is_dilated(part.call):
            values, sums = unfolded(part.call, *_with_lse(folded(part.call)))
            part.put(out, 0, q.shape[2], values)
            part.put(lse.transpose(1, 2), 0, q.shape[2], sums.transpose(1, 2))
            continue
        for start, stop in tiles(part):
            values, sums = explicit(tile(part, start, stop))
            part.put(out, start, stop, values.transpose(1, 2))
            part.put(lse.transpose(1, 2), start, stop, sums.transpose(1, 2))
    return out, lse


def compute(call: Attention) -> Tensor:
    """The output of a checked call."""
    call = without_idle_mask(call)
    if call.plain and call.q.numel() and call.k.shape[2]:
        return plain(call)
    out = _empty(call)
    for part in parts(call):
        if any(part.call.delta):
            values = corrected(part.call, compute, ask_reference)
            part.put(out, 0, call.q.shape[2], values)
            continue
        if is_dilated(part.call):
            values = unfold(compute(folded(part.call)), 1, spacing(part.call), call.q.shape[2])
            part.put(out, 0, call.q.shape[2], values)
            continue
        for start, stop in tiles(part):
            values = attend(tile(part, start, stop))
            part.put(out, start, stop, values.transpose(1, 2))
    return out


def plain(call: Attention) -> Tensor:
    """A call without masks or extras, through the library's op."""
    q, k, v = call.q, call.k, call.v
    if q.shape[2] == 1:
        out = fused(Tile(q, k, v, None, None, None, call.scale, 0.0))
    else:
        grouped = call.group_size > 1
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=call.causal, scale=call.scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).contiguous()


def gradients(gradient: Tensor, call: Attention) -> dict[str, Tensor]:
    """Gradients of the floating inputs of `call`, by name, from that of its output.

    Each tile is computed again, so that nothing of size [N, T] is kept between forward and
    backward.
    """
    inputs = {name: getattr(call, name) for name in ("q", "k", "v", "bias", "sinks")}
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items() if t is not None}
    call = without_idle_mask(replace(call, **leaves))
    with torch.enable_grad():
        if call.plain and call.q.numel() and call.k.shape[2]:
            plain(call).backward(gradient)
        else:
            _tiled_backward(call, gradient)
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}


def _tiled_backward(call: Attention, gradient: Tensor) -> None:
    for part in parts(call):
        if any(part.call.delta):
            # Not tile by tile: rows depend on others, and training does not ask for it.
            out = corrected(part.call, compute, ask_reference)
            rows = part.pick(gradient, 0, call.q.shape[2])
            out.backward(rows, retain_graph=True)
            continue
        if is_dilated(part.call):
            rows = part.pick(gradient, 0, call.q.shape[2])
            _tiled_backward(folded(part.call), fold(rows, 1, spacing(part.call)))
            continue
        for start, stop in tiles(part):
            out = attend(tile(part, start, stop))
            if out.requires_grad:
                rows = part.pick(gradient, start, stop).transpose(1, 2)
                # All tiles of a part share its selection of heads.
                out.backward(rows, retain_graph=True)


def _empty(call: Attention) -> Tensor:
    batch, heads, queries, _ = call.q.shape
    shape = (batch, queries, heads, call.v.shape[3])
    return torch.empty(shape, dtype=call.q.dtype, device=call.q.device)
