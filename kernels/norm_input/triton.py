"""One program a row, some of its values at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _norm_input_kernel(
    y, weight, bias, rstd, mean, x, D, least,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, RSTD: tl.constexpr, MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    s_rstd, s_mean = 1.0, 0.0
    if RSTD:
        s_rstd = tl.load(rstd + i_r).to(tl.float32)
    if MEAN:
        s_mean = tl.load(mean + i_r).to(tl.float32)
    for i_d in range(0, D, BLOCK):
        o_d = i_d + tl.arange(0, BLOCK)
        m_d = o_d < D
        b_x = tl.load(y + i_r * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        if BIAS:
            b_x -= tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        if WEIGHT:
            b_w = tl.load(weight + o_d, mask=m_d, other=1.0).to(tl.float32)
            b_x = tl.where(tl.abs(b_w) >= least, b_x / b_w, 0.0)
        if RSTD:
            b_x = b_x / s_rstd
        if MEAN:
            b_x += s_mean
        tl.store(x + i_r * D + o_d, b_x.to(x.dtype.element_ty), mask=m_d)


def norm_input(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    least: float,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """As the reference's, of a contiguous y, in float32."""
    x = torch.empty_like(y, dtype=dtype)
    width = y.shape[-1]
    given = [y if t is None else t.contiguous() for t in (weight, bias, rstd, mean)]
    _norm_input_kernel[(y.numel() // width,)](
        y, *given, x, width, least,
        WEIGHT=weight is not None, BIAS=bias is not None, RSTD=rstd is not None,
        MEAN=mean is not None, BLOCK=min(BLOCK, triton.next_power_of_2(width)),
    )  # fmt: skip
    return x.view(*size)
