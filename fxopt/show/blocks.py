"""The graph before and after as a few blocks: one for each distinct layer, each a diff of calls."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxopt.ir.evidence import Block

_INDEXED = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
LARGE = 400
"""Calls beyond which a layer that holds further layers is split into those."""
DTYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64",
    "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Graphs:
    """The canonical graph, the edited one, and what links them.

    `sites` maps nodes of `before`, by name, to the site that they are (without the head); `now`
    maps them to the nodes of `after` that stand in their place. Nodes of equal name are the same.
    `sizes` names the symbols of shapes.
    """

    before: fx.Graph
    after: fx.Graph
    sites: Mapping[str, str]
    now: Mapping[str, str]
    sizes: Mapping[str, str] = field(default_factory=dict[str, str])


def blocks(graphs: Graphs) -> list[Block]:
    """Blocks in the order of the graph; layers whose diffs are equal are one block."""
    prefixes = _prefixes(graphs)
    texts = {side: _Side(graphs, side, prefixes) for side in ("before", "after")}
    names = texts["before"].name_nodes({})
    renamed = {graphs.now.get(old, old): name for old, name in names.items()}
    texts["after"].name_nodes(renamed)
    found: dict[tuple[str, ...], Block] = {}
    for prefix in dict.fromkeys(prefixes.values()):
        before, after = (texts[side].lines(prefix) for side in ("before", "after"))
        lines = _merge(before, after)
        inputs = {**texts["after"].origins(prefix), **texts["before"].origins(prefix)}
        key = tuple(lines)
        if not lines:
            continue
        block = found.setdefault(key, Block(modules=[], lines=lines))
        block.modules.append(prefix)
        for name, origin in inputs.items():
            block.inputs.setdefault(name, []).append(origin)
    return list(found.values())


def both_after(first: Iterable[Block], second: Iterable[Block]) -> list[Block]:
    """The blocks of two plans, each as rewritten: the diff is from the first plan to the second."""
    old, new = _rewritten(first), _rewritten(second)
    found: dict[tuple[str, ...], Block] = {}
    for module, lines in new.items():
        merged = _merge(old.get(module, {}), lines)
        found.setdefault(tuple(merged), Block(modules=[], lines=merged)).modules.append(module)
    return list(found.values())


def _rewritten(blocks: Iterable[Block]) -> dict[str, dict[str, str]]:
    """By module, the calls that stand there after, by name."""
    return {
        module: {
            line.partition(" = ")[0].lstrip(" +%"): line[1:]
            for line in block.lines
            if line[:1] in (" ", "+")
        }
        for block in blocks
        for module in block.modules
    }


def _prefixes(graphs: Graphs) -> dict[str, str]:
    """The block of each module: up to its first number, or a later one where blocks are large."""
    counts: dict[str, int] = {}
    for node in graphs.before.nodes:
        if node.op == "call_function":
            counts[_fqn(node)] = counts.get(_fqn(node), 0) + 1
    modules = dict.fromkeys(_fqn(n) for g in (graphs.before, graphs.after) for n in g.nodes)
    found = {module: _upto(module, 1) for module in modules}
    for depth in (2, 3):
        sizes: dict[str, int] = {}
        for module, prefix in found.items():
            sizes[prefix] = sizes.get(prefix, 0) + counts.get(module, 0)
        found = {m: _upto(m, depth) if sizes[p] > LARGE and p else p for m, p in found.items()}
    return found


def _upto(module: str, depth: int) -> str:
    """`module` up to its `depth`-th number, or its last; "" where it has none."""
    ends = [found.end() for found in _INDEXED.finditer(module)]
    return module[: ends[min(depth, len(ends)) - 1]] if ends else ""


class _Side:
    """The calls of one graph with names that are equal in equal layers."""

    def __init__(self, graphs: Graphs, side: str, prefixes: Mapping[str, str]) -> None:
        self.graph: fx.Graph = getattr(graphs, side)
        self.sizes, self.prefixes = graphs.sizes, prefixes
        now = graphs.now if side == "after" else {}
        self.sites = {now.get(node, node): key for node, key in graphs.sites.items()}
        self.names: dict[str, str] = {}
        self.nodes: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if _shown(node):
                self.nodes.setdefault(self.block(node), []).append(node)

    def block(self, node: fx.Node) -> str:
        return self.prefixes[_fqn(node)]

    def name_nodes(self, known: Mapping[str, str]) -> Mapping[str, str]:
        """Give each node a name of its own within its block; `known` ones keep theirs."""
        for nodes in self.nodes.values():
            mine = {node.name: known[node.name] for node in nodes if node.name in known}
            taken = set(mine.values())
            for node in nodes:
                if node.name not in mine:
                    mine[node.name] = _free(self._base(node), taken)
                    taken.add(mine[node.name])
            self.names |= mine
        return self.names

    def _base(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return node.name
        op = _op(node)
        leaf = _fqn(node).rpartition(".")[2]
        is_linear = node.name in self.sites and op.endswith("linear")
        return re.sub(r"\W", "_", leaf if is_linear and leaf else op.rpartition(".")[2])

    def lines(self, prefix: str) -> dict[str, str]:
        """The text of each call of a block by its name, in order."""
        writer = _Writer(self, prefix)
        return {self.names[n.name]: writer.line(n) for n in self.nodes.get(prefix, [])}

    def origins(self, prefix: str) -> dict[str, str]:
        """Where the names come from that a block reads and does not define."""
        writer = _Writer(self, prefix)
        for node in self.nodes.get(prefix, []):
            writer.line(node)
        return {
            name: f"{self.block(node)}/{self.names[node.name]}"
            for node, name in writer.outside.items()
        }


class _Writer:
    """Lines of one block; remembers what it reads from outside, the first of it as `input`."""

    def __init__(self, side: _Side, prefix: str) -> None:
        self.side, self.prefix = side, prefix
        self.outside: dict[fx.Node, str] = {}

    def line(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            call = "input()"
        else:
            words = [self._word(argument) for argument in node.args]
            words += [f"{key}={self._word(value)}" for key, value in node.kwargs.items()]
            call = f"{_op(node)}({', '.join(words)})"
        site = self.side.sites.get(node.name)
        where = f"in {self._within(_fqn(node))}" if site is None else f"at {self._within(site)}"
        kind = self._kind(node.meta.get("val"))
        return f"%{self.side.names[node.name]} = {call} -> {kind} {where}".rstrip()

    def _within(self, name: str) -> str:
        """A module or parameter, named from the block."""
        if self.prefix and (name == self.prefix or name.startswith(f"{self.prefix}.")):
            return name[len(self.prefix) + 1 :]
        return name

    def _word(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._word, value))}]"
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2**62:
            return "end"
        return repr(value)

    def _node(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if node.op == "get_attr":
            return f"{self._within(str(node.target))} {self._kind(value)}".rstrip()
        if not _shown(node):
            return self._size(value)
        if self.side.block(node) == self.prefix:
            return f"%{self.side.names[node.name]}"
        if node not in self.outside:
            self.outside[node] = self._outer_name(node)
        return f"%{self.outside[node]}"

    def _outer_name(self, node: fx.Node) -> str:
        """A name that does not depend on which of several equal layers reads it."""
        if node.op == "placeholder":
            name = node.name
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            name = node.args[0].name
        else:
            first = "input" not in self.outside.values()
            name = "input" if first else _op(node).rpartition(".")[2]
        local = {self.side.names[n.name] for n in self.side.nodes.get(self.prefix, [])}
        return _free(re.sub(r"\W", "_", name), local | set(self.outside.values()))

    def _kind(self, value: Any) -> str:
        if not isinstance(value, Tensor):
            return "value" if value is None else type(value).__name__
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{DTYPES.get(dtype, dtype)}[{', '.join(map(self._size, value.shape))}]"

    def _size(self, size: Any) -> str:
        text = str(size)
        for symbol, name in self.side.sizes.items():
            text = re.sub(rf"\b{symbol}\b", name, text)
        return text


def _shown(node: fx.Node) -> bool:
    """Parameters and sizes are said where they are read."""
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and not isinstance(node.meta.get("val"), torch.SymInt)


def _merge(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A diff in the order of the calls after; what is gone stands where it stood."""
    gone = [name for name in before if name not in after]
    order = {name: index for index, name in enumerate(before)}
    lines: list[str] = []
    for name, text in after.items():
        if name not in before:
            lines.append(f"+{text}")
            continue
        while gone and order[gone[0]] < order[name]:
            lines.append(f"-{before[gone.pop(0)]}")
        lines += [f" {text}"] if text == before[name] else [f"-{before[name]}", f"+{text}"]
    return lines + [f"-{before[name]}" for name in gone]


def _fqn(node: fx.Node) -> str:
    return str(node.meta.get("fqn", ""))


def _op(node: fx.Node) -> str:
    if node.op == "output":
        return "return"
    target: Any = node.target
    return str(target.overloadpacket) if isinstance(target, OpOverload) else target.__name__


def _free(name: str, taken: Iterable[str]) -> str:
    """`name`, or the first of `name_1`, `name_2` that is not taken."""
    taken = set(taken)
    count, found = 0, name
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    return found
