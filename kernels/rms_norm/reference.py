"""RMSNorm in plain PyTorch (arXiv 1910.07467)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight; x [..., D], weight [D] of its dtype. Half precision
    is normed in float32 and rounded before the product."""
    if x.itemsize > 2:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return weight * F.rms_norm(x, weight.shape, None, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum of x and residual, of one dtype and shape, and `rms_norm` of it, rounded."""
    total = x + residual
    return total, rms_norm(total, weight, epsilon)
