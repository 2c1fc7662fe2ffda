"""`fxopt::cached_attention`, `fxopt::filled_attention` and `fxopt::decoded_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._register import register
from fxopt.kernels.attention.op import attention_cuda

from . import reference
from .heads import Arguments
from .kept import kept_places
from .layout import Blocks, HeadClass, parse
from .mutating import Part, append_exact, append_packed, tiles_of
from .packing import FLOAT8

FLOAT8_CAPABILITY = (8, 9)
"""The first of NVIDIA's that converts e4m3 numbers."""

_ATTENTION = (
    "Tensor? mask, Tensor? bias, Tensor? sinks, "
    "float scale, bool causal, int[] window, float softcap, int[] sink_tokens, str layout"
)


def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    start: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    layout: str,
    length: int | None = None,
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    """Attention over the cache `state`, to which the new tokens are appended in place.

    q [B, H, N, D]; k [B, KV, N, D]; v [B, KV, N, Dv]; start 0-d int64, the tokens already there,
    and `length` the same as a number, where the caller has it; mask [B, start + N]. Returns
    [B, N, H, Dv], contiguous. The call reads the state as it was before it, packed tokens
    through their image, and the new tokens exactly.
    """
    return reference.cached_attention_mutating(
        q, k, v, state, start, mask, bias, sinks,
        scale, causal, window, softcap, sink_tokens, layout, length=length, top=top,
        delta=delta, hip=hip, mass=mass, skip=skip,
    )  # fmt: skip


def _cached_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    start: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: Sequence[int],
    softcap: float,
    sink_tokens: Sequence[int],
    layout: str,
    length: int | None = None,
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    kernels = None
    whole = all(t.is_contiguous() for t in state)  # kernels read and write no other
    if whole and _served(q.dtype, (q.shape[3], v.shape[3])) and _reads(layout, q.device):
        from .device import attend_and_append

        kernels = partial(attend_and_append, attention_cuda)
    return reference.cached_attention_mutating(
        q, k, v, state, start, mask, bias, sinks,
        scale, causal, window, softcap, sink_tokens, layout, attention_cuda, kernels, length, top,
        delta, hip, mass, skip,
    )  # fmt: skip


def store_first(part: Part, new: Part, start: Tensor, fmt: Blocks | None) -> None:
    """Fill one head class with keys and values [B, h, N, D], as `cached_attention` does with those
    of a prompt once it has attended. `start` is 0, on their device."""
    if fmt is None:
        append_exact(part, new, None, 0)
        return
    part["block_start"].zero_()
    k, v = new["key"], new["value"]
    served = start.is_cuda and _served(k.dtype, (k.shape[3], v.shape[3]))
    if served and _reads(str(fmt), k.device):
        from fxopt.kernels.kv_append.triton import append

        append(new, part, start, None, fmt)
    else:
        append_packed(part, fmt, new, None, 0)


def choose_anew(
    q: Tensor, part: Part, start: Tensor, entry: HeadClass, scale: float, length: int
) -> None:
    """Choose the tiles of one head class for the token of q [B, H, 1, D] as `cached_attention` does
    where that is due. `start` holds `length`, on their device."""
    arguments = Arguments(
        q, None, None, scale, True, [0], 0.0, [0],
        top_keys=[entry.top_keys], refresh=[entry.refresh],
    )  # fmt: skip
    if start.is_cuda and _served(q.dtype, (q.shape[3], 1)) and _reads(str(entry), q.device):
        from fxopt.kernels.decode_topk.triton import kept_list

        kept_list(arguments, part, start, None, entry.format)
    else:
        kept_places(arguments, part, tiles_of(part, entry.format, length), None, length)


def _served(dtype: torch.dtype, dims: tuple[int, int]) -> bool:
    return _triton.AVAILABLE and dtype != torch.float64 and max(dims) <= 256


@lru_cache(maxsize=4096)
def _reads(layout: str, device: torch.device) -> bool:
    """Whether kernels on a GPU read what `layout` stores: e4m3 numbers where it converts them."""
    formats = [entry.format for entry in parse(layout).classes if entry.format]
    if all(FLOAT8 not in (fmt.key_bits, fmt.value_bits) for fmt in formats):
        return True
    return torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY


def decodes_on_device(
    rows: int, dims: tuple[int, int], dtype: torch.dtype, layout: str, device: torch.device
) -> bool:
    """Whether `cached_attention` on a GPU learns lengths there alone, for `rows` queries a KV head
    of `dims` (head_dim, value_dim): then it may be part of a CUDA graph."""
    if not _served(dtype, dims) or not _reads(layout, device):
        return False
    from .device import MOST_ROWS

    return rows <= MOST_ROWS


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    batch, heads, queries, _d = q.shape
    return q.new_empty((batch, queries, heads, v.shape[-1]))


cached_attention = register(
    "cached_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor(a!)[] state, Tensor start, {_ATTENTION}, "
    "SymInt? length=None, int[] top=[0], int[] delta=[0], int[] hip=[0], int[] mass=[0], "
    "int[] skip=[0]) -> Tensor",
    _cached,
    cuda=_cached_cuda,
    fake=_fake,
)
decoded_attention = register(
    "decoded_attention",
    f"(Tensor q, Tensor k, Tensor v, {_ATTENTION}, int prompt, int[] top=[0], "
    "int[] delta=[0], int[] hip=[0], int[] mass=[0], int[] skip=[0]) -> Tensor",
    reference.decoded_attention,
    fake=_fake,
)


def _filled_cuda(*arguments: Any) -> Tensor:
    return reference.filled_attention(*arguments, attention=attention_cuda)


def _filled_fake(q: Tensor, state: Sequence[Tensor], *_: object) -> Tensor:
    batch, heads, queries, _d = q.shape
    return q.new_empty((batch, queries, heads, state[-1].shape[-1]))


filled_attention = register(
    "filled_attention",
    "(Tensor q, Tensor[] state, Tensor? mask, Tensor? bias, Tensor? sinks, float scale, "
    "float softcap, str layout) -> Tensor",
    reference.filled_attention,
    cuda=_filled_cuda,
    fake=_filled_fake,
)
