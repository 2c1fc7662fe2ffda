"""Rotary position embedding in plain PyTorch (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D] with channel i and i + D / 2 as a pair; cos and sin broadcast to x and have
    its dtype. Each product and the sum are rounded, as where they are calls of their own."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
