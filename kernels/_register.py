"""Registering an op by its schema.

`torch.library.custom_op` wraps every call in Python of its own: 8 µs a call on a small tensor, and
0.17 ms for an op that writes to a list of tensors, where an op registered here takes 2.5, or 6
with a gradient. Eager decoding makes thousands of such calls a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_CAST = (torch.float32, torch.bfloat16, torch.float16)
_FRAGMENT = torch.library.Library("fxopt", "FRAGMENT")


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    casts: tuple[str, ...] = (),
) -> Any:
    """Make `torch.ops.fxopt.<name>` and return its default overload.

    `implementation` serves every device, but CUDA where `cuda` is given; `fake` makes an output
    of the same shape, dtype and strides; `backward` and `setup_context` are those of
    `torch.library.register_autograd`; `autograd` takes their place where what runs depends on
    whether a gradient is wanted. Under autocast the arguments named in `casts` come in its dtype,
    as those of `F.linear` do, and nothing else is cast.
    """
    op = f"fxopt::{name}"
    torch.library.define(op, schema)
    torch.library.impl(op, "default", implementation)
    if cuda is not None:
        torch.library.impl(op, "cuda", _on_its_device(cuda))
    torch.library.register_fake(op, fake)
    if backward is not None:
        torch.library.register_autograd(op, backward, setup_context=setup_context)
    if autograd is not None:
        _FRAGMENT.impl(name, autograd, "Autograd")
    registered = getattr(torch.ops.fxopt, name).default
    for kind, key in _AUTOCAST.items() if casts else ():
        _FRAGMENT.impl(name, _casting(registered, kind, casts), key)
    return registered


def _casting(op: Any, kind: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """`op` on a device of `kind` under autocast."""
    named = [argument.name in names for argument in op._schema.arguments]

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(kind)
        with torch._C._DisableAutocast():  # pyright: ignore[reportPrivateUsage]
            return op(
                *(
                    a.to(dtype) if cast and isinstance(a, Tensor) and a.dtype in _CAST else a
                    for a, cast in zip(args, named, strict=False)
                )
            )

    return call


def _on_its_device(cuda: Callable[..., Any]) -> Callable[..., Any]:
    """`cuda` with its tensors' device as the current one, on which Triton launches."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        first = next((a for a in given if isinstance(a, Tensor) and a.is_cuda), None)
        if first is None or first.get_device() == torch.cuda.current_device():
            return cuda(*args, **kwargs)
        with torch.cuda.device_of(first):
            return cuda(*args, **kwargs)

    return call
