"""The cache of a rewritten model: packed blocks behind the interface of `transformers.Cache`.

The graph writes its tensors in place, so nothing here runs inside a forward pass: capacity is
allocated before, lengths are one tensor and its mirror in Python.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache as HFCache

from fxopt.ir.errors import FxoptError

from .cache_layers import CacheLayer, FilledLayer, Length, Spec


class Cache(HFCache):
    """Keys and values of all layers of a rewritten model; `fxopt.Cache`.

    Made by the module (`generate` does), or by `Cache.allocate`. It holds the state of one batch
    of sequences: `states[i]` are the tensors of layer i, `start` the number of tokens as a 0-d
    int64 tensor on their device. Of an encoder-decoder model it also holds the keys and values
    that cross-attention reads, each stored once (`fill`). Use `fork()` for a copy that continues
    on its own. `cropped` says that more than the newest token was ever cut off.
    """

    layers: list[CacheLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, layers: list[CacheLayer], length: Length) -> None:
        super().__init__(layers=list(layers))
        self.length = length
        self.cropped = False

    @classmethod
    def allocate(
        cls,
        specs: Sequence[Spec],
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        cross: Collection[int] = (),
    ) -> Cache:
        """An empty cache of `capacity` tokens for `batch` sequences.

        specs: (num_kv_heads, head_dim, value_dim, layout) of each layer; `cross` are the indices
        of those that are filled once.
        """
        kinds = [FilledLayer if i in cross else CacheLayer for i in range(len(specs))]
        # A cache made in inference mode may be continued outside of it.
        with torch.inference_mode(False):
            length = Length(capacity, device)
            layers = zip(kinds, specs, strict=True)
            return cls([kind(spec, batch, dtype, length) for kind, spec in layers], length)

    @property
    def filled(self) -> bool:
        """Whether what cross-attention reads is there."""
        return all(layer.state for layer in self._cross)

    @property
    def _cross(self) -> list[FilledLayer]:
        return [layer for layer in self.layers if isinstance(layer, FilledLayer)]

    def fill(self, tensors: Sequence[Tensor], mask: Tensor | None) -> None:
        """Store k and v of each cross-attention in turn; mask [B, T] is nonzero where a token
        is no padding."""
        for layer, k, v in zip(self._cross, tensors[::2], tensors[1::2], strict=True):
            layer.fill(k, v, mask)

    @property
    def states(self) -> list[list[Tensor]]:
        return [layer.state for layer in self.layers]

    @property
    def start(self) -> Tensor:
        return self.length.start

    @property
    def capacity(self) -> int:
        return self.length.capacity

    @property
    def layouts(self) -> list[str]:
        return [layer.layout for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors as allocated."""
        return sum(tensor.nbytes for state in self.states for tensor in state)

    def require(self, new_tokens: int) -> None:
        """Raise unless `new_tokens` more fit."""
        needed = self.length.value + new_tokens
        if needed > self.capacity:
            raise FxoptError(
                f"fxopt.Cache holds {self.length.value} of {self.capacity} tokens and "
                f"{new_tokens} more are coming; call cache.reserve({needed}) before the model"
            )

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in all; what is there stays. Never inside a forward."""
        if capacity <= self.capacity:
            return
        for layer in self.layers:
            layer.reserve(capacity)
        self.length.capacity = capacity
        self.length.version += 1

    def advance(self, new_tokens: int) -> None:
        """Count tokens that the graph has appended."""
        self.require(new_tokens)
        self.length.value += new_tokens
        self.length.start += new_tokens

    def reset(self) -> None:
        super().reset()
        self.length.set(0)
        self.cropped = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens; a positive number is the length to keep."""
        old = self.length.value
        length = old + tokens_to_remove if tokens_to_remove <= 0 else min(old, tokens_to_remove)
        if length == old:
            return
        self.cropped |= old - length > 1
        self.length.set(max(0, length))
        for layer in self.layers:
            layer.truncate(self.length.value)

    def fork(self) -> Cache:
        """A deep copy: both continue from here without seeing each other."""
        return copy.deepcopy(self)


def usable(cache: Any, owner: str, layouts: Sequence[str], new_tokens: int) -> Cache:
    """`cache` with room for `new_tokens` more; FxoptError unless it is one of ours with `layouts`,
    which `owner` reads."""
    if not isinstance(cache, Cache):
        raise FxoptError(
            f"past_key_values: {owner} was optimised and reads fxopt.Cache, got "
            f"{type(cache).__name__}; leave it out, or make one with "
            "module.make_cache(batch, capacity)"
        )
    if cache.layouts != list(layouts):
        raise FxoptError(
            "past_key_values: this cache was made for another plan, whose layers store keys "
            "and values differently; make one with module.make_cache(batch, capacity)"
        )
    needed = cache.get_seq_length() + new_tokens
    if needed > cache.capacity and not torch.compiler.is_compiling():
        cache.reserve(max(needed, cache.capacity + cache.capacity // 2))
    cache.require(new_tokens)
    return cache
