"""Attention as the operator of ONNX, which a runtime computes without passes over the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import dilations, near_keys
from .spec import per_head
from .tiles import sum_dtype
from .traceable import attention_traceable, kept_by_maximum, kept_keys, visible

OPSET = 23
"""The first with an `Attention` operator."""
DTYPES = (torch.float32, torch.float16)


def attention_onnx(
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
    delta: Sequence[int] = (0,),
    grid: Sequence[int] = (),
    near: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    hip: Sequence[int] = (0,),
    mass: Sequence[int] = (0,),
    skip: Sequence[int] = (0,),
) -> Tensor:
    """`attention_traceable`, which an exporter sees as one `Attention`.

    The operator knows neither the logits of sinks nor, in all runtimes alike, a cap before the
    mask: such calls, those of several masks (`delta`), and dtypes that onnxruntime's does not take
    stay as they were.
    """
    exporting = torch.compiler.is_exporting() and q.dtype in DTYPES
    if not exporting or sinks is not None or softcap > 0 or any(delta):
        return attention_traceable(
            q, k, v, mask, bias, sinks,
            scale, causal, window, softcap, sink_tokens, top, delta, grid, near, dilation, hip,
            mass, skip,
        )  # fmt: skip
    kv, queries = k.shape[1], q.shape[2]
    windows, first = per_head("window", window, kv), per_head("sink_tokens", sink_tokens, kv)
    spacings = dilations(dilation, kv, tuple(grid))
    seen = visible(queries, k.shape[2], mask, causal, windows, first, q.device, spacings)
    if any(top):
        kept = kept_keys(q, k, mask, scale, softcap, top, hip, mass)
        seen = kept if seen is None else seen & kept
    if any(near):
        close = near_keys(queries, tuple(grid), per_head("near", near, kv), spacings, q.device)
        seen = close if seen is None else seen & close
    if any(skip):
        grouped = q.reshape(q.shape[0], kv, -1, queries, q.shape[3]).to(sum_dtype(q)) * scale
        scores = grouped @ k.to(grouped.dtype).unsqueeze(2).mT
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        limits = per_head("skip", skip, q.shape[1], "query heads")
        matter = kept_by_maximum(scores, mask, windows, limits, None)
        seen = matter if seen is None else seen & matter
    added, some = _added(seen, bias, q)
    shape = (*q.shape[:3], v.shape[3])
    operands = (q, k, v) if added is None else (q, k, v, added)
    out: Tensor = torch.onnx.ops.symbolic(
        "Attention", operands, {"scale": float(scale)}, dtype=q.dtype, shape=shape, version=OPSET
    )
    # Runtimes disagree on queries that see nothing; here they get zeros.
    out = out if some is None else torch.where(some, out, 0.0)
    return out.transpose(1, 2).contiguous()


def _added(
    seen: Tensor | None, bias: Tensor | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores [B or 1, H or 1, N, T], finite, and which queries see a key."""
    if seen is not None:
        batch, kv, members, rows, keys = seen.shape
        group = q.shape[1] // kv if kv > 1 else members
        seen = seen.expand(batch, kv, group, rows, keys).reshape(batch, kv * group, rows, keys)
    if seen is None and bias is None:
        return None, None
    added = q.new_zeros(()) if bias is None else bias.to(q.dtype)
    if seen is not None:
        added = torch.where(seen, added, -torch.inf)
    some = (added > -torch.inf).any(-1, keepdim=True)
    added = added.clamp(min=torch.finfo(q.dtype).min)
    return added.expand(*added.shape[:2], q.shape[2], added.shape[3]), some
