"""Products whose sum is split among programs: partial sums, and the kernel that adds them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxopt.kernels._epilogue import PLAIN, Epilogue

from .common import overlaps
from .epilogue import finished

PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def start_dependents(OVERLAP: tl.constexpr):
    """Let the next kernel be loaded; its `wait` still holds it until this one has ended."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()


@triton.jit
def prefetch(pointers, K, BYTES: tl.constexpr, LINES: tl.constexpr):
    """Send rows of K elements at `pointers` [n] to the second-level cache, line by line."""
    LINE: tl.constexpr = 128 // BYTES
    o_line = tl.arange(0, LINES) * LINE
    for i_k in range(0, K, LINES * LINE):
        address = (pointers[:, None] + tl.minimum(i_k + o_line, K - 1)[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            PREFETCH, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _bias(bias, o_y, m_y, N, HAS_BIAS: tl.constexpr):
    b_y = tl.zeros(o_y.shape, tl.float32)
    if HAS_BIAS:
        b_y += tl.load(bias + o_y % N, mask=m_y, other=0.0).to(tl.float32)
    return b_y


@triton.jit
def _added(b_y, partial, o_y, m_y, first, M, N, SPLITS):
    """b_y and the SPLITS sums from the `first` on, in order."""
    for i_s in range(first, first + SPLITS):
        b_y += tl.load(partial + (i_s * M).to(tl.int64) * N + o_y, mask=m_y, other=0.0)
    return b_y


@triton.jit(do_not_specialize=["M", "SPLITS"])
def _sum_kernel(
    partial, bias, up_bias, residual, y, M, N, SPLITS,
    HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PAIRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WAITS: tl.constexpr, STARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = partial [SPLITS, M, N] added in order, and what follows the product.

    PAIRED, `partial` has the parts of the second product behind those of the first.
    """
    start_dependents(STARTS)
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_y = o_y < M * N
    b_y = _bias(bias, o_y, m_y, N, HAS_BIAS)
    b_up = _bias(up_bias, o_y, m_y, N, HAS_UP_BIAS)
    wait(WAITS)
    b_y = _added(b_y, partial, o_y, m_y, 0, M, N, SPLITS)
    if PAIRED:
        b_up = _added(b_up, partial, o_y, m_y, SPLITS, M, N, SPLITS)
    b_y = finished(
        b_y, b_up, residual + o_y, m_y, y.dtype.element_ty, ACTIVATION, PAIRED, HAS_RESIDUAL
    )
    tl.store(y + o_y, b_y, mask=m_y)


def add(
    partial: Tensor, bias: Tensor | None, y: Tensor, after: Epilogue = PLAIN, starts: bool = False
) -> Tensor:
    """Fill y [..., N] with the sum of partial [splits, rows, N], always in the same order, and what
    is done to it after. With `after.up` there are as many sums of the second product behind.

    `starts`: the next kernel waits for this one by itself, and so may start early.
    """
    parts, rows, columns = partial.shape
    up_bias = None if after.up is None else after.up[-1]
    block = 256 if partial[0].numel() <= 1 << 16 else 1024
    overlap = overlaps(y.device)
    _sum_kernel[(triton.cdiv(rows * columns, block),)](
        partial, bias, up_bias, y if after.residual is None else after.residual, y, rows, columns,
        parts if after.up is None else parts // 2,
        HAS_BIAS=bias is not None, HAS_UP_BIAS=up_bias is not None, ACTIVATION=after.activation,
        PAIRED=after.up is not None, HAS_RESIDUAL=after.residual is not None,
        WAITS=overlap, STARTS=starts and overlap, BLOCK=block, num_warps=block // 128,
        launch_pdl=overlap,
    )  # fmt: skip
    return y


def workspace(splits: int, rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.empty((splits, rows, columns), dtype=torch.float32, device=like.device)
