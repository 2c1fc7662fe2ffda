"""`fxopt::chunked`: a token-wise piece of a graph, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels._register import register

from .program import run
from .reference import chunked_reference


def _fake(x: Tensor, tensors: Sequence[Tensor], program: str, chunk: int) -> Tensor:
    out = run(program, x, tensors)
    return out.new_empty(out.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], str, int], output: Tensor
) -> None:
    x, tensors, ctx.program, _ = inputs
    ctx.save_for_backward(x, *tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    needed = [saved.is_floating_point() for saved in ctx.saved_tensors]
    leaves = [
        saved.detach().requires_grad_(wanted)
        for saved, wanted in zip(ctx.saved_tensors, needed, strict=True)
    ]
    with torch.enable_grad():
        out = run(ctx.program, leaves[0], leaves[1:])
    inputs = [leaf for leaf, wanted in zip(leaves, needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(out, inputs, gradient, allow_unused=True))
    grads = [next(found) if wanted else None for wanted in needed]
    return grads[0], grads[1:], None, None


# What a graph calls.
TARGET = register(
    "chunked",
    "(Tensor x, Tensor[] tensors, str program, int chunk) -> Tensor",
    chunked_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
