"""Linear layer on e4m3 weights and inputs, each row with a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest finite e4m3 number; beyond it a cast gives NaN."""
LEAST = 2.0**-100
"""The least scale: that of a row of zeros. Triton takes a smaller constant for a float64."""


def row_scale(rows: Tensor) -> Tensor:
    """Scale [..., 1] in float32 that takes the largest element of each row to 448.

    It is never below `LEAST`, so that a row of zeros can be divided by it.
    """
    largest = rows.abs().amax(-1, keepdim=True).float()
    return (largest / LARGEST).clamp(min=LEAST)


def quantize(rows: Tensor, scale: Tensor) -> Tensor:
    """The nearest e4m3 number to each element over its row's scale [..., 1]."""
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(DTYPE)


def dequantize(stored: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in] of `stored` e4m3 [out, in] and `scale` [out]."""
    return stored.float() * scale[:, None]


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ (weight * scale[:, None]).T + bias: [..., out], contiguous, in x's dtype.

    weight e4m3 [out, in], scale float32 [out], bias [out] in x's dtype. Each row of x is rounded
    to e4m3 with a scale of its own. Products of e4m3 numbers are exact in every wider dtype.
    """
    check(x, weight, scale)
    own = row_scale(x)
    rounded = quantize(x, own)
    # A sum of products of numbers up to 448 is beyond float16.
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    y = F.linear(rounded.to(wide), weight.to(wide)).float() * own * scale
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).contiguous()


def check(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Raises ValueError when the arguments of `fp8_linear` do not fit each other."""
    if x.shape[-1] != weight.shape[1] or list(scale.shape) != [weight.shape[0]]:
        raise ValueError(
            f"fp8_linear: x {list(x.shape)}, weight {list(weight.shape)} and scale "
            f"{list(scale.shape)} do not fit as [..., in], [out, in], [out]"
        )
    if weight.dtype != DTYPE:
        raise ValueError(f"fp8_linear: the weight must be {DTYPE}, got {weight.dtype}")
