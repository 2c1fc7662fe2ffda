"""`fxopt::rms_norm` and `fxopt::add_rms_norm`: one kernel each on a GPU, where half precision takes
two and three."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

# A row is held in registers.
MOST = 16384


def _reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return reference.rms_norm(x, weight, epsilon).contiguous()


def _add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    total, normed = reference.add_rms_norm(x, residual, weight, epsilon)
    return total.contiguous(), normed.contiguous()


def _served(x: Tensor) -> bool:
    return _triton.AVAILABLE and 0 < x.shape[-1] <= MOST and x.numel() > 0


def _cuda(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    if not _served(x):
        return _reference(x, weight, epsilon)
    from .triton import norm_forward

    return norm_forward(x, None, weight, epsilon)[1]


def _add_cuda(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    if not _served(x):
        return _add_reference(x, residual, weight, epsilon)
    from .triton import norm_forward

    return norm_forward(x, residual, weight, epsilon)


def _fake(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_fake(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


rms_norm = register(
    "rms_norm",
    "(Tensor x, Tensor weight, float epsilon) -> Tensor",
    _reference,
    cuda=_cuda,
    fake=_fake,
)
add_rms_norm = register(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    _add_reference,
    cuda=_add_cuda,
    fake=_add_fake,
)
