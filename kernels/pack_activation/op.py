"""`fxopt::pack_activation` and `fxopt::unpack_activation`: the reference, a few groups at a time;
one pass over memory on CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

PIECE = 32768
"""Values that are packed at a time where the reference runs: temporaries stay small."""


def _pack(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    codes, top = _fake_pack(x, bits, group_size)
    flat = reference.in_memory_order(x)
    for groups in _pieces(len(top), group_size):
        part = flat[groups.start * group_size : groups.stop * group_size]
        codes[groups], top[groups] = reference.pack_activation(part, bits, group_size)
    return codes, top


def _unpack(
    codes: Tensor,
    top: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    bits: int,
    group_size: int,
) -> Tensor:
    out = _fake_unpack(codes, top, size, stride, bits, group_size)
    flat = reference.in_memory_order(out)
    for groups in _pieces(len(top), group_size):
        part = flat[groups.start * group_size : groups.stop * group_size]
        values = reference.decode(codes[groups], top[groups], bits)
        part.copy_(values.flatten()[: part.numel()])
    return out


def _pieces(groups: int, group_size: int) -> Iterator[slice]:
    step = PIECE // group_size
    return (slice(i, min(i + step, groups)) for i in range(0, groups, step))


def _cuda_pack(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    if not _serves(x):
        return _pack(x, bits, group_size)
    from . import triton

    codes, top = _fake_pack(x, bits, group_size)
    triton.pack(reference.in_memory_order(x), codes, top, bits, group_size)
    return codes, top


def _cuda_unpack(
    codes: Tensor,
    top: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    bits: int,
    group_size: int,
) -> Tensor:
    if not _serves(top):
        return _unpack(codes, top, size, stride, bits, group_size)
    from . import triton

    out = _fake_unpack(codes, top, size, stride, bits, group_size)
    triton.unpack(codes, top, reference.in_memory_order(out), bits, group_size)
    return out


def _serves(x: Tensor) -> bool:
    """Whether the kernels, which compute in float32, take this dtype."""
    return _triton.AVAILABLE and x.dtype != torch.float64


def _fake_pack(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    reference.check_format(x.dtype, bits, group_size)
    codes, top = reference.packed_shapes(x.numel(), bits, group_size)
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(top)


def _fake_unpack(
    codes: Tensor,
    top: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    bits: int,
    group_size: int,
) -> Tensor:
    reference.check_format(top.dtype, bits, group_size)
    reference.check_layout(size, stride)
    stored = reference.packed_shapes(reference.elements(size), bits, group_size)
    if (tuple(codes.shape), tuple(top.shape)) != stored:
        raise ValueError(
            f"unpack_activation: {list(size)} in {bits} bits and groups of {group_size} has codes "
            f"{list(stored[0])} and magnitudes {list(stored[1])}, not {list(codes.shape)} and "
            f"{list(top.shape)}"
        )
    return top.new_empty_strided(size, stride)


pack_activation = register(
    "pack_activation",
    "(Tensor x, int bits, int group_size) -> (Tensor, Tensor)",
    _pack,
    fake=_fake_pack,
    cuda=_cuda_pack,
)
unpack_activation = register(
    "unpack_activation",
    "(Tensor codes, Tensor top, int[] size, int[] stride, int bits, int group_size) -> Tensor",
    _unpack,
    fake=_fake_unpack,
    cuda=_cuda_unpack,
)
