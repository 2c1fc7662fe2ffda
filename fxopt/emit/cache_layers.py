"""The state of one attention behind the interface of a layer of `transformers.Cache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fxopt.ir.errors import FxoptError
from fxopt.kernels.decode_topk.reference import TILE
from fxopt.kernels.kv_attention.filled import fill
from fxopt.kernels.kv_attention.layout import (
    CHOICE,
    RANGES,
    Blocks,
    allocate,
    parse,
    split_state,
    state_shapes,
)

from .pool import Pool, schedule

Spec = tuple[int, int, int, str]
"""(num_kv_heads, head_dim, value_dim, layout) of one layer."""


class Length:
    """Tokens in the cache: `start` for the graph, `value` for Python; `capacity` is the room.
    `version` changes with it and when tensors of the cache become others."""

    def __init__(self, capacity: int, device: torch.device | str | None) -> None:
        self.start = torch.zeros((), dtype=torch.int64, device=device)
        self.value = 0
        self.capacity = capacity
        self.version = 0

    def set(self, value: int) -> None:
        self.value = value
        self.start.fill_(value)


class CacheLayer(CacheLayerMixin):
    """One layer's state; its length is the whole cache's, and so are the tables of its pages."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self, spec: Spec, batch: int, dtype: torch.dtype, length: Length, pool: Pool | None = None
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim, self.value_dim, self.layout = spec
        self.dtype, self.length, self.pool = dtype, length, pool
        self.device = length.start.device
        self.state = self._empty(batch)
        self.batch_size = batch
        self.is_initialized = True

    def __getstate__(self) -> dict[str, Any]:
        """e4m3 numbers as bytes, since `pickle` refuses a tensor of them."""
        floats = [i for i, x in enumerate(self.state) if x.dtype == torch.float8_e4m3fn]
        state = [x.view(torch.uint8) if i in floats else x for i, x in enumerate(self.state)]
        return {**self.__dict__, "state": state, "floats": floats}

    def __setstate__(self, found: dict[str, Any]) -> None:
        floats = found.pop("floats")
        vars(self).update(found)
        for i in floats:
            self.state[i] = self.state[i].view(torch.float8_e4m3fn)

    def _empty(self, batch: int) -> list[Tensor]:
        state = allocate(
            parse(self.layout), batch, self.num_kv_heads, self.head_dim, self.value_dim,
            self.length.capacity, self.dtype, self.device,
            pool_tokens=self.pool.tokens if self.pool else None,
        )  # fmt: skip
        return self._with_tables(state)

    def _with_tables(self, state: list[Tensor]) -> list[Tensor]:
        """`state` with the tables of the pool, which all layers share."""
        if self.pool is None:
            return state
        classes = split_state(parse(self.layout), self.num_kv_heads, state)
        return [
            self.pool.tables[schedule(fmt)].table if fmt and name == "table" else tensor
            for _, fmt, part in classes
            for name, tensor in part.items()
        ]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state was allocated with the layer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise FxoptError(
            "fxopt.Cache.update: an fxopt cache is written by the rewritten module it was made "
            "for; pass it as past_key_values to that module, and a DynamicCache to other models"
        )

    def get_seq_length(self) -> int:
        return self.length.value

    def get_max_length(self) -> int:
        return self.length.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length.value + query_length, 0

    def _packed(self) -> list[tuple[Blocks, dict[str, Tensor]]]:
        classes = split_state(parse(self.layout), self.num_kv_heads, self.state)
        return [(fmt, part) for _, fmt, part in classes if fmt is not None]

    def _of_rows(self) -> list[tuple[int, Tensor, int]]:
        """(place in the state, tensor, used) of what each row of the batch has for itself; `used`
        counts along dimension 2."""
        found: list[tuple[int, Tensor, int]] = []
        place = -1
        for _, fmt, part in split_state(parse(self.layout), self.num_kv_heads, self.state):
            paged = "table" in part
            blocks = int((part["block_start"].diff() > 0).sum()) if fmt and not paged else 0
            for name, tensor in part.items():
                place += 1
                if name in ("block_start", "table") or (paged and tensor.dim() == 5):
                    continue
                if fmt is None and name not in CHOICE:
                    used = self.length.value // (TILE if name in RANGES else 1)
                else:
                    used = blocks if tensor.dim() == 5 else tensor.shape[2]
                found.append((place, tensor, used))
        return found

    def _choices(self) -> list[Tensor]:
        """`chosen_at` of each class that keeps which tiles are read."""
        classes = split_state(parse(self.layout), self.num_kv_heads, self.state)
        return [part[CHOICE[1]] for _, _, part in classes if CHOICE[1] in part]

    def reset(self) -> None:
        for _, part in self._packed():
            part["block_start"].zero_()
        for chosen_at in self._choices():
            chosen_at.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows taken from `beam_idx`, in place and only as far as they are used."""
        index = beam_idx.to(self.device)
        for _, tensor, used in self._of_rows():
            filled = tensor[:, :, :used]
            filled.copy_(filled.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_size, device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        index = indices.to(self.device)
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        for place, tensor, _ in self._of_rows():
            with torch.inference_mode(False):
                self.state[place] = tensor.index_select(0, index.clone())
        self.state[:] = self._with_tables(self.state)
        self.batch_size = index.numel()
        self.length.version += 1

    def truncate(self, length: int) -> None:
        """Forget packed tokens from position `length` on; a cut block keeps its own length. What
        one of them chose is chosen anew."""
        for fmt, part in self._packed():
            part["block_start"].clamp_(max=max(0, length - fmt.sink))
        for chosen_at in self._choices():
            chosen_at.masked_fill_(chosen_at[..., :1] >= length, 0)
        self.reserve(self.length.capacity)

    def widen(self) -> None:
        """Take the pool's tables as they are now, with starts for as many blocks."""
        state: list[Tensor] = []
        tables = self._with_tables(self.state)
        for _, _, part in split_state(parse(self.layout), self.num_kv_heads, tables):
            if "table" in part:
                entries = part["table"].shape[1] + 1
                part["block_start"] = self._grown("block_start", part["block_start"], [entries])
            state += part.values()
        self._replace(state)

    def reserve(self, capacity: int) -> None:
        """Grow to `capacity` tokens, and to the blocks that short ones cost beside it."""
        self.widen()
        state: list[Tensor] = []
        layout = parse(self.layout)
        classes = split_state(layout, self.num_kv_heads, self.state)
        for (heads, fmt, part), entry in zip(classes, layout.classes, strict=True):
            shapes = state_shapes(
                fmt, self.batch_size, len(heads), self.head_dim, self.value_dim,
                capacity, self.dtype, entry.top_keys, entry.refresh,
            )  # fmt: skip
            extra, paged = 0, "table" in part
            if fmt is not None and not paged:
                starts = part["block_start"]
                extra = int((starts.diff() > 0).sum()) - int(starts[-1]) // fmt.group
            for name, tensor in part.items():
                if paged and tensor.dim() != 4:
                    state.append(tensor)
                    continue
                shape = list(shapes[name][0])
                if tensor.dim() in (1, 5):
                    shape[0 if tensor.dim() == 1 else 2] += extra
                state.append(self._grown(name, tensor, shape))
        self._replace(state)

    def _replace(self, state: list[Tensor]) -> None:
        if any(new is not old for new, old in zip(state, self.state, strict=True)):
            self.length.version += 1
        self.state[:] = state

    def _grown(self, name: str, tensor: Tensor, shape: list[int]) -> Tensor:
        dim = 0 if tensor.dim() == 1 else 2
        old = tensor.shape[dim]
        if shape[dim] <= old:
            return tensor
        with torch.inference_mode(False):
            grown = tensor.new_zeros(shape)
        # A ring that can still grow never wrapped, so every token keeps its place.
        grown.narrow(dim, 0, old).copy_(tensor)
        if name == "block_start":
            grown[old:] = tensor[-1]
        return grown


class FilledLayer(CacheLayer):
    """Keys and values of another sequence, of the encoder's result: stored whole, then read.

    Its `state` is empty until `fill`, and its length has nothing to do with the cache's.
    """

    def _empty(self, batch: int) -> list[Tensor]:
        return []

    def fill(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Store k [B, KV, T, D] and v [B, KV, T, Dv], packed once as the layout says."""
        with torch.inference_mode(False), torch.no_grad():
            self.state = fill(k, v, mask, self.layout)
        self.batch_size = k.shape[0]

    def reset(self) -> None:
        self.state = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows taken from `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        index = indices.to(self.device)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        with torch.inference_mode(False):
            self.state = [tensor.index_select(0, index.clone()) for tensor in self.state]
        self.batch_size = index.numel()

    def truncate(self, length: int) -> None:
        """Nothing to do: these tokens are not those that were generated."""

    def widen(self) -> None:
        """Nothing to do: no table is read."""

    def reserve(self, capacity: int) -> None:
        """Nothing to do: nothing is appended."""
