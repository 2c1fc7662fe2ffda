"""Softmax, loss and gradient of a chunk's logits, in place: one program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Options, Rows

BLOCK, WARPS = 4096, 4
PROGRAMS = 1024
"""Of the kernel that scales a gradient: most calls have nothing to do, and few end sooner."""


@triton.jit
def _load(x, o_v, V, SOFTCAP: tl.constexpr, softcap):
    b_x = tl.load(x + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
    if SOFTCAP:
        # tanh by way of a sigmoid: libdevice is not interpreted
        b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
        b_x = tl.where(o_v < V, b_x, float("-inf"))
    return b_x


@triton.jit
def _rows_kernel(
    logits, labels, lse, loss, grad_loss, grad_lse, V, stride,
    ignore_index, smoothing, softcap, z_loss,
    FORWARD: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [rows, V]: read for lse and loss, then overwritten by their gradient."""
    i_t = tl.program_id(0).to(tl.int64)
    x = logits + i_t * stride
    i_label = tl.load(labels + i_t)
    valid = i_label != ignore_index
    i_target = tl.where(valid, i_label, 0)
    if FORWARD:
        most = -float("inf")
        total = 0.0
        b_sum = tl.zeros((BLOCK,), tl.float32)
        for i_v in range(0, V, BLOCK):
            o_v = i_v + tl.arange(0, BLOCK)
            b_x = _load(x, o_v, V, SOFTCAP, softcap)
            higher = tl.maximum(most, tl.max(b_x, 0))
            total = total * tl.exp(most - higher) + tl.sum(tl.exp(b_x - higher), 0)
            most = higher
            if SMOOTHING:
                b_sum += tl.where(o_v < V, b_x, 0.0)
        s_lse = most + tl.log(total)
        # a label that is no class gives nan, not a read outside of the row
        s_target = tl.load(x + i_target, mask=(i_target >= 0) & (i_target < V), other=float("nan"))
        s_target = s_target.to(tl.float32)
        if SOFTCAP:
            s_target = softcap * (2 * tl.sigmoid(2 * s_target / softcap) - 1)
        s_loss = s_lse - (1 - smoothing) * s_target + z_loss * s_lse * s_lse
        if SMOOTHING:
            s_loss -= smoothing / V * tl.sum(b_sum, 0)
        tl.store(lse + i_t, s_lse)
        tl.store(loss + i_t, tl.where(valid, s_loss, 0.0))
    else:
        s_lse = tl.load(lse + i_t)
    if GRADIENT:
        s_b = 1.0
        if UPSTREAM:
            s_b = tl.load(grad_loss + i_t).to(tl.float32)
        s_b = tl.where(valid, s_b, 0.0)
        s_a = s_b * (1 + 2 * z_loss * s_lse)
        if UPSTREAM:
            s_a += tl.load(grad_lse + i_t).to(tl.float32)
        for i_v in range(0, V, BLOCK):
            o_v = i_v + tl.arange(0, BLOCK)
            b_x = _load(x, o_v, V, SOFTCAP, softcap)
            b_g = s_a * tl.exp(b_x - s_lse)
            if SMOOTHING:
                b_g -= s_b * smoothing / V
            b_g -= tl.where(o_v == i_target, s_b * (1 - smoothing), 0.0)
            if SOFTCAP:
                b_g *= 1 - (b_x / softcap) * (b_x / softcap)
            tl.store(x + o_v, b_g.to(logits.dtype.element_ty), mask=o_v < V)


def rows(chunk: Rows, options: Options, gradient: bool) -> None:
    """As the reference's, in float32 (float64 logits: the reference itself)."""
    logits, labels, lse, loss, upstream = chunk
    if logits.dtype == torch.float64:
        from . import reference

        reference.rows(chunk, options, gradient)
        return
    count, size = logits.shape
    if count == 0:
        return
    # Where a loss is made, it and `lse` are written to, and are slices of new tensors.
    lse = lse.contiguous() if loss is None else lse
    given = (lse, lse) if upstream is None else tuple(t.contiguous() for t in upstream)
    _rows_kernel[(count,)](
        logits, labels.contiguous(), lse, lse if loss is None else loss, *given, size,
        logits.stride(0), *options,
        FORWARD=loss is not None, GRADIENT=gradient, UPSTREAM=upstream is not None,
        SMOOTHING=options.label_smoothing > 0, SOFTCAP=options.softcap > 0,
        BLOCK=min(BLOCK, triton.next_power_of_2(size)), num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _scale_kernel(x, scale, count, step, BLOCK: tl.constexpr):
    """x [count] times scale, left alone where that is 1."""
    s_scale = tl.load(scale).to(tl.float32)
    if s_scale != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, step):
            o_x = start + tl.arange(0, BLOCK)
            b_x = tl.load(x + o_x, mask=o_x < count)
            tl.store(x + o_x, (b_x * s_scale).to(b_x.dtype), mask=o_x < count)


def scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """`gradient.mul_(scale)` of a dense gradient and a scale []; nothing is read where it is 1."""
    if gradient.dtype == torch.float64:
        return gradient.mul_(scale)
    programs = min(PROGRAMS, triton.cdiv(gradient.numel(), BLOCK))
    if programs:
        _scale_kernel[(programs,)](
            gradient, scale, gradient.numel(), programs * BLOCK, BLOCK=BLOCK, num_warps=WARPS
        )
    return gradient
