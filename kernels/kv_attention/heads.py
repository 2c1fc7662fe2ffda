"""One attention call as calls over head classes, each with the keys its storage gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Arguments:
    """What `fxopt.ir.ops.attend` takes beside keys, values and mask; shapes as there. `top_keys`
    and `refresh` are those of the layout."""

    q: Tensor
    bias: Tensor | None
    sinks: Tensor | None
    scale: float
    causal: bool
    window: Sequence[int]
    softcap: float
    sink_tokens: Sequence[int]
    top: Sequence[int] = (0,)
    delta: Sequence[int] = (0,)
    top_keys: Sequence[int] = (0,)
    hip: Sequence[int] = (0,)
    mass: Sequence[int] = (0,)
    skip: Sequence[int] = (0,)
    refresh: Sequence[int] = (1,)

    def past_prompt(self, num_kv_heads: int) -> Arguments:
        """What decoded tokens get: all keys in heads that keep or leave out tiles or are
        corrected."""
        if not any((*self.top, *self.delta, *self.skip)):
            return self
        group = self.q.shape[1] // num_kv_heads
        delta = list(self.delta) * (self.q.shape[1] // len(self.delta))
        fixed = [any(delta[h * group : (h + 1) * group]) for h in range(num_kv_heads)]
        window = list(self.window) * (num_kv_heads // len(self.window))
        window = [0 if alters else w for w, alters in zip(window, fixed, strict=True)]
        none = dict.fromkeys(("top", "delta", "hip", "mass", "skip"), (0,))
        return replace(self, window=window, **none)

    def select(self, heads: Sequence[int], num_kv_heads: int) -> Arguments:
        """The arguments of the query heads that read the KV heads `heads`."""
        if list(heads) == list(range(num_kv_heads)):
            return self
        group = self.q.shape[1] // num_kv_heads
        bias = self.bias
        if bias is not None and bias.shape[1] > 1:
            bias = take(bias, heads, 1, group)
        return Arguments(
            take(self.q, heads, 1, group),
            bias,
            None if self.sinks is None else take(self.sinks, heads, 0, group),
            self.scale,
            self.causal,
            _of_heads(self.window, heads),
            self.softcap,
            _of_heads(self.sink_tokens, heads),
            _of_heads(self.top, heads),
            _of_queries(self.delta, heads, group),
            _of_heads(self.top_keys, heads),
            _of_heads(self.hip, heads),
            _of_heads(self.mass, heads),
            _of_queries(self.skip, heads, group),
            _of_heads(self.refresh, heads),
        )

    def attend(self, attention: Attend, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(
            self.q, k, v, mask, self.bias, self.sinks,
            self.scale, self.causal, list(self.window), self.softcap, list(self.sink_tokens),
            list(self.top), list(self.delta), hip=list(self.hip), mass=list(self.mass),
            skip=list(self.skip),
        )  # fmt: skip


def _of_heads(values: Sequence[int], heads: Sequence[int]) -> Sequence[int]:
    return [values[h] for h in heads] if len(values) > 1 else values


def _of_queries(values: Sequence[int], heads: Sequence[int], group: int) -> Sequence[int]:
    """Those of the query heads that read the KV heads `heads`."""
    return [values[h * group + i] for h in heads for i in range(group)] if values[1:] else values


def take(x: Tensor, heads: Sequence[int], dim: int, group: int = 1) -> Tensor:
    """The slices of `dim` that belong to `heads`, `group` of them a head."""
    if len(heads) * group == x.shape[dim] and list(heads) == sorted(heads):
        return x
    return torch.cat([x.narrow(dim, head * group, group) for head in heads], dim)


def merge(outputs: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> Tensor:
    """Outputs [B, N, heads of the class, Dv] of the classes, in the order of the heads."""
    if len(outputs) == 1:
        return outputs[0]
    group = outputs[0].shape[2] // len(classes[0])
    found = {
        head: out.narrow(2, place * group, group)
        for out, heads in zip(outputs, classes, strict=True)
        for place, head in enumerate(heads)
    }
    return torch.cat([found[head] for head in sorted(found)], 2)


def block_mask(mask: Tensor | None, start: int, blocks: int, group: int) -> Tensor | None:
    """Which tokens of `blocks` blocks from position `start` count, as [B, 1, blocks, group, 1]."""
    if mask is None:
        return None
    tokens = mask.narrow(1, start, blocks * group) != 0
    return tokens.reshape(mask.shape[0], 1, blocks, group, 1)
