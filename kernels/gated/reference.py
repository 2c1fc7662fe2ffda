"""Gated units in plain PyTorch (GLU Variants Improve Transformer, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of one dtype and shape. The activation is rounded before the product,
    as where it is a call of its own. ValueError for another one than silu, gelu and gelu_tanh."""
    if activation == "silu":
        return F.silu(gate) * up
    if activation not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation must be silu, gelu or gelu_tanh, got {activation!r}")
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
