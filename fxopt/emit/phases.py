"""The parts of an encoder-decoder program that generation runs apart, over the same tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import count
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, fx, nn

from ..ir.ops import attend
from .binding import without_idle_masks
from .facts import Facts, facts, tensor_facts
from .frames import floats
from .program import Program
from .source import generate

ENCODED = "encoder_hidden_states"
MASK = "decoder_attention_mask"
aten = torch.ops.aten


class Parts(NamedTuple):
    """Programs cut out of a whole forward.

    `encoder` gives the one tensor that the decoder reads, `decoder` is the rest. Where the
    decoder runs in steps, `cross` gives key and value of each cross-attention from that tensor,
    and `step` is the decoder over `past` with `start` tokens in it, its new tokens at `positions`.
    """

    encoder: Program
    decoder: Program
    cross: Program | None = None
    step: Program | None = None


class Phase:
    """One part of a program over the tensors of its module."""

    def __init__(self, program: Program, tensors: dict[str, Tensor]) -> None:
        self.placeholders = program.placeholders
        self.optional = program.optional
        masks = [n for n in program.graph.find_nodes(op="placeholder") if n.target == MASK]
        self.counts_by_mask = any(_is_size(user) for mask in masks for user in mask.users)
        pick = generate(program.graph, program.tree).load()
        self._root = nn.Module()
        program.tree.with_tensors(tensors).fill(self._root, pick)
        self._run = pick("", program.tree.modules[""]).forward

    def __call__(self, inputs: dict[str, Any]) -> Sequence[Tensor]:
        if not self.counts_by_mask:
            inputs = without_idle_masks(inputs, self.optional)
        return self._run(self._root, *(inputs.get(name) for name in self.placeholders))


def split(program: Program) -> Parts | None:
    """The program cut at the one tensor through which all that the decoder reads of the encoder's
    computation passes; None when there is no such tensor."""
    cut = _cut(program.graph)
    known = tensor_facts(cut)
    if cut is None or known is None:
        return None
    encoder, decoder = fx.Graph(), _Rest(program.graph, cut, known)
    copies: dict[fx.Node, fx.Node] = {}
    encoder.graph_copy(program.graph, copies)
    encoder.output((copies[cut],))
    _clean(encoder)
    parts = Parts(*(replace(program, graph=g) for g in (encoder, decoder.cleaned())))
    if not _reads_only(parts.decoder, {ENCODED, "attention_mask"}):
        return None
    if not any("cache" in node.meta for node in program.graph.nodes):
        return parts
    cross = replace(program, graph=_Rest(program.graph, cut, known).keys_and_values())
    step = replace(program, graph=_Rest(program.graph, cut, known).step())
    return parts._replace(cross=cross, step=step)


class _Rest:
    """A copy of a graph in which the encoder's result is an input."""

    def __init__(self, source: fx.Graph, cut: fx.Node, known: Facts) -> None:
        self.graph = graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(source, copies))
        self.cached = [copies[n] for n in source.nodes if "cache" in n.meta]
        self.counts = [copies[n] for n in source.nodes if "positions" in n.meta]
        self._first = next(iter(graph.nodes))
        self.hidden = self._input(ENCODED, known)
        copies[cut].replace_all_uses_with(self.hidden)
        for node in list(graph.nodes):
            # Lengths and device of what only the encoder reads are those of its result.
            if node.target is getattr:
                node.args = (self.hidden, node.args[1])
            if node.target is aten.sym_size.int and facts(node) in known.shape:
                node.args = (self.hidden, known.shape.index(facts(node)))  # pyright: ignore

    def _input(self, name: str, known: Facts | None) -> fx.Node:
        with self.graph.inserting_before(self._first):
            node = self.graph.placeholder(name)
        node.meta = {"facts": known}
        return node

    def cleaned(self) -> fx.Graph:
        return _clean(self.graph)

    def keys_and_values(self) -> fx.Graph:
        """The graph that ends with k and v of each attention whose cache is filled once."""
        found = [n.args[i] for n in self.cached if n.meta["cache"] == "cross" for i in (1, 2)]
        self.graph.erase_node(self.graph.output_node())
        self.graph.output(tuple(found))
        return self.cleaned()

    def step(self) -> fx.Graph:
        """The graph for new tokens over a cache: queries are counted by `positions`, keys by the
        columns of the mask."""
        past, start = self._input("past", None), self._input("start", None)
        for i, node in enumerate(self.cached):
            with self.graph.inserting_before(self._first):
                state = self.graph.call_function(operator.getitem, (past, i))
            node.update_kwarg("state", state)
            if node.meta["cache"] == "cross":
                node.args = (node.args[0], None, None, *node.args[3:])
            else:
                node.update_kwarg("start", start)
        for node in self.counts:
            if node.meta["positions"] == "queries":
                node.replace_all_uses_with(self._positions(node))
            else:
                self._count_by_mask(node)
        return self.cleaned()

    def _positions(self, node: fx.Node) -> fx.Node:
        known = self.graph.find_nodes(op="placeholder")
        found = next((n for n in known if n.target == "positions"), None)
        return found or self._input("positions", tensor_facts(node))

    def _count_by_mask(self, node: fx.Node) -> None:
        """Let an `arange` over keys count the past as well, and what is made of it be as long."""
        mask = next(n for n in self.graph.find_nodes(op="placeholder") if n.target == MASK)
        known, own = tensor_facts(mask), tensor_facts(node)
        assert known is not None
        assert own is not None
        with self.graph.inserting_before(node):
            total = self.graph.call_function(aten.sym_size.int, (mask, 1))
        total.meta["facts"] = known.shape[1]
        node.args = (*node.args[:-1], total)
        node.meta["facts"] = Facts(own.dtype, (known.shape[1],))
        _propagate(node)


def _propagate(start: fx.Node) -> None:
    """Find the sizes again of all that is computed from a node whose sizes changed."""
    sizes = _Sizes()
    changed = {start}
    node = start.next
    while node.op != "output":
        if node.target is not attend and changed.intersection(node.all_input_nodes):
            known = tensor_facts(node)
            assert known is not None
            args, kwargs = fx.map_arg((node.args, node.kwargs), sizes.stand_in)  # pyright: ignore
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "meta"}  # pyright: ignore
            node.meta["facts"] = Facts(known.dtype, sizes.named(node.target(*args, **kwargs)))  # pyright: ignore
            changed.add(node)
        node = node.next


class _Sizes:
    """A number for each symbol, by which it is known again in the shape of a result."""

    def __init__(self) -> None:
        self._next = count(1009, 2)
        self._numbers: dict[str, int] = {}

    def number(self, size: int | str) -> int:
        return size if isinstance(size, int) else self._numbers.setdefault(size, next(self._next))

    def stand_in(self, node: fx.Node) -> Any:
        """A tensor without values of a node's shape, or the number that a size stands for."""
        known = facts(node)
        if isinstance(known, Facts):
            shape = [self.number(size) for size in known.shape]
            return torch.empty(shape, dtype=known.dtype, device="meta")
        return self.number(known) if isinstance(known, (int, str)) else "meta"

    def named(self, result: Tensor) -> tuple[int | str, ...]:
        names = {number: name for name, number in self._numbers.items()}
        return tuple(names.get(size, size) for size in result.shape)


def _clean(graph: fx.Graph) -> fx.Graph:
    """Without what no output needs."""
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    return graph


def _reads_only(program: Program, allowed: set[str]) -> bool:
    return all(name in allowed or _is_decoders(name) for name in program.placeholders)


def _is_decoders(name: str) -> bool:
    return name.startswith("decoder_")


def _cut(graph: fx.Graph) -> fx.Node | None:
    """The last node that every path from the encoder's computation to the decoder's crosses."""
    decoding: set[fx.Node] = set()
    encoding = nx.DiGraph()
    for node in graph.nodes:
        if floats(node):
            if node.op == "placeholder" and _is_decoders(str(node.target)):
                decoding.add(node)
            continue
        sources = [source for source in node.all_input_nodes if not _is_size(source)]
        if node.op == "output" or any(source in decoding for source in sources):
            decoding.add(node)
            continue
        computed = [source for source in sources if source in encoding]
        inputs = [s for s in sources if s.op == "placeholder"]
        for source in computed or (["start"] if inputs else []):
            encoding.add_edge(source, node)
    if "start" not in encoding or not any(node.op == "placeholder" for node in decoding):
        return None
    ends = [n for n in encoding if n != "start" and any(u in decoding for u in n.users)]
    dominators = nx.immediate_dominators(encoding, "start")
    chains = [_chain(dominators, end) for end in ends]
    common = reduce(lambda a, b: [n for n in a if n in b], chains) if chains else []
    return next((node for node in common if isinstance(node, fx.Node)), None)


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and floats(node)


def _chain(dominators: dict[Any, Any], node: Any) -> list[Any]:
    """A node and its dominators, the nearest first."""
    found = [node]
    while dominators.get(found[-1], found[-1]) not in (found[-1], None):
        found.append(dominators[found[-1]])
    return found
