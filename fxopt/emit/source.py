"""Generated source: one class for each distinct module of the original that has code.

The text is made from the graph alone, deterministically, so that a saved module is generated
again at loading and nothing from a folder is ever executed.
"""

from __future__ import annotations

import hashlib
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

from torch import fx, nn

from .frames import Frame, floats, frame, is_size_arithmetic, state_index
from .layout import INDENT
from .method import Method, Writer
from .names import Names
from .paths import tensor_path
from .sizes import find_size
from .tree import Entry, Tree, leaf_class


@dataclass(frozen=True)
class Source:
    """`text` is a Python file; `classes` maps the keys of a tree's modules to class names."""

    text: str
    classes: dict[str, str]

    def load(self) -> Callable[[str, Entry], type[nn.Module]]:
        """Compile the text; returns the class of each module of the tree."""
        space = _execute(self.text)

        def pick(module: str, entry: Entry) -> type[nn.Module]:
            name = self.classes.get(module)
            return leaf_class(entry) if name is None else space[name]

        return pick


def generate(graph: fx.Graph, tree: Tree, reserved: frozenset[str] = frozenset()) -> Source:
    """Source for `graph` over `tree`. `reserved` names are attributes of the root's class."""
    return _Generator(graph, tree, reserved).source()


class _Generator:
    def __init__(self, graph: fx.Graph, tree: Tree, reserved: frozenset[str]) -> None:
        framing = frame(graph, tree)
        self.tree, self.reserved = tree, reserved
        self.root, self.hints = framing.root, framing.hints
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.result = graph.output_node().args[0]
        self.rank = {node: index for index, node in enumerate(graph.nodes)}
        readers = [n for n in graph.nodes if state_index(n) is not None]
        self.state_readers = {user for node in readers for user in node.users}
        self.members: dict[int, set[fx.Node]] = {}
        self.methods: dict[int, Method] = {}
        self.bodies: dict[str, list[str]] = {}

    def source(self) -> Source:
        self._measure(self.root)
        self._write(self.root)
        texts: dict[tuple[str, ...], str] = {}
        taken: dict[str, int] = {}
        classes: dict[str, str] = {}
        places: dict[str, list[str]] = {}
        for module, bodies in self.bodies.items():
            entry = self.tree.modules[module]
            base = f"nn.{entry.base}"
            key = (entry.cls, base, *bodies)
            if key not in texts:
                count = taken[entry.cls] = taken.get(entry.cls, -1) + 1
                texts[key] = f"{entry.cls}_{count}" if count else entry.cls
            classes[module] = texts[key]
            places.setdefault(texts[key], []).append(module)
        parts = [_class(name, key[1], places[name], key[2:]) for key, name in texts.items()]
        return Source("\n\n\n".join([_header("\n".join(parts)), *parts]) + "\n", classes)

    def _measure(self, frame: Frame) -> None:
        self.members[id(frame)] = set(frame.nodes())
        for item in frame.items:
            if isinstance(item, Frame):
                self._measure(item)

    def _write(self, frame: Frame) -> None:
        """Text of the inner frames first, then of `frame`."""
        for item in frame.items:
            if isinstance(item, Frame):
                self._write(item)
        is_root = frame is self.root
        outputs = [] if is_root else self._outputs(frame)
        inputs = self.placeholders if is_root else self._inputs(frame)
        method = self.methods[id(frame)] = Method(inputs, outputs)
        bodies = self.bodies.setdefault(frame.module, [])
        text = ""
        for attempt in range(len(bodies) + 1):
            method.name = f"forward_{attempt}" if attempt else "forward"
            text = Writer(
                self.tree, frame, self.methods, Names(inputs, dict(self.hints)), method,
                self.result if is_root else None, self.reserved,
            ).write()  # fmt: skip
            if attempt == len(bodies):
                bodies.append(text)
            if text == bodies[attempt]:
                break
        method.text = text

    def _outputs(self, frame: Frame) -> list[fx.Node]:
        inside = self.members[id(frame)]

        def read_outside(node: fx.Node) -> bool:
            return any(
                read_outside(user) if floats(user) else user not in inside for user in node.users
            )

        return [node for node in frame.nodes() if read_outside(node)]

    def _inputs(self, frame: Frame) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        sizes: dict[fx.Node, None] = {}
        inside = self.members[id(frame)]
        whole_cache = self.state_readers <= inside
        for node in self._reads(frame):
            if node in inside or (node.op == "get_attr" and self._reaches(frame, node)):
                continue
            if node.op == "call_function" and floats(node) and state_index(node) is None:
                sizes[node] = None
                continue
            if state_index(node) is not None and whole_cache:
                node = next(n for n in self.placeholders if n.target == "past")
            found[node] = None
        for node in sizes:
            if find_size(frame, list(found), node) is None:
                found[node] = None
        return sorted(found, key=self._order)

    def _order(self, node: fx.Node) -> tuple[int, int]:
        """Computed values in the order of their use, inputs, parameters, states, `start`."""
        if state_index(node) is not None or node.target == "past":
            return 3, self.rank[node]
        if node.op == "placeholder":
            return (4 if node.target == "start" else 1), self.rank[node]
        return (2 if node.op == "get_attr" else 0), 0

    def _reads(self, frame: Frame) -> Iterator[fx.Node]:
        for item in frame.items:
            if isinstance(item, Frame):
                yield from self.methods[id(item)].inputs
            else:
                yield from operands(item)

    def _reaches(self, frame: Frame, node: fx.Node) -> bool:
        return tensor_path(self.tree, frame.module, str(node.target)) is not None


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a call reads, in the order of its arguments; lengths are looked through."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    for value in found:
        if is_size_arithmetic(value):
            yield from operands(value)
        else:
            yield value


def _class(name: str, base: str, modules: list[str], bodies: tuple[str, ...]) -> str:
    where = re.sub(r"[^\w.{},\- ]", "?", places(modules))
    doc = f'{INDENT}"""{where}"""\n\n' if where else ""
    return f"class {name}({base}):\n{doc}" + "\n\n".join(bodies)


def places(modules: list[str]) -> str:
    """Qualified names with their first differing number as ranges: `model.layers.{0-5}.mlp`."""
    patterns: dict[str, list[int]] = {}
    for module in modules:
        match = re.search(r"(?<![^.])\d+(?![^.])", module)
        if match is None:
            patterns.setdefault(module, [])
            continue
        pattern = f"{module[: match.start()]}%{module[match.end() :]}"
        patterns.setdefault(pattern, []).append(int(match[0]))
    words = [pattern.replace("%", _ranges(found)) for pattern, found in patterns.items()]
    shown = ", ".join(word for word in words if word)
    return shown if len(shown) <= 88 else f"{shown[:84].rpartition(',')[0]}, ..."


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return words[0] if len(words) == 1 and "-" not in words[0] else f"{{{','.join(words)}}}"


_IMPORTS = (
    ("math.", "import math"),
    ("operator.", "import operator"),
    ("torch.", "import torch"),
    ("F.", "import torch.nn.functional as F"),
)


def _header(text: str) -> str:
    lines = [line for sign, line in _IMPORTS if re.search(rf"(?<![\w.]){re.escape(sign)}", text)]
    lines.append("from torch import nn")
    ops = sorted({name for name in _OPS if re.search(rf"(?<![\w.]){name}\(", text)})
    if ops:
        lines += ["", f"from fxopt.ir.ops import {', '.join(ops)}"]
    return "\n".join(lines)


def _our_functions() -> list[str]:
    from ..ir import ops

    return [n for n, f in vars(ops).items() if getattr(f, "__module__", "") == ops.__name__]


_OPS = _our_functions()


@lru_cache(maxsize=64)
def _execute(text: str) -> dict[str, Any]:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    # torch.compile looks up the globals of a function through its module's name.
    module = ModuleType(f"fxopt.generated_{digest}")
    sys.modules[module.__name__] = module
    name = f"<fxopt {digest}>"
    exec(compile(text, name, "exec"), vars(module))
    # Tracebacks and inspect.getsource show the generated lines.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    return vars(module)
