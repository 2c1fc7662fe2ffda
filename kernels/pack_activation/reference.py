"""Values as integer codes, nearest of a symmetric grid that the largest of each group spans.

Zeros stay zeros, the largest stays itself, and -inf (what masks are made of) stays -inf. A group
that holds +inf or NaN comes back as NaN, so that what looks for either finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2.0**-119
"""Groups with no larger value are stored as zeros: their inverse would overflow float32."""


def pack_activation(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [groups, group_size * bits / 8] and, in x's dtype, the largest magnitude of each
    group [groups], over the values in the order of memory.

    `bits` is 8 or 4; the last group is filled up with zeros. Of 4 bits byte j of a group holds
    value j in its low half and value j + group_size / 2 in its high half. What comes back differs
    by at most half of top / (2^(bits - 1) - 1), and a rounding to the dtype.
    """
    check_format(x.dtype, bits, group_size)
    flat = in_memory_order(x)
    filled = F.pad(flat, (0, -flat.numel() % group_size))
    return encode(filled.unflatten(0, (-1, group_size)), bits)


def unpack_activation(
    codes: Tensor,
    top: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    bits: int,
    group_size: int,
) -> Tensor:
    """The values behind codes and magnitudes, in the dtype of `top`; `stride` has no gaps."""
    check_format(top.dtype, bits, group_size)
    check_layout(size, stride)
    count = elements(size)
    return decode(codes, top, bits).flatten()[:count].clone().as_strided(size, stride)


def encode(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and largest magnitudes of [groups, group_size]."""
    levels, offset = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    values = groups.to(_wide(groups.dtype))
    masked = values == -torch.inf
    values = values.masked_fill(masked, 0.0)
    top = values.abs().amax(-1)
    top = torch.where(top < torch.inf, top, torch.nan)
    top = torch.where(top < LEAST, 0.0, top)
    # a number over a tensor would be rounded twice
    rate = torch.where(top > 0, torch.full_like(top, levels) / top, 0.0)
    codes = torch.round(values * rate[:, None]).nan_to_num(0.0) + offset
    codes = codes.masked_fill(masked, 0.0).to(torch.uint8)
    if bits == 4:
        low, high = codes.unflatten(-1, (2, -1)).unbind(1)
        codes = low + high * 16
    return codes, top.to(groups.dtype)


def decode(codes: Tensor, top: Tensor, bits: int) -> Tensor:
    """Values [groups, group_size] in the dtype of `top` [groups]."""
    levels, offset = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    wide = _wide(top.dtype)
    if bits == 4:
        codes = torch.cat([codes % 16, codes // 16], -1)
    # exactly 1 for the largest code
    shares = (codes.to(wide) - offset) * (1 / levels)
    values = shares * top.to(wide)[:, None]
    return values.masked_fill(codes == 0, -torch.inf).to(top.dtype)


def in_memory_order(x: Tensor) -> Tensor:
    """The values of `x` in one dimension, as they lie in memory if there are no gaps."""
    dense = x if is_dense(x.shape, x.stride()) else x.contiguous()
    return dense.as_strided((dense.numel(),), (1,))


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether some order of the dimensions is contiguous."""
    expected = 1
    for step, count in sorted((s, n) for n, s in zip(size, stride, strict=True) if n != 1):
        if step != expected:
            return 0 in size
        expected *= count
    return True


def elements(size: Sequence[int]) -> int:
    """How many values a tensor of this size has."""
    count = 1
    for n in size:
        count *= n
    return count


def packed_shapes(count: int, bits: int, group_size: int) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes of the codes and magnitudes of `count` values."""
    groups = (count + group_size - 1) // group_size
    return (groups, group_size * bits // 8), (groups,)


def packed_bytes(count: int, dtype: torch.dtype, bits: int, group_size: int) -> int:
    """Bytes of the codes and magnitudes of `count` values."""
    (groups, width), _ = packed_shapes(count, bits, group_size)
    return groups * (width + dtype.itemsize)


def check_format(dtype: torch.dtype, bits: int, group_size: int) -> None:
    """Raises ValueError for a format that the ops do not know."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"pack_activation: takes float64, 32, 16 or bfloat16, got {dtype}")
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if not 16 <= group_size <= 1024 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two from 16 to 1024, got {group_size}")


def check_layout(size: Sequence[int], stride: Sequence[int]) -> None:
    """Raises ValueError for strides that leave gaps or overlap."""
    if len(size) != len(stride) or not is_dense(size, stride):
        raise ValueError(f"unpack_activation: strides {list(stride)} of {list(size)} leave gaps")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
