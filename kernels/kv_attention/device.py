"""A head class on a GPU: which kernels compute its output and store its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels.decode_topk.triton import kept_list, note_ranges
from fxopt.kernels.kv_append.triton import append, finish
from fxopt.kernels.kv_exact.triton import decode_exact
from fxopt.kernels.kv_int8.triton import decode_packed, serves

from .heads import Arguments, Attend
from .layout import Blocks
from .mutating import attend_exact, attend_image, tokens_before
from .triton import decode

# More rows than this are a prefill: the dequantised image and a library kernel are faster.
MOST_ROWS = 64


def attend_and_append(
    attention: Attend,
    arguments: Arguments,
    new: dict[str, Tensor],
    part: dict[str, Tensor],
    start: Tensor,
    mask: Tensor | None,
    fmt: Blocks | None,
    length: int | None = None,
) -> Tensor:
    """One head class: its output, its new tokens stored. Decoding never waits for the device; a
    prefill does where neither `length` (what `start` holds) nor a mask tells what is stored, and
    where it follows tokens that are packed."""
    queries = new["key"].shape[2]
    decoding = arguments.q.shape[1] // new["key"].shape[1] * queries <= MOST_ROWS
    if decoding:
        arguments = arguments.past_prompt(new["key"].shape[1])
    if fmt is None and not (decoding and _reads_lengths(arguments, mask, length)):
        begin = tokens_before(queries, start, mask, length)
        return attend_exact(attention, arguments, new, part, mask, begin)
    new = {side: x.contiguous() for side, x in new.items()}
    rank = None if mask is None else _seen(mask, arguments)
    counts = start.new_empty(3) if decoding and fmt is not None else None
    if decoding:
        kept = kept_list(arguments, part, start, mask, fmt)
        if fmt is None:
            shares = decode_exact(arguments, new, part, start, rank, kept=kept)
        elif serves(arguments, new, part, fmt):
            shares = decode_packed(arguments, new, part, start, rank, fmt, counts=counts, kept=kept)
        else:
            shares = decode(arguments, new, part, start, rank, fmt, counts=counts, kept=kept)
        out = finish(shares, new, part, start, rank, fmt, counts)
    else:
        assert fmt is not None
        begin = tokens_before(queries, start, mask, length)
        out = attend_image(attention, arguments, new, part, mask, fmt, begin)
        append(new, part, start, rank, fmt)
    note_ranges(part, start, queries, rank)
    return out


def _reads_lengths(arguments: Arguments, mask: Tensor | None, length: int | None) -> bool:
    """Whether an exact class is decoded by the kernels here, which read `start` on the device.

    Where its value is not known they have to: a number would be a constant in a compiled module
    or a captured CUDA graph. Where it is, the library is as fast on what it can express, and
    the stateless kernel skips the keys outside of a window; it does not split a row's keys.
    """
    if length is None:
        return True
    if any(arguments.top_keys) and arguments.q.shape[2] == 1:
        return True
    extras = (mask, arguments.bias, arguments.sinks)
    plain = all(tensor is None for tensor in extras) and not arguments.softcap
    return not plain and not any(arguments.window)


def _seen(mask: Tensor, arguments: Arguments) -> Tensor:
    """The mask as kernels read it; by rank where windows may have sink tokens."""
    if any(arguments.window):
        return ranks(mask)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask if mask.stride(1) == 1 else mask.contiguous()


def ranks(mask: Tensor) -> Tensor:
    """int32 [B, T]: how many keys are unmasked up to and with this one; 0 for masked ones."""
    seen = mask != 0
    return torch.where(seen, seen.cumsum(1), 0).to(torch.int32)
