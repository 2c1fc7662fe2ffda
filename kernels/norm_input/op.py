"""`fxopt::norm_input`: the reference, one pass over memory on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference


def _plain(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    least: float,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    reference.check(y, weight, bias, rstd, mean)
    return reference.norm_input(y, weight, bias, rstd, mean, least, size, dtype)


def _cuda(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    least: float,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    if not _triton.AVAILABLE or dtype == torch.float64 or y.numel() == 0:
        return _plain(y, weight, bias, rstd, mean, least, size, dtype)
    from . import triton

    reference.check(y, weight, bias, rstd, mean)
    return triton.norm_input(y.contiguous(), weight, bias, rstd, mean, least, size, dtype)


def _fake(
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    least: float,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    reference.check(y, weight, bias, rstd, mean)
    return y.new_empty(size, dtype=dtype)


norm_input = register(
    "norm_input",
    "(Tensor y, Tensor? weight, Tensor? bias, Tensor? rstd, Tensor? mean, float least, "
    "int[] size, ScalarType dtype) -> Tensor",
    _plain,
    fake=_fake,
    cuda=_cuda,
)
