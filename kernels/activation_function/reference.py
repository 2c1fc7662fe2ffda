"""A function's derivative as a number of its piece: codes of a forward, gradients of a backward.

The derivative is `levels[i]` for values above `borders[i - 1]`, up to and with `borders[i]`. NaN is
above every border.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.pack_activation.reference import elements, in_memory_order, is_dense

GROUP = 1024
"""Values whose codes lie together; the last group is filled up."""


def derivative_codes(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """Numbers of pieces, uint8 [groups, bits, GROUP / 8], over the values of `x` in the order of
    memory.

    `borders` ascend, at most 2^bits - 1 of them, of 1 to 4 bits; x is floating or bool. Byte j of
    plane p holds bit p of the codes of the values j + k * GROUP / 8, for k = 0 in its lowest bit.
    """
    check_codes(borders, bits)
    flat = in_memory_order(x)
    return encode(F.pad(flat, (0, -flat.numel() % GROUP)), borders, bits)


def times_derivative(
    gradient: Tensor, codes: Tensor, stride: Sequence[int], levels: Sequence[float], bits: int
) -> Tensor:
    """`gradient` times the derivative at the x of `codes`, of its size with these strides.

    Computed in float32 (float64 for float64) and rounded to the gradient's dtype once. The result
    has the strides that a product of gradient and x has.
    """
    check_levels(gradient.shape, codes, stride, levels, bits)
    count, wide = gradient.numel(), _wide(gradient.dtype)
    flat = decode(codes, levels, bits, wide)[:count]
    derivative = flat.as_strided(gradient.shape, stride)
    return (gradient.to(wide) * derivative).to(gradient.dtype)


def encode(flat: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    """Codes of whole groups of values [groups * GROUP]."""
    wide = flat.to(_wide(flat.dtype))
    pieces = torch.bucketize(wide, wide.new_tensor(borders), out_int32=True).to(torch.uint8)
    pieces = pieces.unflatten(0, (-1, 8, GROUP // 8))
    planes = [_byte((pieces // 2**p) % 2) for p in range(bits)]
    return torch.stack(planes, 1)


def decode(codes: Tensor, levels: Sequence[float], bits: int, dtype: torch.dtype) -> Tensor:
    """The derivative in one dimension, all groups filled."""
    pieces = torch.zeros(codes.shape[0], 8, codes.shape[2], dtype=torch.int32, device=codes.device)
    for p in range(bits):
        for k in range(8):
            pieces[:, k] += (codes[:, p] // 2**k % 2).to(torch.int32) * 2**p
    filled = [*levels, *[levels[-1]] * (2**bits - len(levels))]
    return torch.tensor(filled, dtype=dtype, device=codes.device)[pieces.flatten()]


def _byte(ones: Tensor) -> Tensor:
    """uint8 [groups, width] of bits [groups, 8, width], the first the lowest."""
    byte = ones[:, 0].clone()
    for k in range(1, 8):
        byte += ones[:, k] * 2**k
    return byte


def code_shape(count: int, bits: int) -> tuple[int, int, int]:
    """The shape of the codes of so many values."""
    return (count + GROUP - 1) // GROUP, bits, GROUP // 8


def code_bytes(count: int, bits: int) -> int:
    """Bytes of the codes of so many values."""
    groups, _, width = code_shape(count, bits)
    return groups * bits * width


def check_codes(borders: Sequence[float], bits: int) -> None:
    """Raises ValueError for pieces that the ops do not know."""
    if not 1 <= bits <= 4:
        raise ValueError(f"derivative_codes: bits must be 1 to 4, got {bits}")
    ordered = list(borders) == sorted(borders)
    if not ordered or not 1 <= len(borders) < 2**bits:
        raise ValueError(
            f"derivative_codes: {bits} bits take 1 to {2**bits - 1} borders in ascending order, "
            f"got {list(borders)}"
        )


def check_levels(
    size: Sequence[int], codes: Tensor, stride: Sequence[int], levels: Sequence[float], bits: int
) -> None:
    """Raises ValueError for codes, strides or levels that do not belong together."""
    expected = code_shape(elements(size), bits)
    if tuple(codes.shape) != expected:
        raise ValueError(
            f"times_derivative: a gradient {list(size)} in {bits} bits has codes "
            f"{list(expected)}, not {list(codes.shape)}"
        )
    if not 1 <= len(levels) <= 2**bits:
        raise ValueError(f"times_derivative: {bits} bits take {2**bits} levels, got {len(levels)}")
    if len(size) != len(stride) or not is_dense(size, stride):
        raise ValueError(f"times_derivative: strides {list(stride)} of {list(size)} leave gaps")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
