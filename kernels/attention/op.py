"""`fxopt::attention`: the stateless attention of captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor  # pyright: ignore[reportPrivateUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._register import register
from .._triton import AVAILABLE
from . import reference
from .spec import Attention, bind, put, query_heads

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, "
    "bool causal, int[] window, float softcap, int[] sink_tokens, int[] top=[0]) -> Tensor"
)
# Measured on Hopper: cuDNN is 1.7 to 1.9 times as fast as flash, the default, in prefill.
# It takes 36 ms to plan for a new length, which short inputs do not win back.
LEAST_QUERIES = 1024
HOPPER_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    top: Sequence[int] = (0,),
) -> Tensor:
    """`attention_reference` by the fastest kernel that CUDA has for the call."""
    call = bind(q, k, v, mask, bias, sinks, scale, causal, window, softcap, sink_tokens, top)
    if call.plain:
        return _library(call)
    if not AVAILABLE or q.dtype == torch.float64 or not call.k.shape[2] or not q.numel():
        return reference.compute(call)
    return _own_kernel(call)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    top: Sequence[int] = (0,),
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _own_kernel(call: Attention) -> Tensor:
    from .triton import attention_forward

    kept = [h for h, t in enumerate(call.top) if t]
    if len(kept) == call.num_kv_heads:
        return _over_kept_tiles(call)
    if kept:
        others = [h for h, t in enumerate(call.top) if not t]
        rest = _library if call.heads(others).plain else _own_kernel
        return _joined(call, [(others, rest), (kept, _over_kept_tiles)])
    dense = [h for h, w in enumerate(call.window) if not w]
    split = 0 < len(dense) < call.num_kv_heads and call.q.shape[2] >= LEAST_QUERIES
    if not split or not call.heads(dense[:1]).plain:
        return attention_forward(call)[0]
    # Dense heads keep the library's kernel; a windowed neighbour does not slow them down.
    bounded = [h for h, w in enumerate(call.window) if w]
    return _joined(call, [(dense, _library), (bounded, lambda part: attention_forward(part)[0])])


def _over_kept_tiles(call: Attention) -> Tensor:
    """As many KV heads at a time as the lists of tiles leave room for."""
    from fxopt.kernels.block_topk.triton import heads_at_once, kept_lists

    from .triton import attention_forward

    def run(part: Attention) -> Tensor:
        return attention_forward(part, kept_lists(part))[0]

    heads, most = list(range(call.num_kv_heads)), heads_at_once(call)
    if most >= len(heads):
        return run(call)
    return _joined(call, [(heads[i : i + most], run) for i in range(0, len(heads), most)])


def _joined(
    call: Attention, shares: Sequence[tuple[list[int], Callable[[Attention], Tensor]]]
) -> Tensor:
    """The output, each share of KV heads computed in its own way."""
    out = torch.empty(
        (call.q.shape[0], call.q.shape[2], call.q.shape[1], call.v.shape[3]),
        dtype=call.q.dtype,
        device=call.q.device,
    )
    for heads, run in shares:
        put(out, 2, query_heads(heads, call.group_size), run(call.heads(heads)))
    return out


def _library(call: Attention) -> Tensor:
    short = call.q.shape[2] < LEAST_QUERIES
    if short or torch.cuda.get_device_capability(call.q.device)[0] != 9:
        return reference.compute(call)
    with sdpa_kernel(HOPPER_BACKENDS, set_priority=True):
        return reference.compute(call)


def _gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    top: Sequence[int] = (0,),
) -> list[Tensor]:
    """Gradients of q, k, v and of those of bias and sinks that are given; contiguous.

    An op of its own so that tracers do not look into its loops.
    """
    call = bind(q, k, v, mask, bias, sinks, scale, causal, window, softcap, sink_tokens, top)
    # An op runs below autograd; the recomputation inside this one needs it.
    with _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False):  # pyright: ignore[reportPrivateUsage]
        return [t.contiguous() for t in reference.gradients(gradient, call).values()]


def _fake_gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    top: Sequence[int] = (0,),
) -> list[Tensor]:
    given = (t for t in (q, k, v, bias, sinks) if t is not None)
    return [t.new_empty(t.shape) for t in given]


def _setup_context(ctx: Any, inputs: tuple[object, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, bias, sinks = ctx.saved_tensors
    grads = attention_backward(gradient, q, k, v, mask, bias, sinks, *ctx.options)
    rest = iter(grads[3:])
    return (
        *grads[:3],
        None,
        None if bias is None else next(rest),
        None if sinks is None else next(rest),
        *(None,) * len(ctx.options),
    )


attention = register(
    "attention",
    SCHEMA,
    reference.attention_reference,
    cuda=attention_cuda,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
attention_backward = register(
    "attention_backward",
    f"(Tensor gradient, {SCHEMA[1 : SCHEMA.index(')')]}) -> Tensor[]",
    _gradients,
    fake=_fake_gradients,
)
