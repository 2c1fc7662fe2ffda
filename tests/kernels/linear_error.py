"""How far the kernels of linear layers may be from float64, and what they are given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# The interpreter truncates to bfloat16 where the device rounds: twice the error, and always
# towards zero, so that the two roundings of a low-rank layer add up. In float32 a device's kernel
# keeps one running sum where cuBLAS keeps several, and dequantised weights are rounded once more.
SLACK = 6.0


def draw(*shape: int, dtype: torch.dtype, device: str = DEVICE) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def assert_close(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """As near to float64 as a dense layer of the dtype, times a small factor. `weight` float64."""
    exact = F.linear(x.double(), weight, None if bias is None else bias.double())
    rounded = weight.to(x.dtype)
    own = F.linear(x, rounded, bias).double()
    budget = own - F.linear(x.double(), rounded.double(), None if bias is None else bias.double())
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert (out.double() - exact).norm() <= SLACK * budget.norm()


def assert_mostly_equal(out: Tensor, calls: Tensor) -> None:
    """The interpreter's functions differ from PyTorch's in bits that rounding rarely shows."""
    assert (out != calls).sum() <= 3 + 0.03 * out.numel()
