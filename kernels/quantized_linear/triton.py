"""Triton kernels of `quantized_linear`: the fused product, and dequantisation alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, contiguous, contiguous_epilogue
from fxopt.kernels._triton import splits as partial_sums
from fxopt.kernels._triton import vector
from fxopt.kernels._triton.codes import centred, nibble, scaled
from fxopt.kernels._triton.common import (
    ASM,
    DOT_UPCAST,
    dot,
    hopper,
    overlaps,
    processors,
    stages_that_fit,
    tile,
)
from fxopt.kernels._triton.epilogue import finished
from fxopt.kernels._triton.splits import start_dependents
from fxopt.kernels._triton.vector import Vector

from .op import PAIRED_VECTOR_ROWS, VECTOR_ROWS


@triton.jit
def _along(column, FIRST: tl.constexpr):
    """A number a weight row as a tensor of two dimensions, of which they are the FIRST."""
    return column[:, None] if FIRST else column[None, :]


@triton.jit
def _product(
    x, packed, scale, zero, bias, o_m, r_n, m_m, first, last, K, WIDTH, GROUPS,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ASM: tl.constexpr, UPCAST: tl.constexpr, UNROLL: tl.constexpr,
    SWAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight.T + bias in float32 [BLOCK_M, BLOCK_N], over the steps from `first` to `last`.

    A step has BLOCK_K bytes of each row `r_n` and lies in one group. The scale joins the sum of a
    step, or, SCALE_FIRST, the weight, which is then rounded to the dtype as the reference does.
    SWAPPED computes the transpose: Hopper's products take their first operand from registers,
    where the codes are unpacked, the second only from memory.
    """
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    GROUP_STEPS: tl.constexpr = (PLANE + BLOCK_K - 1) // BLOCK_K
    RAGGED: tl.constexpr = PLANE % BLOCK_K != 0
    o_k = tl.arange(0, BLOCK_K)
    if SWAPPED:
        p_x = x + o_m.to(tl.int64)[None, :] * K + o_k[:, None]
        p_packed = packed + r_n[:, None] * WIDTH + o_k[None, :]
        b_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        p_x = x + o_m.to(tl.int64)[:, None] * K + o_k[None, :]
        p_packed = packed + r_n[None, :] * WIDTH + o_k[:, None]
        b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    p_scale, p_zero = scale + r_n * GROUPS, zero + r_n * GROUPS
    for i in tl.range(first, last, loop_unroll_factor=UNROLL):
        i_g = i // GROUP_STEPS
        # Carried from step to step, these would keep the compiler from loading the bytes as the
        # product's operand, and each step would pass through shared memory twice more.
        b_zero, b_scale = tl.load(p_zero + i_g), tl.load(p_scale + i_g)
        b_zero, b_scale = _along(b_zero, SWAPPED), _along(b_scale, SWAPPED)
        i_k = (i % GROUP_STEPS) * BLOCK_K
        m_k = i_k + o_k < PLANE
        if RAGGED:
            m_byte = m_k[None, :] if SWAPPED else m_k[:, None]
            b_byte = tl.load(p_packed + i_g * PLANE + i_k, mask=m_byte, other=0)
        else:
            b_byte = tl.load(p_packed + i_g * PLANE + i_k)
        b_step = b_y if SCALE_FIRST else tl.zeros_like(b_y)
        for i_p in tl.static_range(PLANES):
            m_x = m_m[None, :] if SWAPPED else m_m[:, None]
            if RAGGED:
                m_x = m_x & (m_k[:, None] if SWAPPED else m_k[None, :])
            b_x = tl.load(p_x + i_g * GROUP + i_p * PLANE + i_k, mask=m_x, other=0.0)
            b_w = centred(b_byte, b_zero, b_x.dtype, BITS, i_p, ASM)
            if SCALE_FIRST:
                b_w = scaled(b_w, b_scale, ASM)
            b_step = dot(b_w, b_x, b_step, UPCAST) if SWAPPED else dot(b_x, b_w, b_step, UPCAST)
        if SCALE_FIRST:
            b_y = b_step
        else:
            b_y += b_step * b_scale.to(tl.float32)
    if HAS_BIAS:
        b_y += _along(tl.load(bias + r_n).to(tl.float32), SWAPPED)
    if SWAPPED:
        b_y = tl.trans(b_y)
    return b_y


@triton.jit(do_not_specialize=["M", "STEPS"])
def _product_kernel(
    x, packed, scale, zero, bias, up_packed, up_scale, up_zero, up_bias, residual, out,
    M, N, K, WIDTH, GROUPS, STEPS,
    BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr, SCALE_FIRST: tl.constexpr,
    ASM: tl.constexpr, UPCAST: tl.constexpr, OVERLAP: tl.constexpr, UNROLL: tl.constexpr,
    SWAPPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x @ weight.T and what follows it; or, SPLIT, out[split] = the sum over the
    split's STEPS steps alone, and of the second product out[splits + split].

    x [M, K]; packed [N, WIDTH]; scale and zero [N, GROUPS]; residual [M, N].
    """
    PLANE: tl.constexpr = GROUP * BITS // 8
    start_dependents(OVERLAP)
    i_s = tl.program_id(2)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    # Rows beyond the last read the last one: masks would cost more.
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    first = i_s * STEPS
    last = tl.minimum(first + STEPS, GROUPS * ((PLANE + BLOCK_K - 1) // BLOCK_K))
    m_y = m_m[:, None] & (o_n < N)[None, :]
    o_y = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    b_y = _product(
        x, packed, scale, zero, bias, o_m, r_n, m_m, first, last, K, WIDTH, GROUPS,
        BITS, GROUP, HAS_BIAS, SCALE_FIRST, ASM, UPCAST, UNROLL, SWAPPED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    b_up = b_y
    if PAIRED:
        b_up = _product(
            x, up_packed, up_scale, up_zero, up_bias, o_m, r_n, m_m, first, last, K, WIDTH, GROUPS,
            BITS, GROUP, HAS_UP_BIAS, SCALE_FIRST, ASM, UPCAST, UNROLL,
            SWAPPED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if SPLIT:
        size = M.to(tl.int64) * N
        tl.store(out + i_s * size + o_y, b_y, mask=m_y)
        if PAIRED:
            tl.store(out + (tl.num_programs(2) + i_s) * size + o_y, b_up, mask=m_y)
    else:
        b_y = finished(
            b_y, b_up, residual + o_y, m_y, out.dtype.element_ty, ACTIVATION, PAIRED, HAS_RESIDUAL
        )
        tl.store(out + o_y, b_y, mask=m_y)


@triton.jit
def _dequantize_kernel(
    packed, scale, zero, w, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    PLANE: tl.constexpr = GROUP // PLANES
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_g = tl.program_id(1)
    m_n = o_n < N
    groups = K // GROUP
    b_zero = tl.load(zero + o_n * groups + i_g, mask=m_n, other=0.0).to(tl.float32)
    b_scale = tl.load(scale + o_n * groups + i_g, mask=m_n, other=0.0).to(tl.float32)
    for i_k in range(0, PLANE, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        mask = m_n[:, None] & (o_k < PLANE)[None, :]
        p_packed = packed + o_n[:, None] * (K // PLANES) + (i_g * PLANE + o_k)[None, :]
        b_byte = tl.load(p_packed, mask=mask, other=0)
        for i_p in tl.static_range(PLANES):
            b_code = b_byte
            if BITS == 4:
                b_code = nibble(b_byte, i_p)
            b_w = (b_code.to(tl.float32) - b_zero[:, None]) * b_scale[:, None]
            p_w = w + o_n[:, None] * K + (i_g * GROUP + i_p * PLANE + o_k)[None, :]
            tl.store(p_w, b_w.to(w.dtype.element_ty), mask=mask)


class Configuration(NamedTuple):
    """How the product is cut. `splits` programs share the sum of one tile of outputs."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int
    unroll: int = 1
    scale_first: bool = False
    swapped: bool = False


def configuration(
    rows: int,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    paired: bool = False,
) -> Configuration:
    """The fastest that were found on an H100; `benchmarks/linear.py --sweep` compares them.

    Times cuBLAS's speed at 4096 x 4096, 4096 x 14336 and 14336 x 4096. Up to 16 rows: 1.70, 2.07
    and 2.06 for 4 bits, 1.46, 1.52 and 1.51 for 8, with whole groups of bytes at once. 4 bits with
    32 rows: 1.22, 1.57 and 1.42; 64: 1.12, 1.34 and 1.22; 256: 0.69, 0.71 and 0.75. The transpose
    gains 14 to 28 % for 33 to 64 rows of weights of fewer than 8,192 rows, and 19 to 27 % for more
    than 128 rows of all but the smallest weight, where it loses 7 %.

    A program of two weights, `paired`, reads twice as much: it takes fewer rows of each, so that
    sums are split later. Against tiles as wide as those of one weight, that was not measured.

    Where a device has less shared memory than tiles take, there are fewer stages.
    """
    plane = group_size * bits // 8
    block_k = tile(plane, most=64)
    few, wide = rows <= 16, out_features >= 8192
    transposes = hopper(device) and dtype.itemsize == 2
    if rows > 128 and transposes and max(out_features, in_features) >= 8192:
        c = Configuration(256, 128, block_k, 1, 8, 3, scale_first=True, swapped=True)
        programs = 1.0
    elif 32 < rows <= 64 and transposes and not wide:
        c = Configuration(64, 64, block_k, 1, 4, 4, swapped=True)
        programs = 2.0
    elif few and bits == 8 and plane >= 128:
        c = Configuration(16, 64, 128, 1, 4, 3)
        programs = 2.7
    else:
        block_m = 16 if few else tile(rows, least=32, most=128)
        block_n, stages = 128 if few and wide and not paired else 64, 3 if block_m == 128 else 4
        c = Configuration(block_m, block_n, block_k, 1, 4, stages, scale_first=not few)
        programs = 1.0 if 16 < rows <= 64 else 2.0
    steps = in_features // group_size * triton.cdiv(plane, c.block_k)
    tiles = triton.cdiv(out_features, c.block_n) * triton.cdiv(rows, c.block_m)
    wanted = programs * processors(device) / tiles
    splits = 1
    while splits * 1.5 < wanted and steps >= splits * 8:
        splits *= 2
    size, codes = dtype.itemsize, c.block_n * c.block_k
    x = 8 // bits * c.block_m * c.block_k * size
    stages = stages_that_fit(c.stages, x, codes, codes * size, device)
    return c._replace(splits=splits, stages=stages)


def by_vector(rows: int, width: int, plane: int) -> Vector:
    """For one or two rows of x and `width` bytes of each row of the weight.

    Times cuBLAS's speed at the three shapes of `configuration`: 4 bits 2.24, 2.71 and 2.74 for one
    row, 2.22, 2.16 and 2.40 for two; 8 bits 1.77, 1.72 and 1.76, and 1.54, 1.65 and 1.67.
    """
    if width > 4096:
        v = Vector(8, 1024, 4, 3)
    elif width > 2048:
        v = Vector(4, 1024, 4) if rows == 1 else Vector(4, 512, 2)
    else:
        v = Vector(4, 512, 2) if rows == 1 else Vector(8, 1024, 4)
    return v._replace(block_k=max(plane, min(v.block_k, triton.next_power_of_2(width))))


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The weight [out, in] in the scale's dtype; arguments as in the reference."""
    out_features, in_features = packed.shape[0], packed.shape[1] * 8 // bits
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
    weight = torch.empty((out_features, in_features), dtype=scale.dtype, device=scale.device)
    block_n = 32
    grid = (triton.cdiv(out_features, block_n), in_features // group_size)
    _dequantize_kernel[grid](
        packed, scale, zero, weight, out_features, in_features,
        BITS=bits, GROUP=group_size, BLOCK_N=block_n, BLOCK_K=tile(group_size * bits // 8),
    )  # fmt: skip
    return weight


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    chosen: Configuration | Vector | None = None,
    after: Epilogue = PLAIN,
) -> Tensor:
    """As the reference, without the dequantised weight; float32 accumulation.

    Where several programs share a sum, their parts are added in a fixed order. What comes `after`
    the product is part of its store, or of the addition of the parts.
    """
    out_features, in_features = packed.shape[0], packed.shape[1] * 8 // bits
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
    bias, after = contiguous(bias), contiguous_epilogue(after)
    rows = x.reshape(-1, in_features).contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    if y.numel() == 0:
        return y
    count, groups = len(rows), in_features // group_size
    few = VECTOR_ROWS if after.up is None else PAIRED_VECTOR_ROWS.get(bits, VECTOR_ROWS)
    if chosen is None and count <= few and vector.fits(count, bits, group_size):
        chosen = by_vector(count, packed.shape[1], group_size * bits // 8)
    if isinstance(chosen, Vector):
        return vector.quantized_linear(
            rows, packed, scale, zero, bias, y, bits, group_size, chosen, after
        )
    c = chosen or configuration(
        count, out_features, in_features, bits, group_size, x.device, x.dtype, after.up is not None
    )
    steps = triton.cdiv(groups * triton.cdiv(group_size * bits // 8, c.block_k), c.splits)
    alone, up = c.splits == 1, after.up or (None, None, None, None)
    parts = c.splits if after.up is None else 2 * c.splits
    out = y if alone else partial_sums.workspace(parts, count, out_features, y)
    grid = (triton.cdiv(out_features, c.block_n), triton.cdiv(count, c.block_m), c.splits)
    _product_kernel[grid](
        rows, packed, scale, zero, bias, *up, y if after.residual is None else after.residual, out,
        count, out_features, in_features, packed.shape[1], groups, steps,
        BITS=bits, GROUP=group_size, HAS_BIAS=alone and bias is not None,
        HAS_UP_BIAS=alone and up[3] is not None, ACTIVATION=after.activation if alone else "",
        PAIRED=after.up is not None, HAS_RESIDUAL=alone and after.residual is not None,
        SPLIT=not alone, SCALE_FIRST=c.scale_first, ASM=ASM, UPCAST=DOT_UPCAST,
        OVERLAP=not alone and overlaps(x.device), UNROLL=c.unroll,
        SWAPPED=c.swapped, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return y if alone else partial_sums.add(out, bias, y, after)
