"""Linear layer on integer weights with a scale and a zero point a group of input columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, activate
from fxopt.kernels._epilogue import check as check_epilogue


def pack(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """uint8 codes [out, in] to bytes [out, in * bits / 8].

    Eight bits are stored as they are. Four bits are planar within a group: byte j of a group
    holds column j in its low nibble and column j + group_size / 2 in its high nibble.
    """
    if bits == 8:
        return codes
    low, high = codes.unflatten(-1, (-1, 2, group_size // 2)).unbind(-2)
    return (low + high * 16).flatten(-2)


def unpack(packed: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The codes [out, in] behind the bytes that `pack` made, exact in any floating `dtype`."""
    codes = packed.to(dtype)
    if bits == 8:
        return codes
    # Floating arithmetic vectorises on a CPU; the remainder of bytes does not.
    planes = codes.unflatten(-1, (-1, 1, group_size // 2))
    high = torch.floor(planes * 0.0625)
    return torch.cat([planes - high * 16, high], dim=-2).flatten(-3)


def grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [out, in / group_size], in the weight's dtype, that cover each group.

    The zero point is an integer in [0, 2^bits - 1], exact in every dtype; the scale is rounded
    up in the weight's dtype, so that no weight falls off the end of the grid.
    """
    levels = 2**bits - 1
    groups = weight.double().unflatten(-1, (-1, group_size))
    low = groups.amin(-1).clamp(max=0.0)
    span = groups.amax(-1).clamp(min=0.0) - low
    scale = _round_up((span / levels).clamp(min=torch.finfo(weight.dtype).tiny), weight.dtype)
    zero = torch.round(-low / scale.double()).clamp(0, levels)
    return scale, zero.to(weight.dtype)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest code of each weight, uint8 [out, in]."""
    groups = weight.double().unflatten(-1, (scale.shape[-1], -1))
    codes = torch.round(groups / scale.double()[..., None]) + zero.double()[..., None]
    return codes.clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)


def quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest. weight [out, in] to `packed`, `scale`, `zero` as `quantized_linear` wants.

    `bits` is 8 or 4, `group_size` a divisor of in (even for 4 bits). The weight that `dequantize`
    gives back differs by at most scale / 2, and a rounding to the weight's dtype.
    """
    check_format(weight.shape[-1], bits, group_size)
    scale, zero = grid(weight, bits, group_size)
    return pack(encode(weight, scale, zero, bits), bits, group_size), scale, zero


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """(code - zero) * scale as [out, in] in the scale's dtype; the subtraction is exact."""
    codes = unpack(packed, bits, group_size, scale.dtype).unflatten(-1, (-1, group_size))
    return ((codes - zero[..., None]) * scale[..., None]).flatten(-2)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation: str = "",
    residual: Tensor | None = None,
    up_packed: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_zero: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """activation(x [..., in] @ dequantize(...).T + bias): [..., out], contiguous, in x's dtype.

    packed uint8 [out, in * bits / 8]; scale and zero [out, in / group_size] and bias [out] in x's
    dtype. The whole weight is dequantised for the time of the call. `activation` is "silu",
    "gelu", "gelu_tanh", "relu" or empty, for none. With a second weight, `up_packed` and what
    belongs to it, the result is multiplied by its product with x, as in gated layers (GLU Variants,
    arXiv 2002.05202). `residual` [..., out] is added last, and promotes as a sum does. Products,
    activation, their product and the sum are each rounded, as calls of their own would be.
    """
    after = epilogue(activation, residual, up_packed, up_scale, up_zero, up_bias)
    check(x, packed, scale, bits, group_size, after)
    # Under autocast x differs from the scale.
    weight = dequantize(packed, scale, zero, bits, group_size).to(x.dtype)
    y = activate(F.linear(x, weight, bias), activation)
    if up_packed is not None and up_scale is not None and up_zero is not None:
        weight = dequantize(up_packed, up_scale, up_zero, bits, group_size).to(x.dtype)
        y = y * F.linear(x, weight, up_bias)
    return (y if residual is None else y + residual).contiguous()


def epilogue(
    activation: str = "",
    residual: Tensor | None = None,
    up_packed: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_zero: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Epilogue:
    """What follows the product, from the op's last arguments."""
    if up_packed is None or up_scale is None or up_zero is None:
        if any(tensor is not None for tensor in (up_packed, up_scale, up_zero, up_bias)):
            raise ValueError("quantized_linear: a second weight is up_packed, up_scale and up_zero")
        return Epilogue(activation, residual)
    return Epilogue(activation, residual, (up_packed, up_scale, up_zero, up_bias))


def check_format(in_features: int, bits: int, group_size: int) -> None:
    """Raises ValueError for a format that `quantized_linear` does not know."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if group_size < 1 or in_features % group_size or (bits == 4 and group_size % 2):
        raise ValueError(
            f"group_size {group_size} must divide the {in_features} input features"
            + (" and be even for 4 bits" if bits == 4 else "")
        )


def _round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive float64 values rounded towards infinity in `dtype`."""
    rounded = value.to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    step = (rounded.double() < value).to(integer)
    return (rounded.view(integer) + step).view(dtype)


def check(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, group_size: int, after: Epilogue = PLAIN
) -> None:
    """Raises ValueError when the arguments of `quantized_linear` do not fit each other."""
    in_features = x.shape[-1]
    check_format(in_features, bits, group_size)
    stored = (packed.shape[1] * 8 // bits, scale.shape[1] * group_size)
    if stored != (in_features, in_features) or packed.shape[0] != scale.shape[0]:
        raise ValueError(
            f"quantized_linear: x has {in_features} features, but packed {list(packed.shape)} and "
            f"scale {list(scale.shape)} hold {stored[0]} and {stored[1]}"
        )
    check_epilogue("quantized_linear", (*x.shape[:-1], packed.shape[0]), after)
    if after.up is None:
        return
    up, first = ([list(t.shape) for t in weight] for weight in (after.up[:2], (packed, scale)))
    if up != first:
        raise ValueError(
            f"quantized_linear: the second weight is packed as {up[0]} with scales {up[1]}, "
            f"the first as {first[0]} with {first[1]}"
        )
