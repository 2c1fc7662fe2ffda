"""A linear site in an fx graph, its statistics, and the least editor that can rewrite it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.ir.rewrite import Candidate, Match, Rewrite
from fxopt.ir.site import LinearInfo, Site


@dataclass
class Recorded:
    """What calibration would have recorded: `gram` and a sample, both of `rows`."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = {"x": self.rows.to(self.weight.dtype)}

    @property
    def gram(self) -> Tensor:
        rows = self.rows.double()
        return rows.T @ rows / len(rows)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        return make()


@dataclass
class GraphEditor:
    """Edits the one call in `module` and remembers which tensors it registered."""

    module: fx.GraphModule
    registered: list[str] = field(default_factory=list)

    def node(self, site: Site) -> fx.Node:
        return next(n for n in self.module.graph.nodes if n.name == site.node)

    def tensor(self, site: Site, name: str, value: Tensor) -> fx.Node:
        self.registered.append(name)
        if value.is_floating_point():
            self.module.register_parameter(name, nn.Parameter(value))
        else:
            self.module.register_buffer(name, value)
        with self.module.graph.inserting_before(self.node(site)):
            return self.module.graph.get_attr(name)

    def call(self, site: Site, target: Any, args: tuple[Any, ...], kwargs: Any) -> fx.Node:
        with self.module.graph.inserting_before(self.node(site)):
            return self.module.graph.call_function(target, args, kwargs)

    def replace(self, site: Site, new: fx.Node) -> None:
        old = self.node(site)
        old.replace_all_uses_with(new)
        self.module.graph.erase_node(old)
        self.module.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.recompile()

    def update(self, site: Site, **kwargs: Any) -> None:
        raise AssertionError("no linear rewrite updates its node in place")


def site_of(weight: Tensor, bias: Tensor | None = None, **changes: Any) -> Site:
    """The site of a linear layer with this weight; `changes` to the info or the site."""
    info = LinearInfo(
        "weight", None if bias is None else "bias", weight.shape[1], weight.shape[0], weight.dtype
    )
    known = LinearInfo.__dataclass_fields__
    info = replace(info, **{k: v for k, v in changes.items() if k in known})
    rest = {k: v for k, v in changes.items() if k not in known}
    return Site("linear", "layer", "linear", info, "layer", **rest)


def graph_of(weight: Tensor, bias: Tensor | None, transposed: bool) -> fx.GraphModule:
    """x -> linear(x, weight, bias) + 0 as capture leaves it."""
    root = nn.Module()
    root.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
    graph = fx.Graph()
    node = graph.get_attr("weight") if bias is None else None
    x = graph.placeholder("x")
    if bias is not None:
        root.bias = nn.Parameter(bias)
        node = graph.get_attr("weight")
    if transposed:
        node = graph.call_function(torch.ops.aten.t.default, (node,))
    args = (x, node) if bias is None else (x, node, graph.get_attr("bias"))
    graph.output(
        graph.create_node("call_function", torch.ops.aten.linear.default, args, {}, "linear")
    )
    return fx.GraphModule(root, graph)


Rewritten = tuple[fx.GraphModule, GraphEditor]


def rewrite_graph(
    rewrite: Rewrite,
    candidate: Candidate,
    tensors: Mapping[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool = False,
) -> Rewritten:
    """A graph of the layer after `rewrite.apply`."""
    editor = GraphEditor(graph_of(weight, bias, transposed))
    rewrite.apply(Match(site_of(weight, bias, transposed=transposed)), candidate, tensors, editor)
    editor.module.graph.lint()
    return editor.module, editor


@pytest.fixture
def site() -> Callable[..., Site]:
    return site_of


@pytest.fixture
def recorded() -> type[Recorded]:
    return Recorded


@pytest.fixture
def rewritten() -> Callable[..., Rewritten]:
    return rewrite_graph


@pytest.fixture
def correlated() -> Callable[[int, int], Tensor]:
    """Rows [count, features] whose spectrum decays, as activations' do."""

    def draw(count: int, features: int) -> Tensor:
        mixing = torch.randn(features, features) / features**0.5
        return torch.randn(count, features) * torch.arange(1, features + 1) ** -0.5 @ mixing

    return draw
