"""What decoding through a packed cache computes, in one pass over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .filled import fill, filled_attention
from .heads import Arguments, Attend, block_mask, merge, take
from .layout import Blocks, parse
from .packing import pack_side, unpack_side


def decoded_attention(
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
    layout: str,
    prompt: int,
    top: Sequence[int] = (0,),
    delta: Sequence[int] = (0,),
    attention: Attend | None = None,
) -> Tensor:
    """The outputs of a prefill of `prompt` tokens and one decoding step for each further one.

    Arguments as `fxopt.ir.ops.attend` without a state, k and v of as many tokens as q. A query at
    position i >= prompt sees the packed image of the keys that a cache of i tokens has packed and
    the exact ones above; a query of the prompt sees every key exactly, or those of the tiles that
    `top` keeps of the prompt, and is corrected by `delta`. Beside the result it takes one copy of
    the keys and values of a head class. Keys of another sequence (not `causal`) were all stored
    before: every query sees the image of what `fill` packs of them.
    """
    if attention is None:
        from fxopt.kernels.attention.reference import attention_reference

        attention = attention_reference
    total = q.shape[2]
    num_kv_heads = k.shape[1]
    if not causal:
        state = fill(k, v, mask, layout)
        return filled_attention(q, state, mask, bias, sinks, scale, softcap, layout, attention)
    if k.shape[2] != total:
        raise ValueError(
            "decoded_attention needs whole sequences of causal self-attention; got "
            f"{total} queries and {k.shape[2]} keys"
        )
    arguments = Arguments(q, bias, sinks, scale, causal, window, softcap, sink_tokens, top, delta)
    classes = parse(layout).resolve(num_kv_heads)
    outputs: list[Tensor] = []
    for heads, fmt in classes:
        chosen = arguments.select(heads, num_kv_heads)
        keys, values = take(k, heads, 1), take(v, heads, 1)
        alike = not any(chosen.top) and not any(chosen.delta)
        if (fmt is None or fmt.packed(total - 1) == 0) and alike:
            outputs.append(chosen.attend(attention, keys, values, mask))
        else:
            outputs.append(_decode(chosen, keys, values, mask, fmt, min(prompt, total), attention))
    return merge(outputs, [heads for heads, _ in classes]).contiguous()


def _decode(
    arguments: Arguments,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    fmt: Blocks | None,
    prompt: int,
    attention: Attend,
) -> Tensor:
    """One head class: the queries in runs that see the same boundary, images copied in between."""
    total = k.shape[2]
    mixed_k, mixed_v = (k, v) if fmt is None else (k.clone(), v.clone())
    packed = 0
    outputs: list[Tensor] = []
    for low, high, boundary in query_runs(total, prompt, fmt):
        if fmt is not None and boundary > packed:
            span = slice(fmt.sink + packed, fmt.sink + boundary)
            blocks = (boundary - packed) // fmt.group
            valid = block_mask(mask, fmt.sink + packed, blocks, fmt.group)
            mixed_k[:, :, span] = _image(k[:, :, span], valid, "key", fmt)
            mixed_v[:, :, span] = _image(v[:, :, span], valid, "value", fmt)
            packed = boundary
        bias = arguments.bias
        if bias is not None:
            bias = (bias if bias.shape[2] == 1 else bias[:, :, low:high])[..., :high]
        run = replace(
            arguments if high <= prompt else arguments.past_prompt(k.shape[1]),
            q=arguments.q[:, :, low:high], bias=bias,
        )  # fmt: skip
        seen = None if mask is None else mask[:, :high]
        outputs.append(run.attend(attention, mixed_k[:, :, :high], mixed_v[:, :, :high], seen))
    return torch.cat(outputs, 1)


def query_runs(total: int, prompt: int, fmt: Blocks | None) -> list[tuple[int, int, int]]:
    """(first, end, boundary): queries that see as many packed tokens, the prompt's none."""
    runs = [(0, prompt, 0)] if prompt else []
    low = prompt
    if fmt is None:
        return [*runs, (prompt, total, 0)] if prompt < total else runs
    while low < total:
        boundary = fmt.packed(low)
        high = min(total, boundary + fmt.group + fmt.sink + fmt.residual)
        runs.append((low, high, boundary))
        low = high
    return runs


def _image(x: Tensor, valid: Tensor | None, side: str, fmt: Blocks) -> Tensor:
    """`x` [B, h, blocks * group, D] as it comes back from packed storage."""
    bits = fmt.key_bits if side == "key" else fmt.value_bits
    stored = pack_side(x.unflatten(2, (-1, fmt.group)), valid, side, bits)
    return unpack_side(stored, side, bits, x.dtype).flatten(2, 3)
