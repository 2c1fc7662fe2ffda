"""Linear layer whose weight is the product of two thin factors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def low_rank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """(x @ down.T) @ up.T + bias.

    x [..., in], down [rank, in], up [out, rank], bias [out], all of one dtype; returns
    [..., out], contiguous. The intermediate [..., rank] is rounded to that dtype.
    """
    check(x, down, up)
    return F.linear(F.linear(x, down), up, bias).contiguous()


def check(x: Tensor, down: Tensor, up: Tensor) -> None:
    """Raises ValueError when the arguments of `low_rank_linear` do not fit each other."""
    if x.shape[-1] != down.shape[1] or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"low_rank_linear: x {list(x.shape)}, down {list(down.shape)} and up {list(up.shape)} "
            "do not chain as [..., in], [rank, in], [out, rank]"
        )
