"""The canonical attention call that graphs and generated source contain.

It is a plain function over registered ops, so one graph serves every lowering: without a
state it is the stateless (differentiable) op, with one it appends to the state and reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .recording import is_recorded


class Length(Protocol):
    """How many tokens a cache holds: `start`, a 0-d int64 tensor on its device, and `value`."""

    start: Tensor
    value: int


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    start: Tensor | Length | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: Sequence[int] = (0,),
    softcap: float = 0.0,
    sink_tokens: Sequence[int] = (0,),
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    layout: str = "",
    grid: Sequence[int] = (),
    near: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    """Attention with grouped-query heads.

    q [B, H, N, D]; k [B, KV, T, D]; v [B, KV, T, Dv]; returns [B, N, H, Dv], contiguous.
    mask [B, T], nonzero where a key may be seen; bias [B or 1, H or 1, N or 1, T], added to the
    scores; sinks [H], one extra logit a head. Query i stands at position i + T - N. `causal`:
    no key after it; `window` w > 0: only keys nearer than w, except the first `sink_tokens`
    unmasked keys of the row (both one number, or one a KV head); `softcap` c > 0:
    c * tanh(score / c); `top` t > 0 (one number, or one a KV head): each tile of 128 queries
    visits, of the tiles of 128 keys before it, the t per mille of the most estimated attention
    (at least 8), its own, the one before and the first among them; the last two tiles of queries,
    and so all queries of a call that decodes, see all keys. `hip` 1 (one number, or one a KV head):
    the tiles of `top` are found by halving chunks of keys. `mass` m > 0 (one number, or one a KV
    head) beside a `top` without `hip`: of the tiles that this keeps only the first that hold m per
    mille of the estimated attention, 1000 standing for the share itself, of at least 4 tiles.
    `delta` d > 0 (one number, or one a query head), where a window or `top` hides keys: every 64th
    query sees all keys, and its followers add d per mille of what that changes in it; with a
    window, too, the last two tiles and decoded tokens see all keys then. `near` n > 0 (one number,
    or one a KV head) needs a `grid` (p, n1, n2, ...): the tokens are p of no place, which see all
    and are seen by all, and n1 x n2 x ... that see what is nearer than n along each axis, and whole
    tiles of 64 of these; calls with another number of tokens, all. `dilation` d > 1 (one number, or
    one a KV head, or one a KV head and axis, head after head): of the grid only every d-th place
    along each axis is seen, and n counts these; or with `window`, in calls of more than w tokens
    that are not causal, of the keys only every d-th, counted by w, without sink tokens.
    `skip` s > 0 (one number, or one a query head), hundredths of a nat: a tile of 128 queries
    leaves out a tile of 64 keys that all of these see, but the first such, where in each row all
    its scores lie more than s below one that the row sees before, on the way from the tiles that
    are seen in part to the others in their order; calls of at most 256 queries leave out nothing. A
    query that sees no key returns 0.

    With `state` (the tensors of one layer's cache, written in place) k and v are the new tokens
    only and `start`, a 0-d int64 tensor, counts the tokens already there; T is then start + N.
    With a `Length` no eager call waits for the device to learn that number. `layout` says how
    the cache stores keys and values, and how many of them a single new token reads; empty means
    exactly and all. Without k and v the state was filled once, before (with keys of another
    sequence): all of it is read and nothing written.
    """
    if k is None:
        return torch.ops.fxopt.filled_attention.default(
            q, state, mask, bias, sinks, scale, softcap, layout
        )
    if state is None:
        return torch.ops.fxopt.attention.default(
            q, k, v, mask, bias, sinks,
            scale, causal, window, softcap, sink_tokens, top, delta, grid, near, dilation, hip,
            mass, skip,
        )  # fmt: skip
    if any(near) or any(each != 1 for each in dilation):
        given = "near has" if any(near) else "dilation has"
        raise ValueError(f"attend: {given} no meaning where keys come one by one, from a state")
    length = None
    if start is not None and not isinstance(start, Tensor):
        length = None if is_recorded(start.start) else start.value
        start = start.start
    return torch.ops.fxopt.cached_attention.default(
        q, k, v, state, start, mask, bias, sinks,
        scale, causal, window, softcap, sink_tokens, layout, length, top, delta, hip, mass, skip,
    )  # fmt: skip


def arguments_of_attend(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of `attend` by name, defaults filled in."""
    bound = ATTEND.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


ATTEND = inspect.signature(attend)
"""Names, order and defaults of its arguments, for all that reads or writes calls of it."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of channel pairs i and i + D / 2.

    x [B, H, N, D]; cos and sin [B or 1, 1, N, D] of its dtype. On a GPU it is one kernel, whose
    result is contiguous and to the bit that of the formula below.
    """
    if _is_one_kernel(x, cos, sin):
        return torch.ops.fxopt.rotate.default(x, cos, sin)
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def mix_channels(
    x: Tensor, matrices: Tensor, heads: Sequence[int] = (), kv_heads: int = 0
) -> Tensor:
    """The channels of each head times the matrix of its KV head.

    x [B, H, N, D] and matrices [KV, D, D], of one dtype, H a multiple of KV; returns [B, H, N, D].
    With `heads` the matrices are those of these of `kv_heads` KV heads alone, and the others stay
    as they are. They have no gradients: apart, those of queries and keys would change scores.
    """
    grouped = x.unflatten(1, (kv_heads if heads else matrices.shape[0], -1))
    taken = torch.stack([grouped[:, head] for head in heads], 1) if heads else grouped
    mixed = torch.einsum("bkgnd,kde->bkgne", taken, matrices.detach())
    if heads:
        parts = list(grouped.unbind(1))
        for head, part in zip(heads, mixed.unbind(1), strict=True):
            parts[head] = part
        mixed = torch.stack(parts, 1)
    return mixed.flatten(1, 2)


def rotate_both(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_mix: Tensor | None = None,
    key_mix: Tensor | None = None,
    heads: Sequence[int] = (),
    kv_heads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each as `rotate` leaves it where there are cos and sin, and then as
    `mix_channels` does where there are matrices.

    q [B, H, N, D] and k [B, KV, N, D] of one dtype, which all others have as well; query_mix and
    key_mix, both or neither. On a GPU it is one kernel, whose results are contiguous and, without
    matrices, to the bit those of the two calls.
    """
    # Matrices are parameters of the module, but none that it trains.
    query_mix, key_mix = (t if t is None else t.detach() for t in (query_mix, key_mix))
    given = [t for t in (q, k, cos, sin, query_mix, key_mix) if t is not None]
    if _is_one_kernel(*given):
        return torch.ops.fxopt.rotate_both.default(
            q, k, cos, sin, query_mix, key_mix, heads, kv_heads
        )
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if query_mix is not None and key_mix is not None:
        q, k = (mix_channels(x, m, heads, kv_heads) for x, m in ((q, query_mix), (k, key_mix)))
    return q, k


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up (GLU Variants, arXiv 2002.05202); of one dtype and shape.

    `activation` is "silu", "gelu" or "gelu_tanh". On a GPU it is one kernel.
    """
    if _is_one_kernel(gate, up):
        return torch.ops.fxopt.gated.default(gate, up, activation)
    if activation == "silu":
        active = F.silu(gate)
    else:
        active = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    alone = active.dtype == up.dtype and not (active.requires_grad or up.requires_grad)
    if torch.compiler.is_compiling() or not alone:
        return active * up
    return active.mul_(up)  # not a fourth tensor beside those of the caller


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x over the root of its mean square (RMSNorm, arXiv 1910.07467), rounded, times `weight`.

    x [..., D] and weight [D] of one dtype. On a GPU it is one kernel.
    """
    if _is_one_kernel(x, weight):
        return torch.ops.fxopt.rms_norm.default(x, weight, epsilon)
    if x.itemsize > 2:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return weight * F.rms_norm(x, weight.shape, None, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(x + residual, `rms_norm` of that sum); on a GPU one kernel."""
    if _is_one_kernel(x, residual, weight):
        return torch.ops.fxopt.add_rms_norm.default(x, residual, weight, epsilon)
    total = x + residual
    return total, rms_norm(total, weight, epsilon)


def _is_one_kernel(*tensors: Tensor) -> bool:
    """Whether a call over these is a kernel of ours, which computes no gradient and which
    Inductor could not join to what is around it."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return False
    if any(t.dtype != tensors[0].dtype for t in tensors):  # under autocast
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def attend_as_decoded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    start: Tensor | None = None,
    *,
    prompt: int,
    scale: float,
    causal: bool = False,
    window: Sequence[int] = (0,),
    softcap: float = 0.0,
    sink_tokens: Sequence[int] = (0,),
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    layout: str = "",
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    """What `attend` would return for each query, had the tokens from `prompt` on been decoded
    one at a time through a cache of `layout`. Takes whole sequences; `state` is not read."""
    return torch.ops.fxopt.decoded_attention(
        q, k, v, mask, bias, sinks,
        scale, causal, list(window), softcap, list(sink_tokens), layout, prompt, list(top),
        list(delta), list(hip), list(mass), list(skip),
    )  # fmt: skip
