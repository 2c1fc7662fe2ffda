"""`fxopt::rotate`: one kernel on a GPU, where the formula is five for queries and five for keys."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

SCHEMA = "(Tensor x, Tensor cos, Tensor sin) -> Tensor"


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rotate(x, cos, sin).contiguous()


def _cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    beside = all(t.stride(-1) == 1 for t in (x, cos, sin))
    if not _triton.AVAILABLE or not beside or not x.numel() or cos.shape[1] != 1:
        return _reference(x, cos, sin)
    from .triton import rotate_forward

    return rotate_forward(x, cos, sin)


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


rotate = register("rotate", SCHEMA, _reference, cuda=_cuda, fake=_fake)
