"""Gated units in plain PyTorch (GLU Variants Improve Transformer, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels._epilogue import activate

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, of one dtype and shape. The activation is rounded before the product,
    as where it is a call of its own. ValueError for another one than silu, gelu and gelu_tanh."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be silu, gelu or gelu_tanh, got {activation!r}")
    return activate(gate, activation) * up
