"""`fxopt::rotate` and `fxopt::rotate_both`: one kernel each on a GPU, where the formula is five for
queries and five for keys, and mixing channels a product of each, with copies around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

MOST_CHANNELS = 256
"""Of heads whose channels a kernel mixes: a tile of rows is held in registers."""


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rotate(x, cos, sin).contiguous()


def _cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not _served([x], [cos, sin]):
        return _reference(x, cos, sin)
    from .triton import rotate_forward

    return rotate_forward(x, cos, sin)


def _served(sides: Sequence[Tensor], angles: Sequence[Tensor]) -> bool:
    """Whether a kernel reads these queries and keys, and these cos and sin."""
    beside = all(t.stride(-1) == 1 for t in (*sides, *angles))
    return (
        _triton.AVAILABLE
        and beside
        and all(t.shape[1] == 1 for t in angles)
        and all(t.numel() for t in sides)
    )


def _fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _both_reference(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, query_mix: Tensor | None,
    key_mix: Tensor | None, heads: Sequence[int], kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = reference.rotate_both(q, k, cos, sin, query_mix, key_mix, heads, kv_heads)
    # New tensors, as a kernel makes them, whether or not anything was done.
    a, b = (
        y.clone(memory_format=torch.contiguous_format) if y is x else y.contiguous()
        for x, y in zip((q, k), found, strict=True)
    )
    return a, b


def _both_cuda(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, query_mix: Tensor | None,
    key_mix: Tensor | None, heads: Sequence[int], kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    angles = [t for t in (cos, sin) if t is not None]
    served = _served([q, k], angles) and q.shape[::2] == k.shape[::2]
    if query_mix is not None and key_mix is not None:
        served = served and q.dtype != torch.float64 and q.shape[3] <= MOST_CHANNELS
        query_mix, key_mix = query_mix.contiguous(), key_mix.contiguous()
    if not served:
        return _both_reference(q, k, cos, sin, query_mix, key_mix, heads, kv_heads)
    from .triton import rotate_both_forward

    return rotate_both_forward(q, k, cos, sin, query_mix, key_mix, heads, kv_heads)


def _both_fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


rotate = register(
    "rotate", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", _reference, cuda=_cuda, fake=_fake
)
rotate_both = register(
    "rotate_both",
    "(Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? query_mix, Tensor? key_mix, "
    "int[] heads, int kv_heads) -> (Tensor, Tensor)",
    _both_reference,
    cuda=_both_cuda,
    fake=_both_fake,
)
