"""Linear layers of several experts on integer weights, each for its own rows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.quantized_linear.reference import check_format, dequantize


def quantized_experts(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [rows, in], sorted by expert, @ the transposed weight of each row's expert: [rows, out].

    packed uint8 [experts, out, in * bits / 8]; scale and zero [experts, out, in / group_size] in
    x's dtype. Rows up to offsets[e], int32 or int64 [experts], are those of expert e and of the
    ones before it; rows beyond the last give zeros. One weight is dequantised at a time.
    """
    check(x, packed, scale, offsets, bits, group_size)
    out, start = x.new_zeros((len(x), packed.shape[1])), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            weight = dequantize(packed[expert], scale[expert], zero[expert], bits, group_size)
            out[start:end] = F.linear(x[start:end], weight)
            start = end
    return out


def gradient(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Of x, for the gradient [rows, out] of the result."""
    found, start = grad.new_zeros((len(grad), packed.shape[2] * 8 // bits)), 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            weight = dequantize(packed[expert], scale[expert], zero[expert], bits, group_size)
            found[start:end] = grad[start:end] @ weight
            start = end
    return found


def check(
    x: Tensor, packed: Tensor, scale: Tensor, offsets: Tensor, bits: int, group_size: int
) -> None:
    """Raises ValueError when the arguments do not fit each other."""
    in_features = x.shape[-1]
    check_format(in_features, bits, group_size)
    experts, out_features, width = packed.shape
    fits = width * 8 // bits == in_features and offsets.shape == (experts,)
    if (
        x.dim() != 2
        or not fits
        or scale.shape != (experts, out_features, in_features // group_size)
    ):
        raise ValueError(
            f"quantized_experts: x {list(x.shape)}, packed {list(packed.shape)}, scale "
            f"{list(scale.shape)} and offsets {list(offsets.shape)} do not fit each other in "
            f"{bits} bits and groups of {group_size}"
        )
