"""Linear layer on e4m3 weights and inputs, each row with a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, activate
from fxopt.kernels._epilogue import check as check_epilogue

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


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """activation(x [..., in] @ (weight * scale[:, None]).T + bias): [..., out], contiguous, in x's
    dtype.

    weight e4m3 [out, in], scale float32 [out], bias [out] in x's dtype. Each row of x is rounded
    to e4m3 with a scale of its own. Products of e4m3 numbers are exact in every wider dtype.
    `activation` is "silu", "gelu", "gelu_tanh", "relu" or empty, for none. With a second weight,
    `up_weight` and what belongs to it, the result is multiplied by its product with x, as in gated
    layers (GLU Variants, arXiv 2002.05202). `residual` [..., out] is added last, and promotes as a
    sum does. Products, activation, their product and the sum are each rounded, as calls of their
    own would be.
    """
    after = epilogue(activation, residual, up_weight, up_scale, up_bias)
    check(x, weight, scale, after)
    own = row_scale(x)
    rounded = quantize(x, own)
    y = activate(_product(x.dtype, rounded, own, weight, scale, bias), activation)
    if after.up is not None:
        y = y * _product(x.dtype, rounded, own, *after.up)
    return (y if residual is None else y + residual).contiguous()


def _product(
    dtype: torch.dtype,
    rounded: Tensor,
    own: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    # A sum of products of numbers up to 448 is beyond float16.
    wide = torch.float32 if dtype == torch.float16 else dtype
    y = F.linear(rounded.to(wide), weight.to(wide)).float() * own * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def epilogue(
    activation: str = "",
    residual: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Epilogue:
    """What follows the product, from the op's last arguments."""
    if up_weight is None or up_scale is None:
        if any(tensor is not None for tensor in (up_weight, up_scale, up_bias)):
            raise ValueError("fp8_linear: a second weight is up_weight and up_scale")
        return Epilogue(activation, residual)
    return Epilogue(activation, residual, (up_weight, up_scale, up_bias))


def check(x: Tensor, weight: Tensor, scale: Tensor, after: Epilogue = PLAIN) -> None:
    """Raises ValueError when the arguments of `fp8_linear` do not fit each other."""
    for stored, each in ((weight, scale), *(() if after.up is None else (after.up[:2],))):
        if x.shape[-1] != stored.shape[1] or not len(each) == len(stored) == len(weight):
            raise ValueError(
                f"fp8_linear: x {list(x.shape)}, weight {list(stored.shape)} and scale "
                f"{list(each.shape)} do not fit as [..., in], [out, in], [out]"
            )
        if stored.dtype != DTYPE:
            raise ValueError(f"fp8_linear: the weight must be {DTYPE}, got {stored.dtype}")
    check_epilogue("fp8_linear", (*x.shape[:-1], len(weight)), after)
