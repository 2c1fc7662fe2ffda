"""What running an op of the forward again costs: measured once for each distinct call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from ..ir.cost import OpCall


def op_call(node: fx.Node) -> OpCall:
    """A forward node as a call that cost models price; its inputs are made up when it is timed."""
    values = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    read = sum(_bytes(leaf) for leaf in pytree.tree_leaves(values))
    written = sum(_bytes(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")))
    target: Any = node.target
    name = str(target) if isinstance(target, OpOverload) else target.__name__
    return OpCall(
        op=name,
        key=f"{name}({', '.join(_text(leaf) for leaf in pytree.tree_leaves(values))})",
        flops=_flops(node, values),
        bytes_read=float(read),
        bytes_written=float(written),
        temporary_bytes=written,
        run=_runner(target, values),
    )


def _runner(target: Any, values: Any) -> Callable[[Any], Callable[[], Any]]:
    def make(device: Any) -> Callable[[], Any]:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: _real(t, device), values)

        def call() -> Any:
            with torch.no_grad():
                return target(*args, **kwargs)

        return call

    return make


def _real(fake: Tensor, device: Any) -> Tensor:
    """A tensor of the same layout: small numbers, and zeros where they may be indices."""
    shape, stride = tuple(map(int, fake.shape)), tuple(map(int, fake.stride()))
    made = torch.zeros(int(_span(shape, stride)), dtype=fake.dtype, device=device)
    if fake.is_floating_point():
        made.uniform_(0.1, 1.0)
    return made.as_strided(shape, stride)


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else 0


def _bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


def _text(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"{dtype}{list(leaf.shape)}/{list(leaf.stride())}"
    return str(leaf)


def _flops(node: fx.Node, values: Any) -> float:
    count = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if count is None:
        return 0.0
    args, kwargs = values
    try:
        return float(count(*args, **kwargs, out_val=node.meta.get("val")))
    except AssertionError:  # PyTorch's counter of attention knows no grouped heads
        (batch, heads, queries, dim), keys, width = (
            args[0].shape,
            args[1].shape[2],
            args[2].shape[3],
        )
        return 2.0 * batch * heads * queries * keys * (dim + width)
