"""One frame of the graph as the text of one `forward`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..ir.ops import add_rms_norm, attend
from .facts import facts, tensor_facts
from .frames import Frame, floats, is_size_arithmetic, state_index
from .layout import INDENT, WIDTH, assign, wrap
from .loops import Loop, find_loops
from .names import Names
from .paths import module_path, tensor_path
from .sizes import size_source
from .spelling import ATOM, Expr, literal, spell
from .targets import root
from .tree import Tree


@dataclass
class Method:
    """What a caller needs to know: the values to hand in, those that come back, and the text."""

    inputs: list[fx.Node]
    outputs: list[fx.Node]
    text: str = ""
    name: str = "forward"


@dataclass
class Statement:
    """One line to be: it assigns `outputs`; `write` makes its expression from its operands."""

    outputs: list[fx.Node | None]
    write: Callable[[Callable[[fx.Node], Expr]], Expr]
    loop: Loop | None = None


@dataclass
class Writer:
    """Writes the method of one frame; `methods` has those of the inner frames."""

    tree: Tree
    frame: Frame
    methods: dict[int, Method]
    names: Names
    method: Method
    result: Any
    reserved: frozenset[str] = frozenset()
    pending: list[tuple[fx.Node, Expr, list[fx.Node]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def write(self) -> str:
        """The text of the method, its `def` line included."""
        statements = [*self._statements(), Statement([], self._returned)]
        for statement in statements:
            for node in self._operands(statement):
                self.names.left[node] += 1
        self._name_inputs()
        for statement in statements[:-1]:
            self._add(statement)
        if self.result is not None or self.method.outputs:
            self._add(statements[-1], "return ")
        self._flush()
        words = ["self", *(self.names[node] for node in self.method.inputs)]
        head = wrap(f"{INDENT}def {self.method.name}({', '.join(words)}):")
        return "\n".join([*head, *(self.lines or [f"{INDENT * 2}pass"])])

    def _statements(self) -> Iterator[Statement]:
        loops = {
            id(loop.frames[0]): loop for loop in find_loops(self.frame, self.methods, self.tree)
        }
        skip: set[int] = set()
        for item in self.frame.items:
            if isinstance(item, fx.Node):
                if id(item) in skip:
                    continue
                self._name_roles(item)
                parts = self._parts(item)
                skip.update(id(part) for part in parts)
                yield Statement([*(parts or [item])], lambda ref, node=item: spell(node, ref))
            elif id(item) in loops:
                loop = loops[id(item)]
                skip.update(id(frame) for frame in loop.frames)
                self.names.hints[loop.result] = "x"
                self.names.hints[loop.carried] = "x"
                yield Statement([loop.result], lambda ref, loop=loop: self._loop(loop, ref), loop)
            elif id(item) not in skip:
                method = self.methods[id(item)]
                yield Statement([*method.outputs], lambda ref, f=item: self._call(f, ref))

    def _parts(self, node: fx.Node) -> list[fx.Node | None]:
        """The nodes that take a list apart, by position, when nothing else reads the list."""
        count = facts(node)
        if not isinstance(count, int) or count < 2 or not node.users:
            return []
        here = self.frame.own
        parts: list[fx.Node | None] = [None] * count
        for user in node.users:
            if user.target is not operator.getitem or user not in here:
                return []
            index: Any = user.args[1]
            if not isinstance(index, int) or not 0 <= index < count or parts[index] is not None:
                return []
            parts[index] = user
        return parts

    def _name_roles(self, node: fx.Node) -> None:
        if node.target is attend:
            for role, value in zip("qkv", node.args, strict=False):
                if isinstance(value, fx.Node):
                    self.names.hints[value] = role
        if "up_packed" in node.kwargs:
            self.names.hints[node] = "inner"
        if isinstance(residual := node.kwargs.get("residual"), fx.Node):
            self.names.hints[residual] = "residual"
        if node.target is add_rms_norm:
            self.names.hints.update({user: ("x", "normed")[user.args[1]] for user in node.users})  # pyright: ignore

    def _call(self, frame: Frame, ref: Callable[[fx.Node], Expr]) -> Expr:
        method = self.methods[id(frame)]
        words = ", ".join(ref(node).text for node in method.inputs)
        callee = module_path(self.tree, self.frame.module, frame.path, self.reserved)
        dotted = "" if method.name == "forward" else f".{method.name}"
        return Expr(f"{callee}{dotted}({words})")

    def _loop(self, loop: Loop, ref: Callable[[fx.Node], Expr]) -> Expr:
        """Only names the operands, in order; `_add_loop` writes the text."""
        for node in loop.operands:
            ref(node)
        return Expr("")

    def _returned(self, ref: Callable[[fx.Node], Expr]) -> Expr:
        if self.result is not None:
            return literal(self.result, ref)
        words = [ref(node).text for node in self.method.outputs]
        return Expr(", ".join(words))

    def _operands(self, statement: Statement) -> list[fx.Node]:
        """The named values that a statement reads, in the order of its text."""
        found: list[fx.Node] = []
        statement.write(lambda node: self._reference(node, found, lambda _: Expr("x")))
        return found

    def _reference(
        self, node: fx.Node, found: list[fx.Node], named: Callable[[fx.Node], Expr]
    ) -> Expr:
        if node in self.method.inputs or not floats(node):
            found.append(node)
            return named(node)
        if node.op == "get_attr":
            path = tensor_path(self.tree, self.frame.module, str(node.target), self.reserved)
            assert path is not None
            return Expr(path)
        if node.op == "placeholder" or state_index(node) is not None:
            source: Any = node if node.op == "placeholder" else node.args[0]
            found.append(source)
            index = "" if node.op == "placeholder" else f"[{state_index(node)}]"
            return Expr(f"{named(source).text}{index}")
        if is_size_arithmetic(node):
            return spell(node, lambda operand: self._reference(operand, found, named))
        source, attribute = size_source(self.frame, self.method.inputs, node)
        found.append(source)
        return Expr(f"{named(source).at(ATOM)}.{attribute}")

    def _name_inputs(self) -> None:
        plain = [
            n
            for n in self.method.inputs
            if n.op not in ("placeholder", "get_attr") and state_index(n) is None
        ]
        for node in self.method.inputs:
            if node.op == "placeholder":
                lone = not plain and self.frame.path and _is_float(node)
                base = "x" if lone and node is self.method.inputs[0] else str(node.target)
            elif state_index(node) is not None:
                base = "state"
            elif plain and node is plain[0] and tensor_facts(node) is not None:
                base = "x"
            else:
                base = ""
            self.names.bind(node, base)

    def _release(self) -> None:
        """Names outlive their last reader until the method ends; what is computed next must not
        find their memory taken."""
        if names := self.names.released():
            self.lines += wrap(f"{INDENT * 2}del {', '.join(names)}")

    def _add(self, statement: Statement, prefix: str = "") -> None:
        operands = self._operands(statement)
        waiting = [node for node, _, _ in self.pending]
        wanted = [node for node in operands if node in waiting]
        nests = statement.loop is None and wanted == waiting[len(waiting) - len(wanted) :]
        nests = nests and not self._would_hold(statement, wanted)
        if wanted and nests:
            expr, used = self._build(statement, wanted)
            nests = self._fits(statement, expr, prefix)
        if wanted and not nests:
            self._flush()
            wanted = []
        if statement.loop is not None:
            self._flush()
            self._add_loop(statement.loop)
            return
        expr, used = self._build(statement, wanted)
        if wanted:
            del self.pending[len(self.pending) - len(wanted) :]
        only = statement.outputs[0] if len(statement.outputs) == 1 else None
        if only is not None and self.names.left[only] == 1 and not prefix:
            self.pending.append((only, expr, used))
            return
        self._flush()
        self._emit(statement.outputs, expr, used, prefix)

    def _would_hold(self, statement: Statement, nested: list[fx.Node]) -> bool:
        """Whether names that the `nested` ops read last keep as much memory, while the statement
        makes its result, as that takes. Inner modules took more while they ran."""
        made = [node for node in statement.outputs if node is not None and root(node) is node]
        ops = [node for node in nested if node in self.frame.own]
        read = [u for node, _, used in self.pending if node in ops for u in used]
        last = [
            u
            for u in set(read)
            if self.names.left[u] == read.count(u) and self.names.is_computed_here(u)
        ]
        return bool(made and last) and sum(map(_width, last)) >= sum(map(_width, made))

    def _fits(self, statement: Statement, expr: Expr, prefix: str) -> bool:
        names = (self.names.hint(node) if node else "_" for node in statement.outputs)
        name = prefix or f"{', '.join(names)} = "
        return len(INDENT) * 2 + len(name) + len(expr.text) <= WIDTH

    def _build(self, statement: Statement, nested: list[fx.Node]) -> tuple[Expr, list[fx.Node]]:
        texts = {node: (expr, used) for node, expr, used in self.pending if node in nested}
        used: list[fx.Node] = []

        def named(node: fx.Node) -> Expr:
            if node in texts:
                used.extend(texts[node][1])
                return texts[node][0]
            used.append(node)
            return Expr(self.names.get(node) or "x")

        expr = statement.write(lambda node: self._reference(node, [], named))
        return expr, used

    def _flush(self) -> None:
        waiting, self.pending = self.pending, []
        for node, expr, used in waiting:
            self._emit([node], expr, used)

    def _emit(
        self, outputs: Sequence[fx.Node | None], expr: Expr, used: list[fx.Node], prefix: str = ""
    ) -> None:
        if "(" in expr.text and (prefix or any(root(node) is node for node in outputs)):
            self._release()
        self.names.spend(used)
        if any(node and self.names.left[node] for node in outputs) and not prefix:
            names = [
                self.names.bind(node, self.names.hint(node))
                if node and self.names.left[node]
                else "_"
                for node in outputs
            ]
            if expr.text == names[0] and len(names) == 1:
                return
            self.lines += assign(", ".join(names), expr.text)
            return
        self.lines += wrap(f"{INDENT * 2}{prefix}{expr.text}")

    def _add_loop(self, loop: Loop) -> None:
        """`for layer, state in zip(self.layers, past): x = layer(x, ..., state)`"""
        self._release()
        carried = self.names[loop.carried]
        self.names.spend([loop.carried])
        if self.names.taken(carried):
            fresh = self.names.bind(loop.result, "x")
            self.lines.append(f"{INDENT * 2}{fresh} = {carried}")
        else:
            fresh = self.names.bind(loop.result, carried)
        layer = self.names.free(loop.singular)
        states = [self.names.free("state", taken={layer}, skip=i) for i in range(len(loop.states))]
        names = iter(states)
        words: list[str] = []
        for node in self.methods[id(loop.frames[0])].inputs:
            if node is loop.carried:
                words.append(fresh)
            elif state_index(node) is not None and loop.varies(node):
                words.append(next(names))
            else:
                words.append(self._build(Statement([], lambda ref, n=node: ref(n)), [])[0].text)
        modules = module_path(self.tree, self.frame.module, loop.container, self.reserved)
        sources = [f"{modules}{loop.span(self.tree, self.frame.module)}"]
        past = next((self.names[n] for n in self.method.inputs if n.target == "past"), "past")
        sources += [f"{past}{part}" for part in loop.states]
        over = sources[0] if len(sources) == 1 else f"zip({', '.join(sources)}, strict=True)"
        call = "" if loop.method == "forward" else f".{loop.method}"
        head = ", ".join([layer, *states])
        self.lines += wrap(f"{INDENT * 2}for {head} in {over}:")
        self.lines += wrap(f"{INDENT * 3}{fresh} = {layer}{call}({', '.join(words)})")
        self.names.spend([node for node in loop.operands if node is not loop.carried])


def _width(node: fx.Node) -> int:
    """The sizes of a value that are known, multiplied."""
    known = tensor_facts(node)
    sizes = [] if known is None else [size for size in known.shape if isinstance(size, int)]
    return math.prod(sizes)


def _is_float(node: fx.Node) -> bool:
    known = tensor_facts(node)
    return known is not None and known.dtype.is_floating_point
