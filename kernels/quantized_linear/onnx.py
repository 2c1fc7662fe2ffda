"""`quantized_linear` as onnxruntime's `MatMulNBits`, which multiplies by packed weights.

A runtime folds the traced reference into float weights when it loads the file. The operator reads
the integers at each call: an eighth of the bytes, which is what one row waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import unpack

OPERATOR = "com.microsoft::MatMulNBits"
BLOCKS = (256, 128, 64, 32, 16)
FLOAT32 = 1
"""`accuracy_level` at which the input is not rounded to int8."""


def refusal(bits: int, group_size: int, dtype: torch.dtype) -> str | None:
    """Why the operator does not serve a weight; None if it does."""
    if bits != 4:
        return f"its float32 arithmetic on {bits}-bit weights is slower than that on float weights"
    if dtype != torch.float32:
        return f"it computes in float32, the export in {dtype}"
    if block_size(group_size) is None:
        return f"groups of {group_size} are no multiple of 16 columns"
    return None


def block_size(group_size: int) -> int | None:
    """The longest block that the operator knows and that a group is a multiple of."""
    return next((block for block in BLOCKS if group_size % block == 0), None)


def blocks(
    packed: Tensor, scale: Tensor, zero: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A 4-bit weight [out, in] in the operator's layout.

    Codes uint8 [out, blocks, block / 2], the even column of a pair in the low nibble; scales
    float32 [out, blocks]; zero points uint8 [out, ceil(blocks / 2)], packed likewise.
    """
    block = block_size(group_size)
    assert block is not None
    codes = unpack(packed, 4, group_size, torch.float32).to(torch.uint8)
    repeats = group_size // block
    scales = scale.float().repeat_interleave(repeats, 1)
    zeros = zero.to(torch.uint8).repeat_interleave(repeats, 1)
    return _pairs(codes.unflatten(1, (-1, block))), scales.contiguous(), _pairs(zeros)


def matmul_nbits(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    """x [..., in] through the weight that `blocks` made, as one node: for an exporter's eyes."""
    out_features, width = codes.shape[0], codes.shape[2]
    attributes: dict[str, Any] = {
        "K": x.shape[-1], "N": out_features, "bits": 4, "block_size": 2 * width,
        "accuracy_level": FLOAT32,
    }  # fmt: skip
    shape = (*x.shape[:-1], out_features)
    operands = (x, codes, scales, zeros)
    out: Tensor = torch.onnx.ops.symbolic(
        OPERATOR, operands, attributes, dtype=x.dtype, shape=shape, version=1
    )
    return out if bias is None else out + bias


def _pairs(codes: Tensor) -> Tensor:
    """uint8 [..., n] below 16 -> bytes [..., ceil(n / 2)]."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low + high * 16
