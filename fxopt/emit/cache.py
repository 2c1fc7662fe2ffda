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
from fxopt.kernels.kv_attention.layout import parse

from .cache_layers import CacheLayer, FilledLayer, Length, Spec
from .pool import Pool


class Cache(HFCache):
    """Keys and values of all layers of a rewritten model; `fxopt.Cache`.

    Made by the module (`generate` does), or by `Cache.allocate`. It holds the state of one batch
    of sequences: `states[i]` are the tensors of layer i, `start` the number of tokens as a 0-d
    int64 tensor on their device. Of an encoder-decoder model it also holds the keys and values
    that cross-attention reads, each stored once (`fill`). Use `fork()` for a copy that continues
    on its own. `cropped` says that more than the newest token was ever cut off.

    With a `pool` packed blocks lie on pages that rows take as they grow and share where they go on
    from the same tokens (`reorder_cache`, `batch_repeat_interleave`). A crop gives pages back, and
    so do rows that `batch_select_indices` leaves out.
    """

    layers: list[CacheLayer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, layers: list[CacheLayer], length: Length, pool: Pool | None = None) -> None:
        super().__init__(layers=list(layers))
        self.length = length
        self.pool = pool
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
        pool_tokens: int | None = None,
    ) -> Cache:
        """An empty cache of `capacity` tokens for `batch` sequences.

        specs: (num_kv_heads, head_dim, value_dim, layout) of each layer; `cross` are the indices
        of those that are filled once. With `pool_tokens` packed blocks lie on pages, enough for so
        many tokens of all sequences together, padding not counted and shared ones once. FxoptError
        where nothing is packed.
        """
        kinds = [FilledLayer if i in cross else CacheLayer for i in range(len(specs))]
        # A cache made in inference mode may be continued outside of it.
        with torch.inference_mode(False):
            length, pool = Length(capacity, device), None
            if pool_tokens is not None:
                own = [spec for i, spec in enumerate(specs) if i not in cross]
                formats = [fmt for heads, *_, text in own for _, fmt in parse(text).resolve(heads)]
                packed = [fmt for fmt in formats if fmt is not None]
                pool = Pool(packed, batch, pool_tokens, capacity, device)
            layers = zip(kinds, specs, strict=True)
            made = [kind(spec, batch, dtype, length, pool) for kind, spec in layers]
            return cls(made, length, pool)

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
        """Bytes of all state tensors as allocated; layers share their tables."""
        found = {id(tensor): tensor.nbytes for state in self.states for tensor in state}
        return sum(found.values())

    @property
    def free_tokens(self) -> int | None:
        """Tokens for which the pool has free pages; None without a pool."""
        return self.pool.free_tokens if self.pool else None

    def require(self, new_tokens: int, mask: Tensor | None = None) -> None:
        """Raise unless `new_tokens` more fit. With a pool, before each call: what the call packs
        gets its pages, where `mask` [batch, held + new_tokens] hides all of it none of its own."""
        self._check_room(new_tokens)
        if self.pool:
            self.pool.take(self.length.value, self.length.value + new_tokens, mask)

    def _check_room(self, new_tokens: int) -> None:
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
        if self.pool:
            self.pool.reserve(capacity)
            # All of them before any grows: memory may not be enough for the last.
            for layer in self.layers:
                layer.widen()
        for layer in self.layers:
            layer.reserve(capacity)
        self.length.capacity = capacity
        self.length.version += 1

    def advance(self, new_tokens: int) -> None:
        """Count tokens that the graph has appended."""
        self._check_room(new_tokens)
        if self.pool:
            self.pool.advance(self.length.value + new_tokens)
        self.length.value += new_tokens
        self.length.start += new_tokens

    def reset(self) -> None:
        super().reset()
        self.length.set(0)
        if self.pool:
            self.pool.truncate(0, self.capacity)
        self.cropped = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens; a positive number is the length to keep."""
        old = self.length.value
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding counts in tensors
        length = old + tokens_to_remove if tokens_to_remove <= 0 else min(old, tokens_to_remove)
        if length == old:
            return
        self.cropped |= old - length > 1
        self.length.set(max(0, length))
        if self.pool:
            self.pool.truncate(self.length.value, self.capacity)
        for layer in self.layers:
            layer.truncate(self.length.value)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rows taken from `beam_idx`, in place; of a pool they share the pages of packed blocks,
        which are not copied."""
        self._select_pages(beam_idx)
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_pages(torch.arange(self.batch_size).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_pages(indices)
        super().batch_select_indices(indices)

    def _select_pages(self, indices: Tensor) -> None:
        if self.pool:
            self.pool.select(indices)

    def fork(self) -> Cache:
        """A deep copy: both continue from here without seeing each other."""
        return copy.deepcopy(self)


def usable(
    cache: Any, owner: str, layouts: Sequence[str], new_tokens: int, mask: Tensor | None = None
) -> Cache:
    """`cache` with room for `new_tokens` more, which `mask` [batch, all] may hide; FxoptError
    unless it is one of ours with `layouts`, which `owner` reads."""
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
    cache.require(new_tokens, mask)
    return cache
