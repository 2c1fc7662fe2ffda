"""`fxopt::attention`: the stateless attention of captured graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import _C, Tensor  # pyright: ignore[reportPrivateUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._register import register
from .._triton import AVAILABLE
from .._triton import shared_bytes as _shared_bytes
from . import grid as grids
from . import reference
from .blocks import TileLists, lists_of_every, lists_of_grid
from .delta import EVERY, corrected
from .dilated import fold, folded, spacing, unfold, unfolded
from .spec import Attention, bind, in_order, pick, put, query_heads

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, "
    "bool causal, int[] window, float softcap, int[] sink_tokens, int[] top=[0], "
    "int[] delta=[0], int[] grid=[], int[] near=[0], int[] dilation=[1], int[] hip=[0], "
    "int[] mass=[0], int[] skip=[0]) -> Tensor"
)
BIAS, FLOATING = 4, (0, 1, 2, 4, 5)
"""Places of the arguments that are a bias, and that have gradients."""
# Measured on Hopper: cuDNN is 1.7 to 1.9 times as fast as flash, the default, in prefill.
# It takes 36 ms to plan for a new length, which short inputs do not win back.
LEAST_QUERIES = 1024
HOPPER_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_cuda(*inputs: Any, **options: Any) -> Tensor:
    """`attention_reference` by the fastest kernel that CUDA has for the call."""
    return _forward(bind(*inputs, **options))[0]


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _with_lse(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`attention`, and what its gradients want: the log-sum-exp [B, H, N] in float32. It is never
    written where the library computes a head, as its own backward makes it again."""
    out, lse = _forward(bind(*inputs))
    return out, _empty_lse(inputs[0]) if lse is None else lse


def _fake_with_lse(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _fake(*inputs), _empty_lse(inputs[0])


def _empty_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _forward(call: Attention) -> tuple[Tensor, Tensor | None]:
    shares = _shares(call)
    if len(shares) == 1:
        return _compute(call, shares[0][1])
    batch, heads, queries, _ = call.q.shape
    shape = (batch, queries, heads, call.v.shape[3])
    out = torch.empty(shape, dtype=call.q.dtype, device=call.q.device)
    lse = _empty_lse(call.q)
    for chosen, way in shares:
        rows = query_heads(chosen, call.group_size)
        values, sums = _compute(call.heads(chosen), way)
        put(out, 2, rows, values)
        if sums is not None:
            put(lse, 1, rows, sums)
    return out, lse


Way = Literal[
    "library",
    "kernel",
    "dilated",
    "kept tiles",
    "corrected",
    "neighborhood",
    "skipping",
    "reference",
]


def _shares(call: Attention) -> list[tuple[list[int], Way]]:
    """KV heads, and what computes them fastest. Dense ones keep the library's kernel: a neighbour
    with a window does not slow them down."""
    heads = list(range(call.num_kv_heads))
    if call.plain:
        return [(heads, "library")]
    if not _has_kernel(call.q) or not call.k.shape[2] or not call.q.numel():
        return [(heads, "reference")]
    fixed = [h for h in heads if call.is_corrected(h)]
    kept = [h for h in heads if call.top[h] and h not in fixed]
    local = [h for h in heads if call.near[h]]
    skipping = [h for h in heads if call.leaves_out(h)]
    spaced = [h for h in heads if call.window[h] and call.dilation[h] != 1]
    bounded = [h for h in heads if call.window[h] and h not in fixed + skipping + spaced]
    dense = sorted({*heads}.difference(fixed, kept, local, spaced, bounded, skipping))
    long = bool(kept or fixed or skipping) or call.q.shape[2] >= LEAST_QUERIES
    shares = _by_dilation(call, local, "neighborhood") + _by_dilation(call, spaced, "dilated")
    if dense and long and call.heads(dense).plain:
        shares.append((dense, "library"))
    else:
        bounded = sorted(bounded + dense)
    if bounded:
        shares.append((bounded, "kernel"))
    if skipping:
        shares.append((skipping, "skipping" if _skips_in_kernel(call) else "reference"))
    if fixed:
        shares.extend((group, "corrected") for group in _alike(call, fixed))
    if not kept:
        return shares
    from fxopt.kernels.block_topk.triton import heads_at_once

    # As many at a time as the lists of tiles leave room for.
    most = heads_at_once(call)
    for group in _alike(call, kept):
        shares.extend((group[i : i + most], "kept tiles") for i in range(0, len(group), most))
    return shares


def _by_dilation(call: Attention, chosen: list[int], way: Way) -> list[tuple[list[int], Way]]:
    kinds = dict.fromkeys(call.dilation[h] for h in chosen)
    return [([h for h in chosen if call.dilation[h] == kind], way) for kind in kinds]


def _alike(call: Attention, chosen: list[int]) -> list[list[int]]:
    """The chosen KV heads, those that keep tiles apart, and these by how they find them: chunks are
    halved for one share at a time."""
    kinds = [(bool(call.top[h]), call.hip[h] * call.top[h]) for h in chosen]
    return [[h for h, k in zip(chosen, kinds, strict=True) if k == one] for one in sorted({*kinds})]


def _has_kernel(q: Tensor) -> bool:
    return AVAILABLE and q.is_cuda and q.dtype != torch.float64


def _skips_in_kernel(call: Attention) -> bool:
    """Its tiles have one size on all devices, and not every multiprocessor has room for them."""
    from .triton import skip_bytes

    needed = skip_bytes(call.q.shape[3], call.v.shape[3], call.q.element_size())
    return needed <= _shared_bytes(call.q.device)


def _compute(call: Attention, way: Way) -> tuple[Tensor, Tensor | None]:
    if way == "library":
        with _backends(call):
            return reference.compute(call), None
    if way == "reference":
        return reference.compute(call), None
    if way == "corrected":
        return corrected(call, lambda part: _forward(part)[0], ask), None
    from .triton import attention_forward

    if way == "dilated":
        return unfolded(call, *attention_forward(folded(call), None))
    if way != "neighborhood":
        return attention_forward(call, _lists(call, way))
    _, places = grids.places(call.grid, call.dilation[0], call.q.device)
    out, lse = attention_forward(in_order(call), _lists(call, way))
    return out.index_select(1, places), lse.index_select(2, places)


def ask(call: Attention) -> Tensor:
    """`ask_reference` by the kernel."""
    from .triton import attention_forward

    asked = replace(call, q=call.q[:, :, ::EVERY])
    lists = lists_of_every(call, EVERY)
    return attention_forward(asked, lists, first=call.offset, step=EVERY)[0]


def _lists(call: Attention, way: Way) -> TileLists | None:
    if way == "neighborhood":
        return lists_of_grid(call.grid, call.near, call.dilation[0], call.q.device)
    if way != "kept tiles":
        return None
    if call.hip[0]:
        from fxopt.kernels.hip.triton import kept_lists
    else:
        from fxopt.kernels.block_topk.triton import kept_lists
    return kept_lists(call)


def _backends(call: Attention) -> AbstractContextManager[Any]:
    """What the library is to choose from."""
    short = call.q.shape[2] < LEAST_QUERIES
    if short or torch.cuda.get_device_capability(call.q.device)[0] != 9:
        return nullcontext()
    return sdpa_kernel(HOPPER_BACKENDS, set_priority=True)


def _gradients(
    gradient: Tensor, out: Tensor | None, lse: Tensor | None, *inputs: Any
) -> list[Tensor]:
    """Gradients of q, k, v and of those of bias and sinks that are given; contiguous.

    `out` and `lse` are what `attention_with_lse` returned; without them all is computed again. An
    op of its own so that tracers do not look into its loops.
    """
    call = bind(*inputs)
    if out is None or lse is None:
        return [t.contiguous() for t in _recomputed(gradient, call).values()]
    shares = _shares(call)
    if len(shares) == 1:
        parts = _backward_of(gradient, out, lse, call, shares[0][1])
        return [t.contiguous() for t in parts.values()]
    given = {name: getattr(call, name) for name in ("q", "k", "v", "sinks")}
    found = {n: t.new_empty(t.shape) for n, t in given.items() if t is not None}
    for chosen, way in shares:
        rows = query_heads(chosen, call.group_size)
        outer, inner, sums = pick(gradient, 2, rows), pick(out, 2, rows), pick(lse, 1, rows)
        for name, part in _backward_of(outer, inner, sums, call.heads(chosen), way).items():
            put(found[name], 0 if name == "sinks" else 1, chosen if name in "kv" else rows, part)
    return list(found.values())


def _backward_of(
    gradient: Tensor, out: Tensor, lse: Tensor, call: Attention, way: Way
) -> dict[str, Tensor]:
    if way in ("library", "corrected", "skipping", "reference"):
        with _backends(call):
            return _recomputed(gradient, call)
    from fxopt.kernels.attention_backward.triton import attention_gradients

    if way == "dilated":
        each, length = spacing(call), call.q.shape[2]
        rows = (fold(gradient, 1, each), fold(out, 1, each), fold(lse, 2, each))
        found = attention_gradients(*rows, folded(call), None)
        return {n: t if n == "sinks" else unfold(t, 2, each, length) for n, t in found.items()}
    if way != "neighborhood":
        return attention_gradients(gradient, out, lse, call, _lists(call, way))
    tokens, places = grids.places(call.grid, call.dilation[0], call.q.device)
    rows = (gradient.index_select(1, tokens), out.index_select(1, tokens))
    found = attention_gradients(
        *rows, lse.index_select(2, tokens), in_order(call), _lists(call, way)
    )
    return {n: t if n == "sinks" else t.index_select(2, places) for n, t in found.items()}


def _recomputed(gradient: Tensor, call: Attention) -> dict[str, Tensor]:
    # An op runs below autograd; the recomputation inside this one needs it.
    with _C._SetExcludeDispatchKeyGuard(_C.DispatchKey.AutogradFunctionality, False):  # pyright: ignore[reportPrivateUsage]
        return reference.gradients(gradient, call)


def _fake_gradients(
    gradient: Tensor, out: Tensor | None, lse: Tensor | None, *inputs: Any
) -> list[Tensor]:
    return [inputs[i].new_empty(inputs[i].shape) for i in FLOATING if inputs[i] is not None]


class _Attend(torch.autograd.Function):
    """The op, which keeps what its backward kernels want where there are some."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        has_kernel = _has_kernel(inputs[0]) and inputs[BIAS] is None
        with _C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
            out, lse = attention_with_lse(*inputs) if has_kernel else (attention(*inputs), None)
        ctx.save_for_backward(out if has_kernel else None, lse, *inputs[:6])
        ctx.options = inputs[6:]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and type(gradients[0]) is Tensor:
            raise NotImplementedError(
                "fxopt::attention has no second derivative: its gradients are made by kernels; "
                "with create_graph=True use the original model"
            )
        out, lse, *tensors = ctx.saved_tensors
        found = iter(attention_backward(gradients[0], out, lse, *tensors, *ctx.options))
        given = [i in FLOATING and t is not None for i, t in enumerate(tensors)]
        return (*(next(found) if g else None for g in given), *(None,) * len(ctx.options))


def _autograd(*inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _Attend.apply(*inputs)  # pyright: ignore
    with _C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
        return attention(*inputs)


attention = register(
    "attention",
    SCHEMA,
    reference.attention_reference,
    cuda=attention_cuda,
    fake=_fake,
    autograd=_autograd,
)
attention_with_lse = register(
    "attention_with_lse",
    SCHEMA.replace("-> Tensor", "-> (Tensor, Tensor)"),
    _with_lse,
    fake=_fake_with_lse,
)
attention_backward = register(
    "attention_backward",
    f"(Tensor gradient, Tensor? out, Tensor? lse, {SCHEMA[1 : SCHEMA.index(')')]}) -> Tensor[]",
    _gradients,
    fake=_fake_gradients,
)
