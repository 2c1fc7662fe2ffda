"""How much of its attention a query keeps where keys are hidden from it.

With S the keys that are left, o - o_S = tau * (mu_tail - mu_S), where tau = 1 - exp(lse_S - lse) is
what fell on the others: no output of attention changes by more than tau times how far values lie
apart (Lemma of arXiv 2512.07647).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.attention.spec import per_head
from fxopt.kernels.attention.tiles import Tile, explicit, masked_scores


def kept(inputs: Mapping[str, Any], rows: Tensor, visible: Tensor) -> Tensor:
    """exp(lse_S - lse) of the queries `rows` [R] of the call `inputs`: [B, H, R] in 0 to 1.

    `visible` [B or 1, H or 1, R, T] are the keys that are not hidden, among them such as the call
    itself hides. Takes the scores of R queries alone.
    """
    own = seen(inputs, rows, inputs.get("window", (0,)), inputs.get("sink_tokens", (0,)))
    whole, left = (_lse(inputs, rows, keys) for keys in (own, own & visible))
    return (left - whole).exp().nan_to_num(1.0)


def seen(
    inputs: Mapping[str, Any], rows: Tensor, window: Sequence[int], sink_tokens: Sequence[int],
    dilation: int = 1,
) -> Tensor:  # fmt: skip
    """Which keys the queries `rows` [R] see under windows, `dilation` of these, and sinks as in
    `attend`, and what the call itself says of padding and order: bool [B or 1, H, R, T]."""
    q, k, mask = inputs["q"], inputs["k"], inputs.get("mask")
    (heads, queries), (kv, keys) = q.shape[1:3], k.shape[1:3]
    columns = torch.arange(keys, device=k.device)
    unmasked = torch.ones_like(columns)[None] if mask is None else mask != 0
    rank = unmasked.cumsum(1)[:, None, None]
    distance = (rows + keys - queries)[:, None] - columns
    found: list[Tensor] = []
    for width, sinks in zip(
        per_head("window", window, kv), per_head("sink_tokens", sink_tokens, kv), strict=True
    ):
        each = dilation if width < max(queries, keys) else 1
        near = (distance.abs() < width * each) & (distance % each == 0)
        near = near | (rank <= sinks) if width else distance == distance
        near = near & (unmasked != 0)[:, None, None]
        found.append(near & (distance >= 0) if inputs.get("causal") else near)
    return torch.cat(found, 1).repeat_interleave(heads // kv, 1)


def scores(inputs: Mapping[str, Any], rows: Tensor, visible: Tensor) -> Tensor:
    """What softmax takes of the queries `rows` [R], -inf for keys that are not `visible`:
    [B, H, R, T], in float32 at least."""
    return masked_scores(_part(inputs, rows, visible))


def _lse(inputs: Mapping[str, Any], rows: Tensor, visible: Tensor) -> Tensor:
    return explicit(_part(inputs, rows, visible))[1]


def _part(inputs: Mapping[str, Any], rows: Tensor, visible: Tensor) -> Tile:
    bias = inputs.get("bias")
    if bias is not None and bias.shape[2] > 1:
        bias = bias.index_select(2, rows)
    q, scale, softcap = inputs["q"], inputs["scale"], inputs.get("softcap", 0.0)
    # the output is not looked at: one channel of the values makes it small
    v = inputs["v"][..., :1]
    return Tile(
        q.index_select(2, rows), inputs["k"], v, visible, bias, inputs.get("sinks"), scale, softcap
    )
