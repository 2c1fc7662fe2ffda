"""Linear layer whose weight is the product of two thin factors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels._epilogue import PLAIN, Epilogue, activate
from fxopt.kernels._epilogue import check as check_epilogue


def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str = "",
    residual: Tensor | None = None,
    second_down: Tensor | None = None,
    second_up: Tensor | None = None,
    second_bias: Tensor | None = None,
) -> Tensor:
    """activation((x @ down.T) @ up.T + bias).

    x [..., in], down [rank, in], up [out, rank], bias [out], all of one dtype; returns
    [..., out], contiguous. The intermediate [..., rank] is rounded to that dtype. `activation` is
    "silu", "gelu", "gelu_tanh", "relu" or empty, for none. With a second weight, of `second_down`
    and `second_up`, whose rank may be another, the result is multiplied by its product with x, as
    in gated layers (GLU Variants, arXiv 2002.05202). `residual` [..., out] is added last, and
    promotes as a sum does. Each is rounded as a call of its own would be.
    """
    after = epilogue(activation, residual, second_down, second_up, second_bias)
    check(x, down, up, after)
    y = activate(product(x, down, up, bias), activation)
    if after.up is not None:
        y = y * product(x, *after.up)
    return (y if residual is None else y + residual).contiguous()


def product(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(x, down), up, bias)


def epilogue(
    activation: str = "",
    residual: Tensor | None = None,
    second_down: Tensor | None = None,
    second_up: Tensor | None = None,
    second_bias: Tensor | None = None,
) -> Epilogue:
    """What follows the product, from the op's last arguments."""
    if second_down is None or second_up is None:
        if any(tensor is not None for tensor in (second_down, second_up, second_bias)):
            raise ValueError("low_rank_linear: a second weight is second_down and second_up")
        return Epilogue(activation, residual)
    return Epilogue(activation, residual, (second_down, second_up, second_bias))


def check(x: Tensor, down: Tensor, up: Tensor, after: Epilogue = PLAIN) -> None:
    """Raises ValueError when the arguments of `low_rank_linear` do not fit each other."""
    weights = [(down, up), *([] if after.up is None else [after.up[:2]])]
    for first, second in weights:
        if x.shape[-1] != first.shape[1] or first.shape[0] != second.shape[1]:
            raise ValueError(
                f"low_rank_linear: x {list(x.shape)}, down {list(first.shape)} and up "
                f"{list(second.shape)} do not chain as [..., in], [rank, in], [out, rank]"
            )
    if len(weights[-1][1]) != len(up):
        raise ValueError(
            f"low_rank_linear: the second weight has {len(weights[-1][1])} outputs, "
            f"the first {len(up)}"
        )
    check_epilogue("low_rank_linear", (*x.shape[:-1], len(up)), after)
