"""A cache that stores exactly and returns what packed storage would give back.

Written from the schedule alone, with bit patterns and loops, so that it shares nothing with the
code under test: the original model with this cache says what a packed cache has to produce.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def bfloat16_below(x: Tensor) -> Tensor:
    """The nearest bfloat16 at or below each number, by its bits, in the dtype of `wide(x)`."""
    single = x.float().contiguous()
    lower = torch.nextafter(single, torch.tensor(-torch.inf))
    bits = torch.where(single.to(x.dtype) > x, lower, single).view(torch.int32)
    low = bits & 0xFFFF
    toward_zero = bits - low
    away = toward_zero + 0x10000
    exact = low == 0
    return wide(torch.where(exact | (bits >= 0), toward_zero, away).view(torch.float32).to(x.dtype))


def bfloat16_above(x: Tensor) -> Tensor:
    return -bfloat16_below(-x)


E4M3 = torch.tensor([m / 8 * 2.0**-6 for m in range(8)] + [
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)
][:-1], dtype=torch.float64)  # fmt: skip
"""What can be stored of either sign, by the byte."""


def nearest_e4m3(x: Tensor) -> Tensor:
    """The nearest number of `E4M3`, of two the one of the even byte; `x` is at most 448."""
    size, between = x.abs().double(), (E4M3[1:] + E4M3[:-1]) / 2
    below = torch.bucketize(size, between)
    tie = size == between[below.clamp(max=len(between) - 1)]
    return (E4M3[below + (tie & (below % 2 == 1))] * x.sign()).to(x.dtype)


def fake_quantize(x: Tensor, valid: Tensor, bits: int | str, dim: int) -> Tensor:
    """`x` [..., tokens, channels] through `bits`-bit integers that share a range along `dim`, or
    through e4m3 numbers ("f8"), about the middle of the range along tokens; `valid` is broadcast.
    """
    exact = wide(x)
    valid = valid.expand_as(exact)
    low = torch.where(valid, exact, torch.inf).amin(dim, keepdim=True)
    high = torch.where(valid, exact, -torch.inf).amax(dim, keepdim=True)
    some = valid.any(dim, keepdim=True)
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    if isinstance(bits, str):
        zero = bfloat16_below((low + high) / 2) if dim == x.dim() - 2 else torch.zeros_like(low)
        scale = bfloat16_above(torch.maximum(high - zero, zero - low) / 448)
        q = torch.where(scale > 0, (exact - zero) / scale, 0.0).clamp(-448, 448)
        return (nearest_e4m3(q) * scale + zero).to(x.dtype)
    levels = 2**bits - 1
    zero = bfloat16_below(low)
    scale = bfloat16_above((high - zero) / levels)
    q = torch.where(scale > 0, ((exact - zero) / scale).round(), 0.0)
    return (q.clamp(0, levels) * scale + zero).to(x.dtype)


def parse(text: str, heads: int) -> list[Any]:
    """(K bits, V bits, group, residual, sink) of each KV head; None is exact."""
    found: dict[int, Any] = {}
    for part in text.split("|"):
        chosen, _, spelled = part.rpartition(":")
        numbers = re.fullmatch(r"k(f8|\d+)v(f8|\d+)g(\d+)r(\d+)s(\d+)", spelled)
        values = tuple(x if x == "f8" else int(x) for x in numbers.groups()) if numbers else None
        for head in map(int, chosen.split(",")) if chosen else range(heads):
            found[head] = values
    return [found[head] for head in range(heads)]


class FakeQuantizedLayer(DynamicLayer):
    """Exact keys and values, and beside them the images of what would be packed by now."""

    def __init__(self, layout: str, mask: Tensor | None) -> None:
        super().__init__()
        self.layout, self.mask = layout, mask
        self.packed: dict[int, int] = {}
        self.images: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        before = self.get_seq_length()
        keys, values = super().update(key_states, value_states)
        seen = [keys.clone(), values.clone()]
        if self.images is not None:
            for image, side in zip(self.images, seen, strict=True):
                side[:, :, :before] = image
        if self.layout:
            new = (key_states, value_states)
            stored = [torch.cat([seen[i][:, :, :before], new[i]], 2) for i in range(2)]
            for head, fmt in enumerate(parse(self.layout, keys.shape[1])):
                if fmt is not None:
                    self._pack(head, fmt, (keys, values), stored)
            self.images = (stored[0], stored[1])
        return seen[0], seen[1]

    def _pack(self, head: int, fmt: Any, exact: tuple[Tensor, Tensor],
              stored: list[Tensor]) -> None:  # fmt: skip
        key_bits, value_bits, group, residual, sink = fmt
        length = exact[0].shape[2]
        done = self.packed.get(head, 0)
        target = max(done, (length - sink - residual) // group * group)
        while done < target:
            end = (done // group + 1) * group
            span = slice(sink + done, sink + end)
            valid = self._valid(exact[0].shape[0], span)
            for side, bits, dim in ((0, key_bits, 1), (1, value_bits, 2)):
                if bits != 16:
                    image = fake_quantize(exact[side][:, head, span], valid, bits, dim)
                    stored[side][:, head, span] = image
            done = end
        self.packed[head] = done

    def on_a_tie(self, noise: float) -> tuple[Tensor, Tensor]:
        """Which packed keys and values would be stored otherwise, had all moved by +-`noise`."""
        sides = self.keys, self.values
        found = [torch.zeros_like(x, dtype=torch.bool) for x in sides]
        for head, fmt in enumerate(parse(self.layout, self.keys.shape[1])):
            group, sink = (fmt[2], fmt[4]) if fmt else (1, 0)
            for begin in range(sink, sink + self.packed.get(head, 0), group):
                span = slice(begin, begin + group)
                valid = self._valid(self.keys.shape[0], span)
                for x, ties, bits, dim in zip(sides, found, fmt or (), (1, 2), strict=False):
                    image, *moved = (
                        fake_quantize(x[:, head, span] + shift, valid, bits, dim)
                        for shift in (0.0, noise, -noise)
                    )
                    ties[:, head, span] = (moved[0] != image) | (moved[1] != image)
        return found[0], found[1]

    def _valid(self, batch: int, span: slice) -> Tensor:
        """Which tokens are no padding, [B, tokens, 1]; beams share the rows of their prompt."""
        valid = torch.ones(batch, span.stop - span.start, dtype=torch.bool)
        if self.mask is not None:
            mask = self.mask.repeat_interleave(batch // self.mask.shape[0], 0)
            known = mask[:, span.start : span.stop] != 0
            valid[:, : known.shape[1]] = known
        return valid[..., None]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        if self.images is not None:
            self.images = (self.images[0][:, :, :length], self.images[1][:, :, :length])
        for head, fmt in enumerate(parse(self.layout, len(self.packed))):
            if fmt is not None:
                self.packed[head] = min(self.packed[head], max(0, length - fmt[4]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.images is not None:
            self.images = (self.images[0][beam_idx], self.images[1][beam_idx])


class FakeQuantizedCache(Cache):
    """For the original model: `past_key_values=FakeQuantizedCache(layout, num_layers)`.

    `mask` [B, prompt] is the padding mask of the prompt, which a cache layer is never told.
    `layout` may be one text for all layers or one a layer.
    """

    def __init__(self, layout: str | list[str], num_layers: int, mask: Tensor | None = None):
        layouts = [layout] * num_layers if isinstance(layout, str) else layout
        super().__init__(layers=[FakeQuantizedLayer(text, mask) for text in layouts])
