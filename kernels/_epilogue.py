"""What may follow a product, in plain PyTorch.

    y = activation(x Wᵀ + b) * (x Uᵀ + c) + residual

of which activation, second product and residual are each optional. Every operation is rounded to
the dtype where it would be if it were a call of its own; kernels that do them in their store keep
to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu")
"""The first is none at all."""


class Epilogue(NamedTuple):
    """What follows a product of shape [..., out]. `residual` is [..., out] too; `up` the tensors
    of the second weight, as the op takes those of the first one, and last its bias."""

    activation: str = ""
    residual: Tensor | None = None
    up: tuple[Any, ...] | None = None


PLAIN = Epilogue()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, if there is one, as kernels read it."""
    return None if tensor is None else tensor.contiguous()


def contiguous_epilogue(after: Epilogue) -> Epilogue:
    """`after` with all of its tensors as kernels read them."""
    up = None if after.up is None else tuple(map(contiguous, after.up))
    return after._replace(residual=contiguous(after.residual), up=up)


def check(name: str, shape: Sequence[int], after: Epilogue) -> None:
    """Raises ValueError for an activation that nothing computes, and for a residual that has not
    the output's `shape`."""
    activation, residual, _ = after
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS[1:])
        raise ValueError(f"{name}: activation must be empty, {known}, got {activation!r}")
    if residual is not None and tuple(residual.shape) != tuple(shape):
        raise ValueError(
            f"{name}: the residual is {list(residual.shape)}, the output {list(shape)}"
        )


def apart(dtype: torch.dtype, after: Epilogue) -> tuple[Epilogue, Tensor | None]:
    """What a kernel does that stores a product of `dtype`, and a residual that is added to what it
    stored: one of another dtype, as there is under autocast, where a sum promotes."""
    if after.residual is None or after.residual.dtype == dtype:
        return after, None
    return after._replace(residual=None), after.residual


def out_dtype(dtype: torch.dtype, residual: Tensor | None) -> torch.dtype:
    """What a product of `dtype` is in once `residual` is added."""
    return dtype if residual is None else torch.promote_types(dtype, residual.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`: SiLU, GELU (arXiv 1606.08415) by erf or by tanh, or ReLU."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case _:
            return x


def activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x from that of `activate(x, activation)`."""
    aten = torch.ops.aten
    match activation:
        case "silu":
            return aten.silu_backward(grad, x)
        case "gelu":
            return aten.gelu_backward(grad, x)
        case "gelu_tanh":
            return aten.gelu_backward(grad, x, approximate="tanh")
        case "relu":
            return aten.threshold_backward(grad, x, 0)
        case _:
            return grad


def product_gradients(
    grad: Tensor, activation: str, y: Tensor, up: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the products y and, where there are two, up, from that of
    activation(y) * up."""
    if up is None:
        return activate_backward(grad, y, activation), None
    return activate_backward(grad * up, y, activation), grad * activate(y, activation)
