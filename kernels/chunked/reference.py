"""Chunks of rows, so that what is between two linear layers never exists whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .program import run


def chunked_reference(x: Tensor, tensors: Sequence[Tensor], program: str, chunk: int) -> Tensor:
    """Run a token-wise `program` over x [..., features] in pieces of `chunk` rows.

    Returns [..., out], contiguous; each row is computed as it would be at once. Wide
    intermediates take chunk rows instead of all.
    """
    rows = x.shape[:-1].numel()
    if rows <= chunk:
        return run(program, x, tensors).contiguous()
    # The rank stays, so that axes counted from the front mean what they meant.
    flat = x.reshape(*(1 for _ in x.shape[:-2]), rows, x.shape[-1])
    out: Tensor | None = None
    for start in range(0, rows, chunk):
        piece = run(program, flat[..., start : start + chunk, :], tensors)
        if out is None:
            out = torch.empty(
                (*flat.shape[:-1], piece.shape[-1]), dtype=piece.dtype, device=piece.device
            )
        out[..., start : start + chunk, :] = piece
    assert out is not None
    return out.view(*x.shape[:-1], out.shape[-1])


def chunked_traceable(x: Tensor, tensors: Sequence[Tensor], program: str, chunk: int) -> Tensor:
    """The same at once, for exporters, whose runtimes plan memory themselves."""
    return run(program, x, tensors, inline=True).contiguous()
