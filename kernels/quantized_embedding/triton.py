"""One program a row: the row's bytes become numbers in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._triton.codes import nibble

BLOCK = 1024


@triton.jit
def _rows_kernel(
    packed, indices, scale, zero, out, WIDTH, GROUPS,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = (codes[indices[i]] - zero) * scale; packed [rows, WIDTH], planar within a group."""
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + i).to(tl.int64)
    o_byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_byte < WIDTH
    group = o_byte // PLANE
    b_byte = tl.load(packed + row * WIDTH + o_byte, mask=mask, other=0)
    b_scale = tl.load(scale + row * GROUPS + group, mask=mask, other=0.0).to(tl.float32)
    b_zero = tl.load(zero + row * GROUPS + group, mask=mask, other=0.0).to(tl.float32)
    p_out = out + i * WIDTH * PLANES + group * GROUP + o_byte % PLANE
    for i_p in tl.static_range(PLANES):
        b_code = b_byte
        if BITS == 4:
            b_code = nibble(b_byte, i_p)
        b_value = (b_code.to(tl.float32) - b_zero) * b_scale
        tl.store(p_out + i_p * PLANE, b_value.to(out.dtype.element_ty), mask=mask)


def quantized_embedding(
    packed: Tensor, indices: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
) -> Tensor:
    """As the reference; arithmetic in float32. Indices are not checked against the rows."""
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
    indices, width = indices.contiguous(), packed.shape[1]
    out = torch.empty((*indices.shape, width * 8 // bits), dtype=scale.dtype, device=scale.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        _rows_kernel[indices.numel(), triton.cdiv(width, block)](
            packed, indices, scale, zero, out, width, scale.shape[1],
            BITS=bits, GROUP=group_size, BLOCK=block,
        )  # fmt: skip
    return out
