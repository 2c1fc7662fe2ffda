"""Quantising blocks of tokens and packing the codes into bytes.

    x ≈ code * scale + zero,   code an integer, 0 <= code < 2 ** bits, or an e4m3 number

Of integers `zero` is the minimum rounded down to bfloat16 and `scale` is rounded up, so that the
range still covers the maximum: the error is at most scale / 2 (up to the rounding of the
arithmetic), and nothing overflows that bfloat16 can hold. Of e4m3 numbers ("f8" in the place of
bits) the error is up to 1/16 of |x - zero|: keys are stored about the middle of a channel's range,
which may lie far from 0 (the biases of Qwen2.5's keys), values about 0, without a zero.

What a dot product over keys or values sums over lies together, the channels of a key and the
tokens of a value's channel, and packing is planar along it: of n numbers, byte j holds j, j + n/2
(4 bits) or j, j + n/4, j + n/2, j + 3n/4 (2 bits), the first one lowest. What is exported uses %,
// and +, * on uint8, which is what onnxruntime takes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FLOAT8 = "f8"
Bits = int | Literal["f8"]
"""How a number is stored: 16 as it is, 8, 4 or 2 as an integer of that width, "f8" as e4m3."""
LARGEST = 448.0
"""The largest finite e4m3 number."""

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


def width(bits: Bits) -> int:
    """Bits of a number that is stored so."""
    return 8 if bits == FLOAT8 else bits


def has_zero(side: str, bits: Bits) -> bool:
    """Whether codes of keys or values count from a zero that is stored beside their scale."""
    return bits != 16 and (bits != FLOAT8 or side == "key")


def code_range(bits: Bits) -> tuple[float, float]:
    """The least and the largest code."""
    return (-LARGEST, LARGEST) if bits == FLOAT8 else (0.0, 2.0**bits - 1)


def quantize(x: Tensor, valid: Tensor | None, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (uint8, shape of `x`), scale and zero (bfloat16, `dim` of size 1).

    What is not `valid` (bool, broadcast over `x`) enters no range and becomes 0; a group
    without anything valid gets scale 0 and zero 0.
    """
    x = wide(x)
    levels = 2**bits - 1
    low, high = _range(x, valid, dim)
    zero = round_down(low)
    scale = round_up(high / levels - zero / levels)
    q = torch.round((x - zero) / torch.where(scale > 0, scale, 1.0)).clamp(0, levels)
    if valid is not None:
        q = torch.where(valid, q, 0.0)
    return q.to(torch.uint8), scale.to(torch.bfloat16), zero.to(torch.bfloat16)


def to_float8(
    x: Tensor, valid: Tensor | None, dim: int, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize`, but codes are e4m3 numbers, and zero is the middle of a range, or 0 unless
    `centred`."""
    x = wide(x)
    low, high = _range(x, valid, dim)
    zero = round_down(low / 2 + high / 2) if centred else torch.zeros_like(low)
    scale = round_up(torch.maximum(high - zero, zero - low) / LARGEST)
    code = (x - zero) / torch.where(scale > 0, scale, 1.0)
    # A cast gives NaN beyond the largest number.
    code = code.clamp(-LARGEST, LARGEST)
    if valid is not None:
        code = torch.where(valid, code, 0.0)
    return code.to(torch.float8_e4m3fn), scale.to(torch.bfloat16), zero.to(torch.bfloat16)


def _range(x: Tensor, valid: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the largest of what is valid; (0, 0) where nothing is."""
    if valid is None:
        return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    low = torch.where(valid, x, float("inf")).amin(dim, keepdim=True)
    high = torch.where(valid, x, float("-inf")).amax(dim, keepdim=True)
    return torch.where(low > high, 0.0, low), torch.where(low > high, 0.0, high)


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


def widened(x: Tensor, kind: torch.dtype) -> Tensor:
    """e4m3 numbers in a wider dtype."""
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return x.to(kind)
    # A cast is no vector instruction: ten times as slow on a CPU. As a float16 the bits of a number
    # that come behind its sign are those of a number 2 ** 8 times as small.
    bits = (x.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return bits.view(torch.float16).to(kind).mul_(2.0**8)


def pack_codes(codes: Tensor, side: str, bits: Bits) -> Tensor:
    """Codes [..., group, D] as one side stores them."""
    codes = codes if side == "key" else codes.transpose(-1, -2).contiguous()
    return codes if bits == FLOAT8 else pack(codes, bits)


def unpack_codes(packed: Tensor, side: str, bits: Bits) -> Tensor:
    """The codes [..., group, D] that one side stores."""
    codes = packed if bits == FLOAT8 else unpack(packed, bits)
    return codes if side == "key" else codes.transpose(-1, -2)


def pack_side(x: Tensor, valid: Tensor | None, side: str, bits: Bits) -> dict[str, Tensor]:
    """The tensors that store blocks `x` [B, h, blocks, group, D] of keys or values.

    `valid` is bool [B, 1, blocks, group, 1]. Keys share a scale per channel over the tokens of a
    block, values per token over the channels. Values are stored as [B, h, blocks, D, group],
    packed along the last dimension.
    """
    if bits == 16:
        return {side: x}
    dim, zeroed = 3 if side == "key" else 4, has_zero(side, bits)
    if bits == FLOAT8:
        codes, scale, zero = to_float8(x, valid, dim, zeroed)
    else:
        codes, scale, zero = quantize(x, valid, dim, bits)
    stored = {side: pack_codes(codes, side, bits), f"{side}_scale": scale}
    return {**stored, f"{side}_zero": zero} if zeroed else stored


def unpack_side(part: dict[str, Tensor], side: str, bits: Bits, dtype: torch.dtype) -> Tensor:
    """What `pack_side` stored, as [B, h, blocks, group, D] in `dtype`."""
    if bits == 16:
        return part[side]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(part[side], side, bits)
    image = widened(codes, kind) if bits == FLOAT8 else codes.to(kind)
    image.mul_(part[f"{side}_scale"].to(kind))
    if has_zero(side, bits):
        image.add_(part[f"{side}_zero"].to(kind))
    return image.to(dtype)


def join_blocks(old: Tensor, new: Tensor) -> Tensor:
    """Tensors of blocks, one behind the other; onnxruntime joins no e4m3 numbers, which bfloat16
    holds."""
    if old.dtype == torch.float8_e4m3fn:
        return torch.cat([old.bfloat16(), new.bfloat16()], 2).to(old.dtype)
    return torch.cat([old, new], 2)
