"""`fxopt::cut_cross_entropy` and its kin: the reference, on CUDA with the rows in Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxopt.kernels import _triton
from fxopt.kernels._register import register

from . import reference

OPTIONS = "int ignore_index, float label_smoothing, float softcap, float z_loss, float filter_eps"
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
CHUNK = 1024
"""Rows whose logits exist at once: at 128k classes in 16 bits a quarter of a GiB."""


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference with the rows of each chunk in one Triton kernel."""

    def call(*args: Any) -> Any:
        if not _triton.AVAILABLE:
            return function(*args)
        from . import triton

        return function(*args, kernel=triton.rows)

    return call


def _empty_gradients(
    hidden: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        torch.empty_like(weight) if needs[1] else weight.new_empty(0),
        hidden.new_empty(weight.shape[0] if needs[2] else 0),
    )


def _per_token(hidden: Tensor) -> Tensor:
    wide = torch.float32 if reference.narrow(hidden.dtype) else hidden.dtype
    return hidden.new_empty(hidden.shape[:1], dtype=wide)


def _backward_fake(
    grad_loss: Tensor, grad_lse: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs: Sequence[bool] = rest[-2]
    return _empty_gradients(hidden, weight, needs)


cut_cross_entropy_backward = register(
    "cut_cross_entropy_backward",
    f"(Tensor grad_loss, Tensor grad_lse, {HEAD}, Tensor lse, {OPTIONS}, bool[3] needs, int chunk)"
    " -> (Tensor, Tensor, Tensor)",
    reference.cut_cross_entropy_backward,
    fake=_backward_fake,
    cuda=_on_device(reference.cut_cross_entropy_backward),
)


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    reference.check(hidden, weight, bias, labels, rest[-1])
    return _per_token(hidden), _per_token(hidden)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, *ctx.options, ctx.chunk = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])


def _backward(ctx: Any, grad_loss: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = cut_cross_entropy_backward(
        grad_loss, grad_lse, hidden, weight, bias, labels, lse, *ctx.options, needs, ctx.chunk
    )
    wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*wanted, *[None] * 7)


cut_cross_entropy = register(
    "cut_cross_entropy",
    f"({HEAD}, {OPTIONS}, int chunk) -> (Tensor, Tensor)",
    reference.cut_cross_entropy,
    fake=_fake,
    cuda=_on_device(reference.cut_cross_entropy),
    backward=_backward,
    setup_context=_setup_context,
)


def _sum_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    reference.check(hidden, weight, bias, labels, rest[-1])
    total, count = (_per_token(hidden).new_empty(()) for _ in range(2))
    return total, count, *_empty_gradients(hidden, weight, rest[-2])


def _sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    del inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros as large as the weight, which nothing reads
    ctx.save_for_backward(*output[1:])


def _sum_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the sum or mean, times what reaches it."""
    if torch.is_grad_enabled() and not _traced(grad):
        raise NotImplementedError(
            "cut_cross_entropy_sum has no second derivative: its gradients are made in the "
            "forward; with create_graph=True compute the logits and F.cross_entropy of them"
        )
    count, *gradients = ctx.saved_tensors
    # a sum over no label, divided by their number: the loss is nan, its gradient nothing
    scale = grad.where(count > 0, 0.0)
    needs = ctx.needs_input_grad[:3]
    return (
        *(scaled(g, scale) if need else None for g, need in zip(gradients, needs, strict=True)),
        *[None] * 9,
    )


def scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient * scale, in place where the graph is gone after this backward.

    A second tensor of the weight's size would be the largest of the step. Most losses are scaled
    by 1, which only the device knows: its kernel then touches nothing.
    """
    if _traced(gradient) or keeps_graph():
        return gradient * scale
    if gradient.is_cuda and _triton.AVAILABLE:
        from . import triton

        return triton.scale_(gradient, scale)
    return gradient.mul_(scale)


def keeps_graph() -> bool:
    """Whether the backward that runs now may run again over the same saved tensors."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore


def _traced(value: Tensor) -> bool:
    return type(value) is not Tensor or torch.compiler.is_compiling()


cut_cross_entropy_sum = register(
    "cut_cross_entropy_sum",
    f"({HEAD}, bool mean, {OPTIONS}, bool[3] needs, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.cut_cross_entropy_sum,
    fake=_sum_fake,
    cuda=_on_device(reference.cut_cross_entropy_sum),
    backward=_sum_backward,
    setup_context=_sum_setup_context,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    filter_eps: float = 0.0,
    reduction: str = "mean",
    chunk: int = CHUNK,
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), labels)`, within rounding, without the logits.

    hidden [N, D], weight [V, D], bias [V], labels [N] in int64; result [] or, with reduction
    "none", [N], in float32 (float64 if hidden is). "mean" divides by the labels that count. For
    "mean" and "sum" logits are made once: gradients are computed in the forward and scaled in the
    backward, unless 1 reaches the loss. For "none", and in float16, whose small gradients need
    the scale that a loss scaler brings, the backward makes them a second time. Under autocast
    operands are cast as those of `linear` are. On CUDA a label that is no class makes the loss
    nan.

    With `filter_eps` (2^-12, say) gradients are approximate: a class whose gradient is smaller in
    every row of a chunk takes no part in the two products of the backward (`filtered.py`). The host
    waits once a chunk to know how many classes are left.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    options = (ignore_index, label_smoothing, softcap, z_loss, filter_eps)
    needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    again = reduction == "none" or hidden.dtype == torch.float16
    if again or not torch.is_grad_enabled() or not any(needs):
        loss, _ = cut_cross_entropy(hidden, weight, bias, labels, *options, chunk)
        if reduction == "none":
            return loss
        total, count = loss.sum(), (labels != ignore_index).sum()
    else:
        total, *_ = cut_cross_entropy_sum(
            hidden, weight, bias, labels, reduction == "mean", *options, needs, chunk
        )
        return total
    return total / count if reduction == "mean" else total


def _products(hidden: Any, weight: Any, products: int) -> int:
    return 2 * products * hidden[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.fxopt.cut_cross_entropy)
def _flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _products(hidden, weight, 1)


@register_flop_formula(torch.ops.fxopt.cut_cross_entropy_sum)
def _sum_flops(hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    return _products(hidden, weight, 1 + sum(rest[-2][:2]))


@register_flop_formula(torch.ops.fxopt.cut_cross_entropy_backward)
def _backward_flops(_: Any, __: Any, hidden: Any, weight: Any, *rest: Any, **___: Any) -> int:
    return _products(hidden, weight, 1 + sum(rest[-2][:2]))
