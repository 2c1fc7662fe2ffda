"""Statistics of large models: recorded in passes over the fit part, as many sites each as fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from ..ir.rewrite import element_size
from ..ir.site import AttentionInfo, EmbeddingInfo, ExpertsInfo, LinearInfo, Site
from .recorder import ROWS
from .statistics import Recorded, Statistics

BEYOND = 2 * 2**30
"""Bytes that scoring holds beyond the records of the largest site: half of them records of others,
half tensors that were prepared. It is the same on every device, however much is free there: what
planning takes is then told by the model alone, and scores are the same for any bound."""

Record = Callable[[Collection[str], str], Statistics]
"""(nodes, which of how many passes) -> their recordings."""


class Footprint(NamedTuple):
    """Bytes of recording a node: its `own`, and those `shared` by all that read one `source`."""

    source: Hashable
    own: int
    shared: int


def footprints(
    graph: fx.GraphModule,
    sites: Iterable[Site],
    tensor_bytes: Callable[[fx.Node], int],
    sequences: int,
) -> dict[str, Footprint]:
    """By node, in the order of the graph: what is kept of all `sequences`, and what is held while
    one is recorded. `tensor_bytes` are those of what a node returns for the longest sequence."""
    members = (one for site in sites for one in site.members)
    infos = {one.node: one for one in members if one.family in ("linear", "attention")}
    return {
        node.name: _footprint(infos[node.name], node, tensor_bytes, sequences)
        for node in graph.graph.nodes
        if node.name in infos
    }


def _footprint(
    site: Site, node: fx.Node, tensor_bytes: Callable[[fx.Node], int], sequences: int
) -> Footprint:
    info, output = site.info, tensor_bytes(node)
    passing = 2 * output  # with its gradient
    if isinstance(info, LinearInfo | ExpertsInfo):
        size = element_size(info.dtype)
        rows = _rows(sequences, output // (size * info.out_features))
        kept = rows * size * (info.in_features + info.out_features)
        x = node.all_input_nodes[0]
        shared = 8 * info.in_features**2 + tensor_bytes(x)
        if isinstance(info, ExpertsInfo):
            return Footprint(node.name, kept + 8 * rows + passing, shared)
        return Footprint((x.name, info.patch), kept + passing, shared)
    if isinstance(info, EmbeddingInfo):
        row = info.features * element_size(info.dtype)
        kept = _rows(sequences, output // row) * (8 + row)
        return Footprint(node.name, kept + passing, 0)
    assert isinstance(info, AttentionInfo)
    given = (*node.args, *(v for k, v in node.kwargs.items() if k not in ("state", "start")))
    inputs = sum(tensor_bytes(value) for value in given if isinstance(value, fx.Node))
    return Footprint(node.name, inputs + passing, 0)


def _rows(sequences: int, longest: int) -> int:
    """How many are kept at most, at least one of each sequence."""
    return min(max(ROWS, sequences), sequences * longest)


@dataclass
class _Unit:
    """Sites that are recorded together: they are decided together, or read one input."""

    sites: list[Site] = field(default_factory=list[Site])
    nodes: dict[str, None] = field(default_factory=dict[str, None])


class Streamed(Statistics):
    """Statistics that are recorded when they are asked for, by a pass over the data.

    What is held at a time takes at most `limit` bytes, or what sites that are recorded together
    do where that is more. Sites that `passes` or `expect` was told of come as many in a pass as
    fit. A model all of whose sites fit is recorded once.
    """

    def __init__(
        self, footprints: Mapping[str, Footprint], record: Record, limit: int = BEYOND // 2
    ) -> None:
        super().__init__({}, 0, 0)
        self._footprints = footprints
        self._places = {node: i for i, node in enumerate(footprints)}
        self._run = record
        self.limit = limit
        self._fits = self.bytes_of(footprints) <= limit
        self._planned: list[frozenset[str]] = []

    def at(self, site: Site) -> Recorded:
        self._hold(dict.fromkeys(one.node for one in site.members))
        return super().at(site)

    def passes(self, sites: Iterable[Site]) -> list[list[Site]]:
        """`sites` in the order of the graph, those whose recordings are held together in a list."""
        placed = [site for site in sites if site.node in self._places]
        placed.sort(key=lambda site: min(self._places[one.node] for one in site.members))
        units = self._units(placed)
        packed = self._packed(units)
        if len(units) > 1:  # one alone may be among those that are expected
            self._plan(packed)
        return [[site for unit in units for site in unit.sites] for units in packed]

    def expect(self, sites: Iterable[Site]) -> None:
        self._plan(self._packed(self._units([s for s in sites if s.node in self._places])))

    def bytes_of(self, nodes: Iterable[str]) -> int:
        """An estimate, by sizes, of what recording these nodes together takes."""
        found = [self._footprints[node] for node in nodes]
        shared = {one.source: one.shared for one in found}
        return sum(one.own for one in found) + sum(shared.values())

    def _plan(self, packed: Iterable[Iterable[_Unit]]) -> None:
        self._planned = [frozenset(n for unit in units for n in unit.nodes) for units in packed]

    def _units(self, sites: Sequence[Site]) -> list[_Unit]:
        """In the order of their first sites."""
        found: dict[Hashable, _Unit] = {}
        for site in sites:
            nodes = [one.node for one in site.members]
            keys = [*nodes, *(("source", self._footprints[node].source) for node in nodes)]
            joined = {id(unit): unit for key in keys if (unit := found.get(key))}
            first, *others = joined.values() or [_Unit()]
            for other in others:
                first.sites += other.sites
                first.nodes |= other.nodes
                found |= {key: first for key, unit in found.items() if unit is other}
            first.sites.append(site)
            first.nodes |= dict.fromkeys(nodes)
            found |= dict.fromkeys(keys, first)
        return list({id(unit): unit for unit in found.values()}.values())

    def _packed(self, units: Iterable[_Unit]) -> list[list[_Unit]]:
        """Units one after the other into passes."""
        if self._fits:
            return [list(units)] if units else []
        packed: list[list[_Unit]] = []
        room = 0
        for unit in units:
            size = self.bytes_of(unit.nodes)
            if size > room:
                packed.append([])
                room = self.limit
            packed[-1].append(unit)
            room -= size
        return packed

    def _hold(self, nodes: Mapping[str, None]) -> None:
        """Record what is not held of these nodes, with what is planned in one pass with them."""
        missing = nodes.keys() - self.nodes.keys()
        if not missing:
            return
        of, wanted = self._planned_with(missing)
        if self.bytes_of({**self.nodes, **dict.fromkeys(wanted)}) > self.limit:
            wanted |= nodes.keys()
            self._sharing = None
            self.nodes = {node: one for node, one in self.nodes.items() if node in wanted}
        found = self._run(wanted - self.nodes.keys(), of)
        self.nodes |= found.nodes
        self.positions, self.attention_positions = found.positions, found.attention_positions

    def _planned_with(self, nodes: Collection[str]) -> tuple[str, set[str]]:
        if self._fits:
            return "", set(self._footprints)
        for i, planned in enumerate(self._planned, 1):
            if planned.issuperset(nodes):
                return f"{i} of {len(self._planned)}" if len(self._planned) > 1 else "", {*planned}
        return "", set(nodes)
