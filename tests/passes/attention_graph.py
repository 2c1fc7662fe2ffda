"""A graph of one attention, for tests of what rewrites make of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxopt.ir import ops
from fxopt.ir.site import Site


class GraphEditor:
    """One attention node, edited in place."""

    def __init__(self, **options: Any) -> None:
        self.graph = fx.Graph()
        inputs = [self.graph.placeholder(name) for name in "qkv"]
        self.attend = self.graph.call_function(ops.attend, tuple(inputs), options)
        self.graph.output(self.attend)

    def node(self, site: Site) -> fx.Node:
        return self.attend

    def update(self, site: Site, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            self.attend.update_kwarg(name, value)

    def run(self, *tensors: Tensor) -> Tensor:
        return fx.GraphModule(nn.Module(), self.graph)(*tensors)
