"""Quantising blocks of tokens and packing the integers into bytes.

    x ≈ q * scale + zero,   0 <= q < 2 ** bits

`zero` is the minimum rounded down to bfloat16 and `scale` is rounded up, so that the range still
covers the maximum: the error is at most scale / 2 (up to the rounding of the arithmetic), and
nothing overflows that bfloat16 can hold. What a dot product over keys or values sums over lies
together, the channels of a key and the tokens of a value's channel, and packing is planar along
it: of n numbers, byte j holds j, j + n/2 (4 bits) or j, j + n/4, j + n/2, j + 3n/4 (2 bits), the
first one lowest. What is exported uses %, // and +, * on uint8, which is what onnxruntime takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A little more than half of a unit in bfloat16's last place, whatever the significand; and its
# smallest positive number, for what underflows.
_STEP = 2.0**-8 + 2.0**-12
_TINY = 2.0**-133


def wide(x: Tensor) -> Tensor:
    """`x` in the precision in which ranges are computed: float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def round_down(x: Tensor) -> Tensor:
    """The largest bfloat16 not above `x`, in the dtype of `x`; onnxruntime only casts bfloat16."""
    near = x.to(torch.bfloat16).to(x.dtype)
    below = (near - (near.abs() * _STEP).clamp(min=_TINY)).to(torch.bfloat16).to(x.dtype)
    return torch.where(near > x, below, near)


def round_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 not below `x`, in the dtype of `x`."""
    return -round_down(-x)


def quantize(x: Tensor, valid: Tensor | None, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (uint8, shape of `x`), scale and zero (bfloat16, `dim` of size 1).

    What is not `valid` (bool, broadcast over `x`) enters no range and becomes 0; a group
    without anything valid gets scale 0 and zero 0.
    """
    x = wide(x)
    levels = 2**bits - 1
    if valid is None:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    else:
        low = torch.where(valid, x, float("inf")).amin(dim, keepdim=True)
        high = torch.where(valid, x, float("-inf")).amax(dim, keepdim=True)
        low, high = torch.where(low > high, 0.0, low), torch.where(low > high, 0.0, high)
    zero = round_down(low)
    scale = round_up(high / levels - zero / levels)
    q = torch.round((x - zero) / torch.where(scale > 0, scale, 1.0)).clamp(0, levels)
    if valid is not None:
        q = torch.where(valid, q, 0.0)
    return q.to(torch.uint8), scale.to(torch.bfloat16), zero.to(torch.bfloat16)


def pack(q: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] with values below 2 ** bits -> uint8 [..., D * bits / 8]."""
    planes = 8 // bits
    width = q.shape[-1] // planes
    packed = q[..., :width]
    for plane in range(1, planes):
        packed = packed + q[..., plane * width : (plane + 1) * width] * 2 ** (bits * plane)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., D * bits / 8] -> uint8 [..., D]."""
    if bits == 8:
        return packed
    steps = range(0, 8, bits)
    if torch.compiler.is_exporting():
        return torch.cat([packed // 2**step % 2**bits for step in steps], dim=-1)
    # Division of bytes is no vector instruction: thirty times as slow on a CPU.
    return torch.cat([(packed >> step) & (2**bits - 1) for step in steps], dim=-1)


def pack_codes(q: Tensor, side: str, bits: int) -> Tensor:
    """Integers [..., group, D] as one side stores them."""
    return pack(q if side == "key" else q.transpose(-1, -2).contiguous(), bits)


def unpack_codes(packed: Tensor, side: str, bits: int) -> Tensor:
    """The integers [..., group, D] that one side stores."""
    q = unpack(packed, bits)
    return q if side == "key" else q.transpose(-1, -2)


def pack_side(x: Tensor, valid: Tensor | None, side: str, bits: int) -> dict[str, Tensor]:
    """The tensors that store blocks `x` [B, h, blocks, group, D] of keys or values.

    `valid` is bool [B, 1, blocks, group, 1]. Keys share a scale per channel over the tokens of a
    block, values per token over the channels. Values are stored as [B, h, blocks, D, group],
    packed along the last dimension.
    """
    if bits == 16:
        return {side: x}
    q, scale, zero = quantize(x, valid, 3 if side == "key" else 4, bits)
    return {side: pack_codes(q, side, bits), f"{side}_scale": scale, f"{side}_zero": zero}


def unpack_side(part: dict[str, Tensor], side: str, bits: int, dtype: torch.dtype) -> Tensor:
    """What `pack_side` stored, as [B, h, blocks, group, D] in `dtype`."""
    if bits == 16:
        return part[side]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_codes(part[side], side, bits).to(kind)
    return q.mul_(part[f"{side}_scale"].to(kind)).add_(part[f"{side}_zero"].to(kind)).to(dtype)
