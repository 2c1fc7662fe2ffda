"""The one way to change a canonical graph; what it did is the graph's diff."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload

from ..ir.errors import FxoptError
from ..ir.site import Site
from .attributes import read, write_back
from .targets import check_legal

# Families whose sites name the module of their node.
NODE_FAMILIES = ("attention", "kv_cache", "linear")


class HasGraph(Protocol):
    """The part of a capture that is edited."""

    @property
    def graph(self) -> fx.GraphModule: ...


@dataclass(frozen=True)
class Edit:
    """One change of the graph, as text: `before` is empty for what is new."""

    kind: Literal["tensor", "call", "replace", "update", "drop"]
    site_key: str
    rewrite: str
    before: str
    after: str


class GraphEditor:
    """Edits a copy of a captured graph. After `finish`, `graph` is the result.

    Sites are those of the canonical graph and stay valid through edits: `node` follows what
    replaced them. New nodes belong to the module of the node that they stand in for.
    """

    def __init__(self, captured: HasGraph) -> None:
        source = captured.graph
        self.records: list[Edit] = []
        self._attributes = read(source)
        self._body = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = self._body.graph_copy(source.graph, copies)
        self._body.output(result).meta = dict(source.graph.output_node().meta)
        self._nodes = {old.name: new for old, new in copies.items()}
        self._fqns = {old.name: old.meta.get("fqn", "") for old in copies}
        self._later: set[fx.Node] = set()
        self._known = {old.name: new for old, new in copies.items() if old.op == "get_attr"}
        self._fake: Any = detect_fake_mode([n.meta.get("val") for n in source.graph.nodes])
        self._rewrite = ""
        self._graph: fx.GraphModule | None = None
        self._name = type(source).__name__

    @property
    def graph(self) -> fx.GraphModule:
        """The edited graph; its parameters that no rewrite replaced are the original's own."""
        if self._graph is None:
            return self.finish()
        return self._graph

    @contextmanager
    def applying(self, rewrite: str) -> Generator[None]:
        """Name the rewrite whose edits follow."""
        self._rewrite, self._graph = rewrite, None
        try:
            yield
        finally:
            self._rewrite = ""

    def node(self, site: Site) -> fx.Node:
        found = self._nodes.get(site.node)
        where = site.op.partition("#")[0]
        if found is None or (site.family in NODE_FAMILIES and self._fqns[site.node] != where):
            raise FxoptError(
                f"{site.key}: node {site.node!r} is not in this graph; the site was found in "
                "another capture of the model"
            )
        return found

    def tensor(self, site: Site, name: str, value: Tensor) -> fx.Node:
        module = site.op.partition("#")[0].replace("/", ".").partition("@")[0]
        prefix = f"{module}." if module else ""
        target, count = prefix + name, 0
        while target in self._attributes:
            count += 1
            target = f"{prefix}{name}_{count}"
        value = self._attributes[target] = _held(value)
        old = self.node(site)
        with self._body.inserting_before(old):
            new = self._body.create_node("get_attr", target, name=target.replace(".", "_"))
        new.meta = self._inherit(old)
        self._see(new, value)
        self._record("tensor", site, "", describe(new))
        return new

    def amend(self, site: Site, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        name, before = str(node.target), describe(node)
        self._attributes[name] = _held(change(self._attributes[name].detach()))
        self._see(node, self._attributes[name])
        self._record("tensor", site, before, describe(node))

    def call(
        self, site: Site, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        old = self.node(site)
        operands: list[fx.Node] = []
        fx.map_arg((args, kwargs), operands.append)
        wrapped = [node for node in operands if node is old or node in self._later]
        if wrapped:
            last = max(wrapped)
            with self._body.inserting_after(last):
                new = self._body.call_function(target, args, kwargs)
            self._later.add(new)
        else:
            with self._body.inserting_before(old):
                new = self._body.call_function(target, args, kwargs)
        new.meta = self._inherit(old)
        self._infer(new)
        self._record("call", site, "", describe(new))
        return new

    def replace(self, site: Site, new: fx.Node) -> None:
        old = self.node(site)
        self._record("replace", site, describe(old), describe(new))
        inside = _between(old, new)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
        if old.target is new.target and "op" in old.meta:
            new.meta["op"] = old.meta["op"]
        for name, node in self._nodes.items():
            if node is old:
                self._nodes[name] = new

    def update(self, site: Site, **arguments: Any) -> None:
        node = self.node(site)
        before, names = describe(node), _positional(node)
        for name, value in arguments.items():
            if name in names:
                node.update_arg(names.index(name), value)
            else:
                node.update_kwarg(name, value)
        node.meta = {**node.meta, "fxopt": self._rewrite, "site": site.key}
        self._record("update", site, before, describe(node))

    def finish(self) -> fx.GraphModule:
        """Drop what nothing reads any more, check that every call is legal, build `graph`."""
        self._body.eliminate_dead_code()
        self._body.lint()
        check_legal(self._body)
        alive = {str(n.target) for n in self._body.nodes if n.op == "get_attr"}
        for node in self._known.values():
            if str(node.target) not in alive and str(node.target) in self._attributes:
                dropped = self._attributes.pop(str(node.target))
                self.records.append(Edit("drop", str(node.target), "", _shape(dropped), ""))
        kept = {name: value for name, value in self._attributes.items() if name in alive}
        self._graph = write_back(kept, self._body, self._name)
        return self._graph

    def _inherit(self, old: fx.Node) -> dict[str, Any]:
        kept = {key: old.meta[key] for key in ("nn_module_stack", "fqn") if key in old.meta}
        return {**kept, "fxopt": self._rewrite, "site": old.meta.get("fqn", "")}

    def _see(self, node: fx.Node, value: Tensor) -> None:
        fake = self._fake
        node.meta["val"] = fake.from_tensor(value, static_shapes=True) if fake else value

    def _infer(self, node: fx.Node) -> None:
        """Run the call on the fake tensors of its operands."""
        if self._fake is None:
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        # Composite ops as Python decomposes them: in C++ some read sizes as numbers (`aten.linear`
        # on CUDA in torch 2.11), which would fix the sizes of the trace.
        with self._fake, torch.no_grad(), enable_python_dispatcher():
            target: Any = node.target
            node.meta["val"] = target(*args, **kwargs)

    def _record(self, kind: Any, site: Site, before: str, after: str) -> None:
        self.records.append(Edit(kind, site.key, self._rewrite, before, after))


def _held(value: Tensor) -> Tensor:
    """A Parameter if floating, else the tensor itself."""
    if not value.is_floating_point() or isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach())


def _positional(node: fx.Node) -> list[str]:
    """Names of the arguments that a call of a Python function gives by position."""
    if isinstance(node.target, OpOverload) or not callable(node.target):
        return []
    return list(inspect.signature(node.target).parameters)[: len(node.args)]


def describe(node: fx.Node) -> str:
    """One line: what is called on what, with the shapes of parameters."""
    if node.op == "get_attr":
        return f"{node.target} {_shape(node.meta.get('val'))}".rstrip()
    if node.op != "call_function":
        return node.name
    target: Any = node.target
    name = str(target) if isinstance(target, OpOverload) else target.__name__
    words = [_word(arg) for arg in node.args]
    words += [f"{key}={_word(value)}" for key, value in node.kwargs.items()]
    return f"{name.removesuffix('.default')}({', '.join(words)})"


def _word(value: Any) -> str:
    if isinstance(value, fx.Node):
        return describe(value) if value.op == "get_attr" else value.name
    return repr(value)


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _between(old: fx.Node, new: fx.Node) -> set[fx.Node]:
    """`new` and what it is computed from, back to `old`: among them are the readers of `old` that
    go on reading it."""
    found, waiting = set[fx.Node](), [new]
    while waiting:
        current = waiting.pop()
        if current not in found and current > old:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found
