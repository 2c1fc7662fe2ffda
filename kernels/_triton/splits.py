"""Products whose sum is split among programs: partial sums, and the kernel that adds them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .common import overlaps

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


@triton.jit(do_not_specialize=["M", "SPLITS"])
def _sum_kernel(
    partial, bias, y, M, N, SPLITS,
    HAS_BIAS: tl.constexpr, WAITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [M, N] = partial [SPLITS, M, N] added in order, and the bias."""
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_y = o_y < M * N
    b_y = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        b_y += tl.load(bias + o_y % N, mask=m_y, other=0.0).to(tl.float32)
    wait(WAITS)
    for i_s in range(SPLITS):
        b_y += tl.load(partial + (i_s * M).to(tl.int64) * N + o_y, mask=m_y, other=0.0)
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m_y)


def add(partial: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Fill y [..., N] with the sum of partial [splits, rows, N], always in the same order."""
    splits, rows, columns = partial.shape
    block = 256 if partial[0].numel() <= 1 << 16 else 1024
    overlap = overlaps(y.device)
    _sum_kernel[(triton.cdiv(rows * columns, block),)](
        partial, bias, y, rows, columns, splits, HAS_BIAS=bias is not None,
        WAITS=overlap, BLOCK=block, num_warps=block // 128,
        launch_pdl=overlap,
    )  # fmt: skip
    return y


def workspace(splits: int, rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.empty((splits, rows, columns), dtype=torch.float32, device=like.device)
