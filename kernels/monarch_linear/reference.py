"""Linear layer with a Monarch weight: a grid of blocks, each of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, activate
from fxopt.kernels._epilogue import check as check_epilogue


def monarch_linear(
    x: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """Two block-diagonal products with a transposition between them (Dao et al. 2022).

    x [..., in]; right [b, b * k, in / b]; left [b, out / b, b * k]; bias [out]; one dtype;
    returns [..., out], contiguous. Block (i, j) of the weight, out / b x in / b, is the product
    of left[i][:, j * k : (j + 1) * k] and right[j][i * k : (i + 1) * k] and so has rank k.
    `activation`, "silu", "gelu", "gelu_tanh" or "relu", and the addition of `residual` [..., out]
    follow, each rounded as a call of its own; the sum promotes as one does.
    """
    check(x, right, left, Epilogue(activation, residual))
    blocks, inner, _ = right.shape
    rows = x.reshape(-1, blocks, right.shape[2]).transpose(0, 1)
    hidden = torch.bmm(rows, right.mT).unflatten(-1, (blocks, inner // blocks))
    hidden = hidden.permute(2, 1, 0, 3).flatten(-2)
    y = torch.bmm(hidden, left.mT).transpose(0, 1)
    y = y.reshape(*x.shape[:-1], blocks * left.shape[1])
    y = activate(y if bias is None else y + bias, activation)
    return (y if residual is None else y + residual).contiguous()


def dense(right: Tensor, left: Tensor) -> Tensor:
    """The weight [out, in] that the two factors stand for."""
    blocks, inner, width = right.shape
    rank = inner // blocks
    l_blocks = left.unflatten(-1, (blocks, rank))  # [i, out/b, j, k]
    r_blocks = right.unflatten(1, (blocks, rank))  # [j, i, k, in/b]
    weight = torch.einsum("iojk,jikp->iojp", l_blocks, r_blocks)
    return weight.reshape(blocks * left.shape[1], blocks * width)


def check(x: Tensor, right: Tensor, left: Tensor, after: Epilogue = PLAIN) -> None:
    """Raises ValueError when the arguments of `monarch_linear` do not fit each other."""
    blocks, inner, width = right.shape
    chained = x.shape[-1] == blocks * width and left.shape[::2] == (blocks, inner)
    if not chained or inner % blocks:
        raise ValueError(
            f"monarch_linear: x {list(x.shape)}, right {list(right.shape)} and left "
            f"{list(left.shape)} do not chain as [..., in], [b, b * k, in / b], [b, out / b, b * k]"
        )
    check_epilogue("monarch_linear", (*x.shape[:-1], blocks * left.shape[1]), after)
