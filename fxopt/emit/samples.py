"""Inputs to trace and to check an export with, made from what the graph says of its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from .facts import tensor_facts
from .lowering import Lowered, empty_states
from .program import State

PADDING = 3


class Samples:
    """Random inputs of a lowered program: of the captured size, and of others."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        graph = lowered.program.graph
        self.placeholders = {str(n.target): n for n in graph.find_nodes(op="placeholder")}
        self.generator = torch.Generator().manual_seed(0)

    def dynamic(self, name: str) -> list[int]:
        """The dimensions of an input that change from call to call."""
        if name.startswith("past."):
            return [0, 2]
        known = tensor_facts(self.placeholders[name])
        sizes = () if known is None else known.shape
        return [dim for dim, size in enumerate(sizes) if isinstance(size, str)]

    def traced(self) -> list[Tensor]:
        """Inputs with no dynamic dimension of size 0 or 1, which a tracer would take as fixed."""
        if self.lowered.kind == "forward":
            return self._forward(0)
        length = self._long()
        prompt = [*self._tokens(2, length, 0), *empty_states(self.lowered, 2)]
        states = list(self.lowered(*prompt))[-len(self.lowered.slots) :]
        return [*self._tokens(2, 3, length), *states]

    @cached_property
    def sequences(self) -> list[tuple[int, list[list[Tensor]]]]:
        """(batch, calls): for a forward calls of several sizes, each on its own; for generation
        prompts and what follows, ten single tokens in one case, without the past."""
        if self.lowered.kind == "forward":
            return [(0, [inputs]) for inputs in self._forwards()]
        long = self._long()
        return [
            (3, self._calls(3, (7, 1, 1, 2, long, 1))),
            # The longest blocks are due in the middle of the single tokens.
            (1, self._calls(1, (max(1, long - 8), *[1] * 10))),
        ]

    def _calls(self, batch: int, lengths: Sequence[int]) -> list[list[Tensor]]:
        starts = itertools.accumulate(lengths, initial=0)
        return [
            self._tokens(batch, length, past) for length, past in zip(lengths, starts, strict=False)
        ]

    def _long(self) -> int:
        """A past so long that every kind of state holds at least two entries, and that heads which
        keep a share of their tiles leave some out."""
        from ..kernels.block_topk.reference import LEAST, SPARED, TILE
        from ..kernels.kv_attention.layout import parse

        formats = [
            fmt
            for state in self.lowered.program.states
            for _, fmt in parse(state.layout).resolve(state.num_kv_heads)
            if fmt is not None
        ]
        lengths = [f.sink + f.residual + 2 * f.group for f in formats]
        lengths += [_leaving(state) for state in self.lowered.program.states]
        options = [node.kwargs for node in self.lowered.graph.nodes]
        if any(any(o.get(name, ())) for o in options for name in ("top", "delta", "skip")):
            lengths.append((LEAST + SPARED + 1) * TILE)
        return max(lengths, default=2) + 3

    def _tokens(self, batch: int, length: int, past: int) -> list[Tensor]:
        """The inputs of generation but for the cache; the first of several rows is padded."""
        mask = torch.ones(batch, past + length, dtype=torch.int64)
        if batch > 1:
            mask[0, :PADDING] = 0
        plain = {
            "input_ids": self._integers("input_ids", (batch, length)),
            "position_ids": torch.arange(past, past + length).expand(batch, length).contiguous(),
            "attention_mask": mask,
        }
        return [plain[name] for name in self.lowered.inputs if not name.startswith("past.")]

    def _forwards(self) -> list[list[Tensor]]:
        """Inputs as captured, larger ones of which some are padded, and where the graph takes
        them batches and lengths of 1."""
        single = self._forward(None)
        found = [self._forward(0), self._forward(1, padded=True), self._forward(3, padded=True)]
        return [*found, single] if self._takes(single) else found

    def _takes(self, inputs: list[Tensor]) -> bool:
        try:
            with torch.no_grad():
                self.lowered(*inputs)
        except Exception:
            return False
        return True

    def _forward(self, extra: int | None, padded: bool = False) -> list[Tensor]:
        sizes = self._sizes(extra)
        return [self._tensor(name, sizes, padded) for name in self.lowered.inputs]

    def _sizes(self, extra: int | None) -> dict[str, int]:
        """Symbol -> size: as captured, batches and lengths larger by `extra`, or 1 without it."""
        found: dict[str, int] = {}
        for name, sizes in self.lowered.program.sizes.items():
            known = tensor_facts(self.placeholders.get(name))
            if known is None:
                continue
            for dim, (symbol, size) in enumerate(zip(known.shape, sizes, strict=True)):
                grows = dim == 0 or (dim == 1 and not known.dtype.is_floating_point)
                if isinstance(symbol, str):
                    larger = 1 if extra is None else size + extra
                    found.setdefault(symbol, larger if grows else size)
        # A mask that may cover a past covers the tokens alone here.
        lengths = [found[symbol] for symbol in self._symbols("input_ids")[1:]]
        totals = self._symbols("attention_mask")[1:]
        found.update(zip(totals, lengths, strict=False))
        return found

    def _symbols(self, name: str) -> list[str]:
        known = tensor_facts(self.placeholders.get(name))
        return [] if known is None else [s for s in known.shape if isinstance(s, str)]

    def _tensor(self, name: str, sizes: dict[str, int], padded: bool) -> Tensor:
        node = self.placeholders[name]
        known = tensor_facts(node)
        assert known is not None
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in known.shape)
        dtype = self.lowered.dtype if known.dtype in self.lowered.halves else known.dtype
        if "mask" in name or dtype == torch.bool:
            mask = torch.ones(shape, dtype=dtype)
            return _pad(mask) if padded and "mask" in name else mask
        if name == "position_ids":
            return torch.arange(shape[-1]).expand(shape).contiguous()
        if dtype.is_floating_point:
            return torch.randn(shape, dtype=torch.float32, generator=self.generator).to(dtype)
        return self._integers(name, shape).to(dtype)

    def _integers(self, name: str, shape: tuple[int, ...]) -> Tensor:
        bound = _rows(self.placeholders[name])
        return torch.randint(0, bound, shape, generator=self.generator)


def _leaving(state: State) -> int:
    """A past of which a decoded token leaves out a tile in each head that does."""
    from ..kernels.kv_attention.layout import left_out, parse

    layout, heads = parse(state.layout), state.num_kv_heads
    read = [(f, t) for f, t in zip(layout.formats(heads), layout.top_keys(heads), strict=True) if t]
    lengths = itertools.count(0, 32)
    return next(past for past in lengths if all(left_out(f, past, t) for f, t in read))


def _pad(mask: Tensor) -> Tensor:
    """A mask [B, T] whose first row is padded on the left and whose last on the right."""
    if mask.dim() == 2 and mask.shape[1] > PADDING + 1:
        mask[0, :PADDING] = 0
        mask[-1, -1] = 0
    return mask


def _rows(node: fx.Node) -> int:
    """How many rows the tables have that an integer input indexes; 2 when none is known."""
    found: list[int] = []
    for user in node.users:
        if "embedding" in str(user.target) and len(user.args) > 1 and user.args[1] is node:
            table = tensor_facts(user.args[0])
            if table is not None and isinstance(table.shape[0], int):
                found.append(table.shape[0])
    return min(found, default=2)
