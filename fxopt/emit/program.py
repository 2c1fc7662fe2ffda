"""What an emitted module is beside its tensors: graph, tree, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from .attributes import attribute
from .facts import facts, tensor_facts
from .tree import Tree


class Argument(NamedTuple):
    """A parameter of the original forward; `kind` is the name of its `inspect` kind."""

    name: str
    kind: str
    required: bool
    default: bool | int | float | str | None = None


class State(NamedTuple):
    """The cache of one attention: heads and sizes as the attention op sees them. `cross`: it is
    filled once, with the keys and values of another sequence."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    layout: str
    dtype: torch.dtype
    cross: bool = False


class CapturedModel(Protocol):
    """What emission reads of a capture."""

    @property
    def graph(self) -> fx.GraphModule: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def optional(self) -> frozenset[str]: ...
    @property
    def output(self) -> Any: ...
    @property
    def signature(self) -> inspect.Signature: ...
    @property
    def causal_lm(self) -> bool: ...
    @property
    def positions(self) -> Any: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def constants(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Program:
    """Everything that `graph.json` holds. The tree's tensors live in the module, not here.

    `sizes` are those of the inputs that were captured; `constants` the arguments that were no
    tensors; `reason` says why a model that generates has no graph for it.
    """

    name: str
    graph: fx.Graph
    tree: Tree
    inputs: tuple[str, ...]
    optional: frozenset[str]
    arguments: tuple[Argument, ...]
    output: Mapping[str, Any]
    causal_lm: bool = False
    positions: str | None = None
    reason: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])

    @property
    def placeholders(self) -> list[str]:
        return [str(node.target) for node in self.graph.find_nodes(op="placeholder")]

    @property
    def states(self) -> tuple[State, ...]:
        """One entry for each attention that keeps a cache, in the order of `past`."""
        nodes = [n for n in self.graph.nodes if n.kwargs.get("state") is not None]
        nodes.sort(key=lambda node: node.kwargs["state"].args[1])
        nodes = nodes or [n for n in self.graph.nodes if "cache" in n.meta]
        return tuple(_state(node) for node in nodes)

    @property
    def signature(self) -> inspect.Signature:
        """The original forward's signature, without annotations."""
        kinds = inspect.Parameter
        return inspect.Signature([
            kinds(a.name, getattr(kinds, a.kind), default=kinds.empty if a.required else a.default)
            for a in self.arguments
        ])  # fmt: skip


def program(
    captured: CapturedModel, graph: fx.Graph, tree: Tree, name: str, constants: Mapping[str, Any]
) -> Program:
    """The program of an edited graph; `tree` already has the edited parameters."""
    plain = (bool, int, float, str)
    return Program(
        name=name,
        graph=graph,
        tree=Tree(tree.modules, {}),
        inputs=captured.inputs,
        optional=captured.optional,
        arguments=tuple(_argument(p) for p in captured.signature.parameters.values()),
        output=captured.output.to_json(),
        causal_lm=captured.causal_lm,
        positions=captured.positions,
        reason=captured.reason,
        sizes=_sizes(captured.graph.graph),
        constants={k: v for k, v in constants.items() if isinstance(v, plain)},
    )


def edited_tree(
    model: nn.Module, captured: fx.GraphModule, edited: fx.GraphModule
) -> tuple[Tree, fx.Graph]:
    """The tree of `model` with the parameters that `edited` reads, and a copy of its graph that
    reads them there. Replaced parameters stand where the old ones stood; those that the original
    never read stay, unless they are other names of one that is read no more."""
    tree = Tree.of(model)
    graph = _copy(edited.graph)
    before, after = _reads(captured.graph), _reads(graph)
    order = {module: entry.names for module, entry in tree.modules.items()}
    gone = {tree.key(target) for target in before - after}
    for target in before - after:
        owner, _, name = target.rpartition(".")
        module = tree.module_id(owner)
        if module is not None:
            tree.drop(module, name)
    for key in gone - {tree.key(target) for target in after}:
        if key is not None:
            tree.forget(key)
    renamed: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target not in renamed:
            renamed[target] = target
            if tree.key(target) is None:
                renamed[target] = _adopt(tree, target, attribute(edited, target), before, order)
        node.target = renamed[target]
    return tree, graph


def _adopt(
    tree: Tree, target: str, value: Tensor, before: set[str], order: Mapping[str, list[str]]
) -> str:
    """Give a tensor that the original does not have a place in the tree; returns its name."""
    owner, _, name = target.rpartition(".")
    module = tree.module_id(owner)
    if target in before or module is None:
        return tree.constant(name, value)
    tree.add(module, name, value, order[module])
    return target


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy that knows of its values what `facts` says, and holds no fake tensors."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {})
    copied.output(result).meta = dict(graph.output_node().meta)
    for node in copied.nodes:
        known = facts(node)
        node.meta = {key: value for key, value in node.meta.items() if key != "val"}
        node.meta["facts"] = known
    return copied


def _sizes(graph: fx.Graph) -> dict[str, list[int]]:
    """The sizes that each input had when the graph was captured."""
    found: dict[str, list[int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            found[str(node.target)] = [
                int(size.node.hint) if isinstance(size, torch.SymInt) else size
                for size in value.shape
            ]
    return found


def _reads(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.find_nodes(op="get_attr")}


def _argument(parameter: inspect.Parameter) -> Argument:
    default = parameter.default
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    required = default is parameter.empty and not variadic
    plain = isinstance(default, (bool, int, float, str))
    return Argument(parameter.name, parameter.kind.name, required, default if plain else None)


def _state(node: fx.Node) -> State:
    query, key, value = (tensor_facts(node.args[i]) for i in range(3))
    assert query is not None
    assert key is not None
    assert value is not None
    layout = str(node.kwargs.get("layout", ""))
    heads = (int(query.shape[1]), int(key.shape[1]))
    sizes = (*heads, int(key.shape[3]), int(value.shape[3]))
    return State(*sizes, layout, key.dtype, node.meta.get("cache") == "cross")
