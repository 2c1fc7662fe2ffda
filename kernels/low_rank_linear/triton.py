"""`low_rank_linear` for few rows: both products read each factor once."""

from __future__ import annotations

from torch import Tensor

from fxopt.kernels._triton import few_rows
from fxopt.kernels._triton.few_rows import Chain


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """As the reference, for up to 64 rows of x; results repeat exactly."""
    rank, in_features = down.shape
    rows = x.reshape(-1, in_features).contiguous()
    if len(rows) > 64:
        raise ValueError(f"low_rank_linear: at most 64 rows in this kernel, got {len(rows)}")
    y = x.new_empty((*x.shape[:-1], up.shape[0]))
    if y.numel() == 0:
        return y
    hidden = x.new_empty((len(rows), rank))
    few_rows.linear(rows, down.contiguous(), None, hidden, Chain(starts=True))
    return few_rows.linear(hidden, up.contiguous(), bias, y, Chain(waits=True))
