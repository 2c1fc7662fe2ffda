"""Attention as onnxruntime's `GroupQueryAttention`, which leaves out what causality hides.

The standard's `Attention` computes all scores of a prompt and adds a mask to them. It knows neither
caps of scores nor logits of sinks: such calls stand in plain operators beside it. docs/onnx.md has
what each takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .onnx import DTYPES

OPERATOR = "com.microsoft::GroupQueryAttention"
CHANNELS = 8
"""It takes heads of a multiple of so many."""
PER_HEAD = ("sink_tokens", "top", "near", "delta", "skip")
"""Arguments of `attend` that hide keys by other rules than causality, windows and padding."""


Shape = Sequence[int | str]


def refusal(call: Mapping[str, Any], shapes: Sequence[Shape], dtype: torch.dtype) -> str | None:
    """Why the operator does not serve a call of `attend`, given by name, with q, k and v of
    `shapes`; None if it does."""
    q, k, v = shapes
    if not call["causal"]:
        return "attention is not causal"
    if call["bias"] is not None:
        return "a bias is added to the scores"
    if any(any(call[name]) for name in PER_HEAD) or len(set(call["window"])) > 1:
        return "heads see other keys than one sliding window"
    if q[2] != k[2]:
        return "there are not as many queries as keys"
    if k[3] != v[3]:
        return "value heads have other sizes than key heads"
    if int(k[3]) % CHANNELS:
        return f"heads of {k[3]} channels are no multiple of {CHANNELS}"
    if dtype not in DTYPES:
        return f"it computes in float32 and float16, the export in {dtype}"
    return None


def grouped_query_attention(call: Mapping[str, Any]) -> Tensor:
    """A call of `attend` that is not refused, as one node: for an exporter's eyes."""
    q, k, v, mask, sinks = (call[name] for name in ("q", "k", "v", "mask", "sinks"))
    window = call["window"][0]
    batch, heads, length, dim = q.shape
    # The operator counts a row's tokens from its first: what pads them is hidden by a bias.
    bias, some = (None, None) if mask is None else _padding(mask, window, q.dtype)
    zeros = torch.zeros(batch, dtype=torch.int32, device=q.device)
    operands = (
        *(x.transpose(1, 2).flatten(2) for x in (q, k, v)), None, None,
        zeros + (length - 1), zeros[:1].squeeze(0) + length,
        None, None, None, bias, None if sinks is None else sinks.to(q.dtype),
    )  # fmt: skip
    attributes: dict[str, Any] = {
        "num_heads": heads, "kv_num_heads": k.shape[1], "scale": float(call["scale"]),
        "local_window_size": window or -1, "softcap": float(call["softcap"]),
    }  # fmt: skip
    out, *_ = torch.onnx.ops.symbolic_multi_out(
        OPERATOR, operands, attributes, version=1,
        dtypes=(q.dtype,) * 3,
        shapes=((batch, length, heads * dim), tuple(k.shape), tuple(v.shape)),
    )  # fmt: skip
    out = out.unflatten(2, (heads, dim))
    return out if some is None else torch.where(some, out, 0.0)


def _padding(mask: Tensor, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is added to the scores [B, 1, N, N] for a mask [B, N], and which queries see a key,
    [B, N, 1, 1]."""
    shown = mask != 0
    length = mask.shape[1]
    bias = torch.where(shown, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None, :]
    seen = shown.to(torch.int64).cumsum(1)
    if window:
        before = torch.arange(length, device=mask.device) - window
        earlier = seen.index_select(1, before.clamp(min=0))
        seen = seen - torch.where(before >= 0, earlier, 0)
    return bias.expand(-1, -1, length, -1), (seen > 0)[:, :, None, None]
