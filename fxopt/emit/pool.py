"""Which pages hold the packed blocks of a cache's rows: kept on the host, which knows the lengths.

Before each call the blocks that it will pack get pages, so that nothing in the call waits or
allocates. A packed block is never changed: rows that go on from the same tokens share its page,
which is free once no row has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fxopt.ir.errors import FxoptError
from fxopt.kernels.kv_attention.layout import Blocks
from fxopt.kernels.kv_attention.mutating import block_bounds
from fxopt.kernels.kv_attention.pages import HIDDEN

Schedule = tuple[int, int, int]
"""Formats of equal (group, residual, sink) pack the same blocks at the same lengths."""


def schedule(fmt: Blocks) -> Schedule:
    return fmt.group, fmt.residual, fmt.sink


class Table:
    """The block table of all head classes of one schedule: page p is the p-th of each one's pool.

    `table` int32 [batch, blocks] is on the device, `rows` are the pages of each row on the host,
    those of blocks that are packed next included; `ends` are where blocks in use end, counted from
    the sink's end, as `block_start` has them.
    """

    def __init__(self, fmt: Blocks, table: Tensor, pages: int) -> None:
        self.fmt, self.table = fmt, table
        self.users = [0] * pages
        self.free = list(reversed(range(HIDDEN + 1, pages)))
        self.rows: list[list[int]] = [[] for _ in table]
        self.ends: list[int] = []

    def _due(self, length: int) -> list[int]:
        """Where the blocks end that are packed by the time there are `length` tokens."""
        old = self.ends[-1] if self.ends else 0
        return [high for _, high in block_bounds(old, self.fmt.packed(length), self.fmt.group)]

    def _coming(self, length: int) -> list[int]:
        """Positions where the blocks of the first `length` tokens end that have no page yet."""
        due = self._due(length)[self._held - len(self.ends) :]
        return [end + self.fmt.sink for end in due]

    @property
    def _held(self) -> int:
        """Pages of a row; there are as many as `ends`, or more once a call took them."""
        return len(self.rows[0]) if self.rows else len(self.ends)

    def check(self, length: int, padding: Sequence[int]) -> None:
        """FxoptError where too few pages are free for `take`."""
        ends = self._coming(length)
        needed = sum(end > first for first in padding for end in ends)
        if needed > len(self.free):
            raise FxoptError(
                f"fxopt.Cache: {needed} more pages of {self.fmt.group} tokens are needed for "
                f"{length} tokens in each of {len(self.rows)} rows, and of {len(self.users) - 1} "
                f"in the pool {len(self.free)} are free; make a larger pool "
                "(make_cache(batch, capacity, pool_tokens=...)), or give pages back with "
                "cache.crop or cache.batch_select_indices"
            )

    def take(self, length: int, padding: Sequence[int]) -> None:
        """Pages for all blocks of the first `length` tokens. Rows begin with so much `padding`,
        and a block of nothing else needs no page of its own."""
        ends, held = self._coming(length), self._held
        if not ends:
            return
        for row, first in zip(self.rows, padding, strict=True):
            for end in ends:
                row.append(self._use(self.free.pop() if end > first else HIDDEN))
        self._write(held)

    def give_up(self) -> None:
        """Give back pages in which nothing was packed: those of a call that failed."""
        for row in self.rows:
            self._give_back(row[len(self.ends) :])
            del row[len(self.ends) :]

    def advance(self, length: int) -> None:
        """Note what has been packed; FxoptError where it was packed before there were pages."""
        if self._coming(length):
            raise FxoptError(
                "fxopt.Cache: blocks were packed before they had pages; call "
                "cache.require(new_tokens) before what appends them"
            )
        self.ends += self._due(length)

    def truncate(self, length: int) -> None:
        """As `CacheLayer.truncate`: pages of blocks that hold nothing any more are free."""
        kept = max(0, length - self.fmt.sink)
        self.ends = sorted({min(end, kept) for end in self.ends} - {0})
        self.give_up()

    def select(self, index: Sequence[int]) -> None:
        """Rows taken from `index`; those that are named twice share pages from here on."""
        self.give_up()  # a page that is still to be written has one row
        old, self.rows = self.rows, [list(self.rows[i]) for i in index]
        for row in self.rows:
            for page in row:
                self._use(page)
        for row in old:
            self._give_back(row)
        if len(index) != len(self.table):
            with torch.inference_mode(False):
                self.table = self.table.new_zeros(len(index), self.table.shape[1])
        self._write(0)

    def reserve(self, capacity: int) -> None:
        """Grow to the blocks of `capacity` tokens, and to those that short ones cost beside it."""
        group = self.fmt.group
        short = len(self.ends) - (self.ends[-1] // group if self.ends else 0)
        blocks = self.fmt.packed(capacity) // group + short
        if blocks > self.table.shape[1]:
            with torch.inference_mode(False):
                self.table = self.table.new_zeros(len(self.rows), blocks)
            self._write(0)

    def _write(self, first: int) -> None:
        """Bring the pages from the block at place `first` on to the device."""
        pages = torch.tensor([row[first:] for row in self.rows], dtype=torch.int32)
        if pages.numel():
            self.table[:, first : first + pages.shape[1]].copy_(pages, non_blocking=True)

    def _use(self, page: int) -> int:
        self.users[page] += 1
        return page

    def _give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if page != HIDDEN and not self.users[page]:
                self.free.append(page)


class Pool:
    """The tables of one cache, by schedule. `tokens` is what was asked for; `padding` is how many
    positions are hidden at the beginning of each row."""

    def __init__(
        self,
        formats: Iterable[Blocks],
        batch: int,
        tokens: int,
        capacity: int,
        device: torch.device | str | None,
    ) -> None:
        self.tokens = tokens
        self.padding = [0] * batch
        self.tables: dict[Schedule, Table] = {}
        for fmt in formats:
            if schedule(fmt) not in self.tables:
                blocks = fmt.packed(capacity) // fmt.group
                table = torch.zeros(batch, blocks, dtype=torch.int32, device=device)
                self.tables[schedule(fmt)] = Table(fmt, table, fmt.pages(batch, tokens))
        if not self.tables:
            raise FxoptError(
                "pool_tokens: this plan stores all keys and values exactly, and "
                "only packed blocks lie on pages; leave it out"
            )

    @property
    def free_tokens(self) -> int:
        """Packed tokens for which pages are free."""
        return min(len(table.free) * group for (group, *_), table in self.tables.items())

    def take(self, held: int, length: int, mask: Tensor | None) -> None:
        """Pages for a call that makes `held` tokens `length`; FxoptError where too few are free,
        and then none is taken. The mask [batch, length] is asked once, when a row begins: that
        waits for the device."""
        if any(first >= held for first in self.padding):
            found = zip(self.padding, self._hidden(length, mask), strict=True)
            self._pad([new if first >= held else first for first, new in found])
        for table in self.tables.values():
            table.check(length, self.padding)
        for table in self.tables.values():
            table.take(length, self.padding)

    def _pad(self, padding: list[int]) -> None:
        """A call that failed and comes again finds its pages, unless other blocks are hidden."""
        if padding != self.padding:
            for table in self.tables.values():
                table.give_up()
        self.padding = padding

    def _hidden(self, length: int, mask: Tensor | None) -> list[int]:
        """How many positions `mask` hides at the beginning of each row: none where it is of another
        shape, which is the model's to refuse, and in a compiled module, which cannot ask."""
        rows = len(self.padding)
        if mask is None or mask.shape != (rows, length) or torch.compiler.is_compiling():
            return [0] * rows
        shown = torch.cat([mask != 0, mask.new_ones(rows, 1, dtype=torch.bool)], 1)
        return shown.int().argmax(1).tolist()

    def advance(self, length: int) -> None:
        for table in self.tables.values():
            table.advance(length)

    def truncate(self, length: int, capacity: int) -> None:
        self.padding = [min(first, length) for first in self.padding]
        for table in self.tables.values():
            table.truncate(length)
            table.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        for table in self.tables.values():
            table.reserve(capacity)

    def select(self, indices: Tensor) -> None:
        """Rows taken from `indices`, of a beam search or of a batch; waits for the device."""
        index = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        order: list[int] = index.tolist()
        if any(not 0 <= i < len(self.padding) for i in order):
            raise IndexError(f"rows {order} of a cache of {len(self.padding)}")
        self.padding = [self.padding[i] for i in order]
        for table in self.tables.values():
            table.select(order)
