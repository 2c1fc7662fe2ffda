"""Inputs to trace and to check an export with, made from what the graph says of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from .facts import tensor_facts
from .lowering import Lowered, empty_states


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
        states = self._present(2, self._long())
        return self._generation(2, 3, self._long(), states)

    def checks(self) -> Iterator[list[Tensor]]:
        """Other sizes; for generation a prefill and the steps that follow it."""
        if self.lowered.kind == "forward":
            yield from (self._forward(extra) for extra in (0, 1, 3))
            return
        batch, past, states = 3, 0, empty_states(self.lowered, 3)
        for length in (7, 1, 1, 2, self._long(), 1):
            inputs = self._generation(batch, length, past, states)
            yield inputs
            with torch.no_grad():
                states = list(self.lowered(*inputs))[-len(self.lowered.slots) :]
            past += length

    def _long(self) -> int:
        """A past so long that every kind of state holds at least two entries."""
        from ..kernels.kv_attention.layout import parse

        formats = [
            fmt
            for state in self.lowered.program.states
            for _, fmt in parse(state.layout).resolve(state.num_kv_heads)
            if fmt is not None
        ]
        return max((f.sink + f.residual + 2 * f.group for f in formats), default=2) + 3

    def _present(self, batch: int, length: int) -> list[Tensor]:
        inputs = self._generation(batch, length, 0, empty_states(self.lowered, batch))
        return list(self.lowered(*inputs))[-len(self.lowered.slots) :]

    def _generation(
        self, batch: int, length: int, past: int, states: Sequence[Tensor]
    ) -> list[Tensor]:
        plain = {
            "input_ids": self._integers("input_ids", (batch, length)),
            "position_ids": torch.arange(past, past + length).expand(batch, length).contiguous(),
            "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
        }
        if past:
            # one row is padded on the left
            plain["attention_mask"][0, 0] = 0
        names = [name for name in self.lowered.inputs if not name.startswith("past.")]
        return [*(plain[name] for name in names), *states]

    def _forward(self, extra: int) -> list[Tensor]:
        sizes = self._sizes(extra)
        return [self._tensor(name, sizes) for name in self.lowered.inputs]

    def _sizes(self, extra: int) -> dict[str, int]:
        """Symbol -> size: as captured, batches and lengths larger by `extra`."""
        found: dict[str, int] = {}
        for name, sizes in self.lowered.program.sizes.items():
            known = tensor_facts(self.placeholders.get(name))
            if known is None:
                continue
            for dim, (symbol, size) in enumerate(zip(known.shape, sizes, strict=True)):
                grows = dim == 0 or (dim == 1 and not known.dtype.is_floating_point)
                if isinstance(symbol, str):
                    found.setdefault(symbol, size + extra if grows else size)
        # A mask that may cover a past covers the tokens alone here.
        lengths = [found[symbol] for symbol in self._symbols("input_ids")[1:]]
        totals = self._symbols("attention_mask")[1:]
        found.update(zip(totals, lengths, strict=False))
        return found

    def _symbols(self, name: str) -> list[str]:
        known = tensor_facts(self.placeholders.get(name))
        return [] if known is None else [s for s in known.shape if isinstance(s, str)]

    def _tensor(self, name: str, sizes: dict[str, int]) -> Tensor:
        node = self.placeholders[name]
        known = tensor_facts(node)
        assert known is not None
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in known.shape)
        dtype = self.lowered.dtype if known.dtype in self.lowered.halves else known.dtype
        if "mask" in name or dtype == torch.bool:
            return torch.ones(shape, dtype=dtype)
        if name == "position_ids":
            return torch.arange(shape[-1]).expand(shape).contiguous()
        if dtype.is_floating_point:
            return torch.randn(shape, dtype=torch.float32, generator=self.generator).to(dtype)
        return self._integers(name, shape).to(dtype)

    def _integers(self, name: str, shape: tuple[int, ...]) -> Tensor:
        bound = _rows(self.placeholders[name])
        return torch.randint(0, bound, shape, generator=self.generator)


def _rows(node: fx.Node) -> int:
    """How many rows the tables have that an integer input indexes; 2 when none is known."""
    found: list[int] = []
    for user in node.users:
        if "embedding" in str(user.target) and len(user.args) > 1 and user.args[1] is node:
            table = tensor_facts(user.args[0])
            if table is not None and isinstance(table.shape[0], int):
                found.append(table.shape[0])
    return min(found, default=2)
