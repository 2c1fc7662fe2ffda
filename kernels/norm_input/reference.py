"""The input of a LayerNorm or RMSNorm from its output, or the normalised values between.

    n = (y - bias) / weight        x = n / rstd + mean

A norm's backward can be written in its output, which the next linear layer saves anyway:
"Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation",
https://arxiv.org/abs/2406.16282.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_input(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    least: float,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """x in `dtype` of y [..., D], weight and bias [D], rstd and mean [..., 1], a
    value for each row of y.

    x is contiguous, shaped as y or, with other `size`, as a view of that.

    What is None is left out: without `rstd` and `mean` the values are the normalised ones. Computed
    in float32, float64 if `dtype` is. Where a weight is smaller than `least` its output says
    nothing of its input, and n is taken to be 0.
    """
    x = y.to(wide_dtype(dtype), copy=True, memory_format=torch.contiguous_format)
    x = x.reshape(-1, y.shape[-1])
    if bias is not None:
        x.sub_(bias)
    if weight is not None:
        x.div_(weight.to(x.dtype).where(weight.abs() >= least, torch.inf))
    if rstd is not None:
        x.div_(rstd.reshape(-1, 1))
    if mean is not None:
        x.add_(mean.reshape(-1, 1))
    return x.to(dtype).view(*size)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def workspace(count: int, dtype: torch.dtype) -> int:
    """Bytes that plain PyTorch takes beside a result of so many values."""
    return 0 if wide_dtype(dtype) == dtype else 4 * count


def check(y: Tensor, *rest: Tensor | None) -> None:
    """Raises ValueError for shapes that do not fit y [..., D]."""
    width = y.shape[-1]
    fit = [width, width, y.numel() // max(width, 1), y.numel() // max(width, 1)]
    names = ("weight", "bias", "rstd", "mean")
    for name, tensor, count in zip(names, rest, fit, strict=True):
        if tensor is not None and tensor.numel() != count:
            raise ValueError(
                f"norm_input: {name} {list(tensor.shape)} does not fit y {list(y.shape)}, which "
                f"takes {count} values"
            )
