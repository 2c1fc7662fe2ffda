"""Rows of an integer weight, dequantised one by one: the table is never restored."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels.quantized_linear.reference import check_format, dequantize


def quantized_embedding(
    packed: Tensor, indices: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
) -> Tensor:
    """Row `indices` of `quantized_linear.dequantize(packed, scale, zero, ...)`.

    packed uint8 [rows, features * bits / 8], scale and zero [rows, features / group_size], indices
    of any shape: [*indices, features], contiguous, in the scale's dtype.
    """
    check(packed, scale, bits, group_size)
    picked = indices.flatten()
    codes, steps, zeros = (tensor.index_select(0, picked) for tensor in (packed, scale, zero))
    rows = dequantize(codes, steps, zeros, bits, group_size)
    return rows.reshape(*indices.shape, packed.shape[1] * 8 // bits)


def check(packed: Tensor, scale: Tensor, bits: int, group_size: int) -> None:
    """Raises ValueError when table and scales do not fit each other."""
    features = packed.shape[1] * 8 // bits
    check_format(features, bits, group_size)
    if scale.shape != (packed.shape[0], features // group_size):
        raise ValueError(
            f"quantized_embedding: packed {list(packed.shape)} has {features} features, which "
            f"scale {list(scale.shape)} does not hold in groups of {group_size}"
        )
