"""What tensors are in terms of a linear head: its logits, cast, viewed, scaled and capped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.site import LossHeadInfo

Rows = Callable[[Tensor], Tensor]
"""What is done to the rows of a head's logits, done to those of its input instead."""

# Names of PyTorch's functions, by what they do to logits.
MATMUL = {"matmul", "__matmul__", "mm"}
CASTS = {"float", "double", "half", "bfloat16", "to", "type", "type_as"}
RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"}
SAME = {"contiguous", "clone"}
SWAPS = {"transpose", "swapaxes", "swapdims"}
TIMES, OVER = {"mul", "multiply", "__mul__", "__rmul__"}, {"div", "true_divide", "__truediv__"}
VIEWS = {
    "__getitem__",
    "narrow",
    "select",
    "chunk",
    "split",
    "unbind",
    "detach",
    "t",
    "expand",
    "permute",
}
WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


@dataclass(eq=False)
class Head:
    """One call of a linear: x [..., D] @ weight.T + bias, weight [V, D], or [D, V] and `turned`."""

    module: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    turned: bool
    dtype: torch.dtype
    blocked: str | None = None
    returned: bool = False
    losses: list[LossHeadInfo] = field(default_factory=list[LossHeadInfo])
    cut: bool = False

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, weight [V, D] and bias in the dtype in which autocast had the linear computed."""
        weight = self.weight.t() if self.turned else self.weight
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.x.to(self.dtype), weight.to(self.dtype), bias

    def info(self, rows: int, again: bool) -> LossHeadInfo:
        sides = self.weight.shape[::-1] if self.turned else self.weight.shape
        trains = self.weight.requires_grad
        return LossHeadInfo(
            rows, sides[1], sides[0], self.dtype, trains, again or self.dtype == torch.float16
        )


@dataclass(frozen=True)
class Logits:
    """What a tensor is in terms of a head: its rows, times `scale`, capped, as log-probabilities.

    `wide` is the dtype that they were cast to; `second` says that classes are axis 1 of 3;
    `lost` why they are nothing that can be followed any more.
    """

    head: Head
    rows: tuple[Rows, ...] = ()
    scale: float = 1.0
    cap: float = 0.0
    tanh: bool = False
    wide: torch.dtype | None = None
    second: bool = False
    log: bool = False
    lost: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.wide or self.head.dtype


def operands_of(
    name: str, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor | None, bool] | None:
    """x, weight, bias, and whether weight is [D, V]; None for another product."""
    if name == "linear":
        return (*_linear(*args, **kwargs), False)
    if kwargs or len(args) != 2 + (name == "addmm"):
        return None
    bias, x, weight = args if name == "addmm" else (None, *args)
    if weight.dim() != 2 or (bias is not None and bias.dim() != 1):
        return None
    return x, weight, bias, True


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def follow(
    name: str, logits: Logits, value: Tensor, args: Any, kwargs: Any, result: Tensor
) -> Logits | None:
    """What `result` is, made by `name` of `value`; None if that cannot be followed."""
    if name in CASTS:
        return _wider(logits, value, result)
    if name in SAME:
        return logits
    if logits.second or logits.log:
        return None
    if name in RESHAPES and result.shape[-1:] == value.shape[-1:]:
        shape = result.shape[:-1]
        return _rows(logits, lambda hidden: hidden.reshape(*shape, hidden.shape[-1]))
    if name == "__getitem__" and _whole_rows(args[1], value.dim()):
        return _rows(logits, lambda hidden: hidden[args[1]])
    if name in SWAPS and len(args) == 3:
        return _swapped(logits, value, args[1:])
    if name == "permute" and value.dim() == 3 and pytree.tree_leaves(args[1:]) == [0, 2, 1]:
        return replace(logits, second=True)
    if name == "log_softmax":
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        dtype = kwargs.get("dtype")
        last = dim in (-1, value.dim() - 1) and not logits.tanh
        logits = replace(logits, log=True)
        return (logits if dtype is None else _wider(logits, value, result)) if last else None
    return _scaled(name, logits, args)


def _rows(logits: Logits, step: Rows) -> Logits:
    return replace(logits, rows=(*logits.rows, step))


def _wider(logits: Logits, value: Tensor, result: Tensor) -> Logits | None:
    """A cast of 16-bit logits to float32, in which the loss is computed anyway."""
    if result is value or result.dtype == value.dtype:
        return logits if result.device == value.device else None
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    if not narrow or result.dtype != torch.float32 or result.device != value.device:
        return None
    return replace(logits, wide=torch.float32)


def _whole_rows(index: Any, dim: int) -> bool:
    """Whether an index leaves the last axis as it is."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is None or isinstance(item, Tensor) for item in items):
        return False
    if Ellipsis in items:
        place = items.index(Ellipsis)
        return place == len(items) - 1 or items[-1] == slice(None)
    return len(items) < dim or items[-1] == slice(None)


def _swapped(logits: Logits, value: Tensor, dims: Any) -> Logits | None:
    a, b = sorted(d % value.dim() for d in dims)
    if b < value.dim() - 1:
        return _rows(logits, lambda hidden: hidden.transpose(a, b))
    return replace(logits, second=True) if (a, b, value.dim()) == (1, 2, 3) else None


def _scaled(name: str, logits: Logits, args: Any) -> Logits | None:
    """Factors before the head's softcap, tanh, and the factor that makes it one."""
    if name == "tanh" and not logits.cap and not logits.tanh:
        return replace(logits, tanh=True)
    numbers = [a for a in args if isinstance(a, int | float)]
    if name not in TIMES | OVER or len(args) != 2 or not numbers or logits.cap:
        return None
    factor = float(numbers[0]) if name in TIMES else 1 / float(numbers[0])
    if not logits.tanh:
        return replace(logits, scale=logits.scale * factor)
    # cap * tanh(scale * x) = cap * tanh((scale * cap) * x / cap)
    if factor <= 0:
        return None
    return replace(logits, tanh=False, cap=factor, scale=logits.scale * factor)
