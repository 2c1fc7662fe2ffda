"""How a layer's cache stores keys and values, as a text that ops and plans carry.

    ""                                 every KV head exactly
    "k4v4g64r64s4"                     every KV head: 4-bit K and V, groups of 64 tokens,
                                       a residual of 64 tokens and 4 sink tokens kept exactly
    "0,2:k4v4g64r64s4|1,3:exact"       heads 0 and 2 packed, heads 1 and 3 exact
    "k8vf8g128r64s4"                   8-bit integers as keys and e4m3 numbers as values
    "k4v4g64r64s4+t4096"               a token that is decoded reads, of the packed ones, blocks of
                                       4096 tokens: those of the most estimated attention
    "exact+t4096/8"                    the same of exact ones, chosen by each 8th token

Keys are quantised per channel over the tokens of a block, values per token over the channels of
the head (KIVI, arXiv 2402.02750); only what is read back later is quantised (WKVQuant,
arXiv 2402.12065).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxopt.kernels.decode_topk.reference import TILE, grown, tiles_read

from .packing import FLOAT8, Bits, has_zero, width

BITS: tuple[Bits, ...] = (16, 8, FLOAT8, 4, 2)
GROUPS = (32, 64, 128)
_FORMAT = re.compile(r"k(\d+|f8)v(\d+|f8)g(\d+)r(\d+)s(\d+)")
RANGES = ("key_low", "key_high")
"""Of the keys of each whole tile that is stored exactly: the least and the largest of a channel."""
CHOICE = ("choice", "chosen_at")
"""Which tiles are read until others are chosen, and of which token that is."""
FIXED = ("block_start", "table", *RANGES, *CHOICE)
"""Tensors that a state has only where its size is reserved."""
FLOAT = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Blocks:
    """Packed storage: a block holds `group` tokens and is packed once.

    16 bits on one side keep that side in the model's dtype, "f8" stores e4m3 numbers. The newest
    `residual` tokens and the first `sink` positions are never packed.
    """

    key_bits: Bits
    value_bits: Bits
    group: int
    residual: int
    sink: int

    def __post_init__(self) -> None:
        for name, value in (("K", self.key_bits), ("V", self.value_bits)):
            if value not in BITS:
                raise ValueError(f"{name} bits must be one of {BITS}, got {value}")
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS} tokens, got {self.group}")

    def __str__(self) -> str:
        return f"k{self.key_bits}v{self.value_bits}g{self.group}r{self.residual}s{self.sink}"

    def refusal(self, head_dim: int) -> str | None:
        """Why keys of this size cannot be packed; None if they can. Values always can: they are
        packed along the tokens of a block, which every width divides."""
        bits = width(self.key_bits)
        if bits < 16 and head_dim % (8 // bits):
            return f"{bits}-bit K needs channels divisible by {8 // bits}, got {head_dim}"
        return None

    def bits(self, side: str) -> Bits:
        """Those of "key" or "value"."""
        return self.key_bits if side == "key" else self.value_bits

    def packed(self, length: int) -> int:
        """Tokens that are packed once `length` tokens have been seen without any crop."""
        return max(0, (length - self.sink - self.residual) // self.group) * self.group

    def pages(self, batch: int, pool_tokens: int) -> int:
        """Pages that hold `pool_tokens` of all rows together, padding not counted, however they
        are divided: the first block of a row may be of fewer tokens, behind padding. One more is
        of blocks that are nothing but padding."""
        return pool_tokens // self.group + batch + 1


@dataclass(frozen=True)
class HeadClass:
    """KV heads stored and read alike; no heads means all of them, no format means exactly.

    `top_keys` are as many tokens as a decoded one reads of whole tiles, which are packed blocks or
    `TILE` tokens that are stored exactly (`kernels/decode_topk/`); 0: all. They are chosen for
    `refresh` tokens at a time.
    """

    heads: tuple[int, ...] = ()
    format: Blocks | None = None
    top_keys: int = 0
    refresh: int = 1

    def __str__(self) -> str:
        text = "exact" if self.format is None else str(self.format)
        text += f"+t{self.top_keys}" if self.top_keys else ""
        text += f"/{self.refresh}" if self.top_keys and self.refresh > 1 else ""
        return f"{','.join(map(str, self.heads))}:{text}" if self.heads else text


@dataclass(frozen=True)
class Layout:
    """The head classes of one layer, in the order in which the state holds their tensors."""

    classes: tuple[HeadClass, ...] = (HeadClass(),)

    def __str__(self) -> str:
        return "" if self.exact else "|".join(map(str, self.classes))

    @property
    def exact(self) -> bool:
        """Whether all heads are stored exactly and read whole."""
        return all(entry.format is None and not entry.top_keys for entry in self.classes)

    @property
    def keeps_choices(self) -> bool:
        """Whether a head reads tiles that an earlier token chose."""
        return any(entry.top_keys and entry.refresh > 1 for entry in self.classes)

    def resolve(self, num_kv_heads: int) -> tuple[tuple[tuple[int, ...], Blocks | None], ...]:
        """(heads, format) of each class; ValueError unless each head is named exactly once."""
        every = tuple(range(num_kv_heads))
        resolved = tuple((entry.heads or every, entry.format) for entry in self.classes)
        named = sorted(head for heads, _ in resolved for head in heads)
        if named != list(every):
            raise ValueError(
                f"layout '{self}' names KV heads {named}, the layer has {num_kv_heads} of them"
            )
        return resolved

    def formats(self, num_kv_heads: int) -> tuple[Blocks | None, ...]:
        """The format of each KV head."""
        found = {head: fmt for heads, fmt in self.resolve(num_kv_heads) for head in heads}
        return tuple(found[head] for head in range(num_kv_heads))

    def top_keys(self, num_kv_heads: int) -> tuple[int, ...]:
        """What each KV head reads in decoding, as of its class."""
        return tuple(entry.top_keys for entry in self._of_heads(num_kv_heads))

    def refresh(self, num_kv_heads: int) -> tuple[int, ...]:
        """For how many tokens each KV head keeps a choice, as of its class."""
        return tuple(entry.refresh for entry in self._of_heads(num_kv_heads))

    def _of_heads(self, num_kv_heads: int) -> list[HeadClass]:
        classes = zip(self.resolve(num_kv_heads), self.classes, strict=True)
        found = {head: entry for (heads, _), entry in classes for head in heads}
        return [found[head] for head in range(num_kv_heads)]


def tile_size(fmt: Blocks | None) -> int:
    """Tokens of a whole tile of what is stored in `fmt`."""
    return fmt.group if fmt else TILE


def first_choice(fmt: Blocks | None, prompt: int) -> int:
    """The position of the first token that can choose, of those that are decoded one by one behind
    a prompt of so many: the first one that finds a whole tile."""
    return max(prompt, fmt.sink + fmt.residual + fmt.group if fmt else TILE)


def left_out(fmt: Blocks | None, past: int, top_keys: int) -> int:
    """Whole tiles of `past` tokens that a decoded one does not read."""
    size = tile_size(fmt)
    whole = (fmt.packed(past) if fmt else past) // size
    return max(0, whole - tiles_read(top_keys, size)) if top_keys else 0


def to_bits(text: str | float) -> Bits:
    """What a label or a plan says of one side."""
    return FLOAT8 if text == FLOAT8 else int(text)


def parse_format(text: str) -> Blocks | None:
    """One format; "exact" (and 16 bits on both sides) is None."""
    if text == "exact":
        return None
    found = _FORMAT.fullmatch(text)
    if not found:
        raise ValueError(f"'{text}' is no cache format; write 'exact' or like 'k4v4g64r64s4'")
    key, value, *sizes = found.groups()
    blocks = Blocks(to_bits(key), to_bits(value), *map(int, sizes))
    return None if blocks.key_bits == blocks.value_bits == 16 else blocks


@lru_cache(maxsize=4096)
def parse(text: str) -> Layout:
    """The layout that `text` spells; ValueError with the part that cannot be read."""
    if not text:
        return Layout()
    classes: list[HeadClass] = []
    for part in text.split("|"):
        heads, separator, spelled = part.rpartition(":")
        if separator and not re.fullmatch(r"\d+(,\d+)*", heads):
            raise ValueError(f"'{heads}' in layout '{text}' is no list of KV heads like '0,2'")
        indices = tuple(int(head) for head in heads.split(",")) if separator else ()
        stored, chooses, read = spelled.partition("+t")
        top_keys, keeps, refresh = read.partition("/")
        for number in (top_keys,) * bool(chooses) + (refresh,) * bool(keeps):
            if not number.isdecimal():
                raise ValueError(f"'{number}' in layout '{text}' is no number of tokens")
        if keeps and not (int(top_keys) and int(refresh)):
            raise ValueError(f"layout '{text}' keeps a choice for 0 tokens, or of 0 tokens")
        fmt = parse_format(stored)
        classes.append(HeadClass(indices, fmt, int(top_keys or 0), int(refresh or 1)))
    return Layout(tuple(classes))


def from_formats(
    formats: Sequence[Blocks | None],
    top_keys: Sequence[int] | None = None,
    refresh: Sequence[int] | None = None,
) -> Layout:
    """The layout that stores KV head h in `formats[h]` and reads `top_keys[h]` tokens of it, chosen
    for `refresh[h]` tokens at a time, equal heads together."""
    found: dict[tuple[Blocks | None, int, int], list[int]] = {}
    count = len(formats)
    for head, choice in enumerate(
        zip(formats, top_keys or [0] * count, refresh or [1] * count, strict=True)
    ):
        found.setdefault(choice, []).append(head)
    if len(found) == 1:
        return Layout((HeadClass((), *next(iter(found))),))
    return Layout(tuple(HeadClass(tuple(heads), *choice) for choice, heads in found.items()))


def with_head(text: str, head: int, fmt: Blocks | None, num_kv_heads: int) -> str:
    """`text` with KV head `head` stored in `fmt`."""
    layout = parse(text)
    formats = list(layout.formats(num_kv_heads))
    formats[head] = fmt
    return str(from_formats(formats, layout.top_keys(num_kv_heads), layout.refresh(num_kv_heads)))


def with_top_keys(text: str, head: int, top_keys: int, num_kv_heads: int, refresh: int = 1) -> str:
    """`text` with `top_keys` tokens read of KV head `head`, chosen for `refresh` at a time."""
    layout = parse(text)
    chosen, kept = list(layout.top_keys(num_kv_heads)), list(layout.refresh(num_kv_heads))
    chosen[head], kept[head] = top_keys, refresh
    return str(from_formats(layout.formats(num_kv_heads), chosen, kept))


def state_shapes(
    fmt: Blocks | None,
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    capacity: int,
    dtype: torch.dtype,
    top_keys: int = 0,
    refresh: int = 1,
    pool_tokens: int | None = None,
) -> Shapes:
    """Name -> (shape, dtype) of the tensors that store one head class.

    Exactly: key [B, h, capacity, D], value [B, h, capacity, Dv]; where decoding reads some tiles of
    it (`top_keys`), also key_low and key_high [B, h, tiles, D], the range of each channel of the
    keys of each whole tile, which the scales of packed keys tell already. Packed: block_start
    [blocks + 1] int64, the first position of each block counted from the sink's end, unused
    entries equal to the last; sink_key [B, h, sink, D]; key [B, h, blocks, group, D*bits/8]
    uint8; key_scale and key_zero [B, h, blocks, 1, D] bfloat16; recent_key [B, h, recent, D], a
    ring in which the token at position p (from the sink's end) lies at p % recent; the same for
    values, but with value [B, h, blocks, Dv, group*bits/8], packed along the tokens, and scale
    and zero [B, h, blocks, group, 1]. An "f8" side is float8_e4m3fn of 8 bits, its values without
    zero. A 16-bit side is [B, h, blocks, group, D], without scale and zero. A sink of 0 tokens is
    left out.

    With `pool_tokens`, blocks lie on pages that rows share (`pages.py`): table [B, blocks] int32
    comes behind block_start, and B and blocks of the tensors of packed blocks are pages and 1.

    Where a choice of tiles is kept (`refresh` above 1), at the end choice [B, h, entries] int32,
    the tiles and room for those that become whole meanwhile, and chosen_at [B, h, 3] int32, of
    which `decode_topk.reference.is_due` tells.
    """
    choice: Shapes = {}
    if top_keys and refresh > 1:
        size = tile_size(fmt)
        # one entry more, for the tile that is not whole yet
        entries = tiles_read(top_keys, size) + grown(refresh, size) + 1
        sizes = (batch, heads, entries), (batch, heads, 3)
        choice = {name: (shape, torch.int32) for name, shape in zip(CHOICE, sizes, strict=True)}
    if fmt is None:
        names = RANGES if top_keys else ()
        return {
            "key": ((batch, heads, capacity, head_dim), dtype),
            "value": ((batch, heads, capacity, value_dim), dtype),
            **{name: ((batch, heads, capacity // TILE, head_dim), dtype) for name in names},
            **choice,
        }
    blocks = fmt.packed(capacity) // fmt.group
    recent = max(0, min(capacity - fmt.sink, fmt.residual + fmt.group - 1))
    shapes: Shapes = {"block_start": ((blocks + 1,), torch.int64)}
    owners = batch, heads, blocks
    if pool_tokens is not None:
        shapes["table"] = ((batch, blocks), torch.int32)
        owners = fmt.pages(batch, pool_tokens), heads, 1
    for side, channels in (("key", head_dim), ("value", value_dim)):
        bits = fmt.bits(side)
        if fmt.sink:
            shapes[f"sink_{side}"] = ((batch, heads, fmt.sink, channels), dtype)
        if bits == 16:
            shapes[side] = ((*owners, fmt.group, channels), dtype)
        else:
            row, stored = (1, channels), (fmt.group, channels * width(bits) // 8)
            if side == "value":
                row, stored = (fmt.group, 1), (channels, fmt.group * width(bits) // 8)
            kind = torch.float8_e4m3fn if bits == FLOAT8 else torch.uint8
            shapes[side] = ((*owners, *stored), kind)
            shapes[f"{side}_scale"] = ((*owners, *row), torch.bfloat16)
            if has_zero(side, bits):
                shapes[f"{side}_zero"] = ((*owners, *row), torch.bfloat16)
        shapes[f"recent_{side}"] = ((batch, heads, recent, channels), dtype)
    return shapes | choice


def layout_shapes(
    layout: Layout,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    capacity: int,
    dtype: torch.dtype,
    pool_tokens: int | None = None,
) -> list[Shapes]:
    """`state_shapes` of each class of `layout`; ValueError where a head cannot be packed."""
    found: list[Shapes] = []
    for (heads, fmt), entry in zip(layout.resolve(num_kv_heads), layout.classes, strict=True):
        reason = fmt.refusal(head_dim) if fmt else None
        if fmt and fmt.key_bits == 16 and entry.top_keys:
            reason = "tiles are chosen by the scales of packed keys, and 16-bit keys have none"
        if reason:
            raise ValueError(f"layout '{layout}': {reason}")
        sizes = (batch, len(heads), head_dim, value_dim, capacity)
        reads = entry.top_keys, entry.refresh
        found.append(state_shapes(fmt, *sizes, dtype, *reads, pool_tokens))
    return found


def allocate(
    layout: Layout,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    *,
    pool_tokens: int | None = None,
) -> list[Tensor]:
    """The state of one layer, empty, with room for `capacity` tokens a sequence. With
    `pool_tokens` packed blocks lie on pages: who calls says which, in each table."""
    shapes = layout_shapes(
        layout, batch, num_kv_heads, head_dim, value_dim, capacity, dtype, pool_tokens
    )
    return [
        torch.zeros(shape, dtype=kind, device=device)
        for entry in shapes
        for shape, kind in entry.values()
    ]


def state_bytes(
    layout: Layout,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    length: int,
    element_size: int,
) -> int:
    """Bytes of the state of one layer at `length` tokens: packed, scales, zeros, residual, sink.

    Equal to what `allocate` takes at that capacity.
    """
    dtype = FLOAT[element_size]
    shapes = layout_shapes(layout, batch, num_kv_heads, head_dim, value_dim, length, dtype)
    return sum(
        math.prod(shape) * kind.itemsize for entry in shapes for shape, kind in entry.values()
    )


def functional_names(layout: Layout, num_kv_heads: int) -> list[list[str]]:
    """Names of the tensors of each class in the growing form, in which nothing is cropped and
    ranges of keys are found again."""
    shapes = layout_shapes(layout, 1, num_kv_heads, 64, 64, 0, torch.float32)
    return [[name for name in entry if name not in FIXED] for entry in shapes]


def empty_past(
    layout: Layout,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """A past of length 0 in the growing form: dimension 2 of every tensor is the one that grows."""
    shapes = layout_shapes(layout, batch, num_kv_heads, head_dim, value_dim, 0, dtype)
    return [
        torch.zeros((*shape[:2], 0, *shape[3:]), dtype=kind, device=device)
        for entry in shapes
        for name, (shape, kind) in entry.items()
        if name not in FIXED
    ]


def split_state(
    layout: Layout, num_kv_heads: int, state: Sequence[Tensor], *, growing: bool = False
) -> list[tuple[tuple[int, ...], Blocks | None, dict[str, Tensor]]]:
    """(heads, format, tensors by name) of each class; the same tensors, not copies. A state of
    pages is told by its tables, one for each packed class."""
    classes = _classes(layout, num_kv_heads, growing, False)
    expected = sum(len(names) for _, _, names in classes)
    if len(state) != expected:
        classes = _classes(layout, num_kv_heads, growing, True)
        if len(state) != sum(len(names) for _, _, names in classes):
            raise ValueError(
                f"layout '{layout}' needs a state of {expected} tensors, got {len(state)}; one "
                "of pages has a table more for each packed class"
            )
    tensors = iter(state)
    return [(heads, fmt, {name: next(tensors) for name in names}) for heads, fmt, names in classes]


@lru_cache(maxsize=4096)
def _classes(
    layout: Layout, num_kv_heads: int, growing: bool, paged: bool
) -> tuple[tuple[tuple[int, ...], Blocks | None, tuple[str, ...]], ...]:
    """(heads, format, names of the tensors) of each class; every call of the op asks."""
    found: list[tuple[tuple[int, ...], Blocks | None, tuple[str, ...]]] = []
    for (heads, fmt), entry in zip(layout.resolve(num_kv_heads), layout.classes, strict=True):
        pool = 0 if paged else None
        reads = entry.top_keys, entry.refresh
        shapes = state_shapes(fmt, 1, 1, 8, 8, 0, torch.float32, *reads, pool)
        names = tuple(name for name in shapes if not (growing and name in FIXED))
        found.append((heads, fmt, names))
    return tuple(found)
