"""`fxopt::derivative_codes` and `fxopt::times_derivative`: the reference, some groups at a time;
one pass over memory on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register
from fxopt.kernels.pack_activation.reference import in_memory_order

from . import reference
from .reference import GROUP

PIECE = 32
"""Groups that the reference takes at a time: temporaries stay small."""


def _codes(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    codes = _fake_codes(x, borders, bits)
    flat = in_memory_order(x)
    for part in _pieces(len(codes)):
        values = flat[part.start * GROUP : part.stop * GROUP]
        codes[part] = reference.derivative_codes(values, borders, bits)
    return codes


def _times(
    gradient: Tensor, codes: Tensor, stride: Sequence[int], levels: Sequence[float], bits: int
) -> Tensor:
    if list(gradient.stride()) != list(stride):
        derivative = _derivative(gradient, codes, stride, levels, bits)
        return (gradient * derivative).to(gradient.dtype)
    reference.check_levels(gradient.shape, codes, stride, levels, bits)
    out = torch.empty_like(gradient)
    source, flat = in_memory_order(gradient), in_memory_order(out)
    for part in _pieces(len(codes)):
        values = slice(part.start * GROUP, part.stop * GROUP)
        piece = source[values]
        flat[values] = reference.times_derivative(piece, codes[part], (1,), levels, bits)
    return out


def _derivative(
    gradient: Tensor, codes: Tensor, stride: Sequence[int], levels: Sequence[float], bits: int
) -> Tensor:
    """The derivative with the strides of x, for a gradient that lies otherwise in memory."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    ones = gradient.new_empty_strided(gradient.shape, stride, dtype=wide).fill_(1)
    return torch.ops.fxopt.times_derivative(ones, codes, stride, levels, bits)


def _pieces(groups: int) -> Iterator[slice]:
    return (slice(i, min(i + PIECE, groups)) for i in range(0, groups, PIECE))


def _cuda_codes(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    if not _serves(x):
        return _codes(x, borders, bits)
    from . import triton

    codes = _fake_codes(x, borders, bits)
    triton.codes(in_memory_order(x), codes, borders, bits)
    return codes


def _cuda_times(
    gradient: Tensor, codes: Tensor, stride: Sequence[int], levels: Sequence[float], bits: int
) -> Tensor:
    if not _serves(gradient) or list(gradient.stride()) != list(stride):
        return _times(gradient, codes, stride, levels, bits)
    from . import triton

    reference.check_levels(gradient.shape, codes, stride, levels, bits)
    out = torch.empty_like(gradient)
    triton.times(in_memory_order(gradient), codes, in_memory_order(out), levels, bits)
    return out


def _serves(x: Tensor) -> bool:
    """Whether the kernels, which compute in float32, take this dtype."""
    return _triton.AVAILABLE and x.dtype != torch.float64


def _fake_codes(x: Tensor, borders: Sequence[float], bits: int) -> Tensor:
    reference.check_codes(borders, bits)
    return x.new_empty(reference.code_shape(x.numel(), bits), dtype=torch.uint8)


def _fake_times(
    gradient: Tensor, codes: Tensor, stride: Sequence[int], levels: Sequence[float], bits: int
) -> Tensor:
    reference.check_levels(gradient.shape, codes, stride, levels, bits)
    if list(gradient.stride()) == list(stride):
        return torch.empty_like(gradient)
    return gradient * gradient.new_empty_strided(gradient.shape, stride)


derivative_codes = register(
    "derivative_codes",
    "(Tensor x, float[] borders, int bits) -> Tensor",
    _codes,
    fake=_fake_codes,
    cuda=_cuda_codes,
)
times_derivative = register(
    "times_derivative",
    "(Tensor gradient, Tensor codes, int[] stride, float[] levels, int bits) -> Tensor",
    _times,
    fake=_fake_times,
    cuda=_cuda_times,
)
