"""A graph run node by node over many sequences at once, holding no more than is still read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..ir.site import EmbeddingInfo, Site
from .calibration import Batch
from .quality import Quality
from .recorder import Run


class Walk:
    """Runs `graph` over all `batches` together, one node after another.

    At any time it holds what is alive at one point of the program, for each sequence.
    """

    def __init__(
        self, graph: fx.GraphModule, batches: Sequence[Batch], run: Run, quality: Quality
    ) -> None:
        self._runs = [fx.Interpreter(graph) for _ in batches]
        for interpreter, batch in zip(self._runs, batches, strict=True):
            interpreter.args_iter = iter(_arguments(run, batch, quality.positions(batch)))
        self.nodes: list[fx.Node] = list(graph.graph.nodes)
        self._last = {source: n for n in self.nodes for source in n.all_input_nodes}
        self._next = 0

    def inputs(self, site: Site) -> list[Tensor]:
        """Run up to the node of `site`, and give what it reads for each sequence."""
        while self.nodes[self._next].name != site.node:
            self.proceed()
        operand = 1 if isinstance(site.info, EmbeddingInfo) else 0
        source: Any = self.nodes[self._next].args[operand]
        return self.values(source)

    def values(self, node: fx.Node) -> list[Any]:
        """What a node that is still read returned, for each sequence."""
        return [interpreter.env[node] for interpreter in self._runs]

    def alive(self) -> list[dict[fx.Node, Any]]:
        """All that is still read, for each sequence."""
        return [dict(interpreter.env) for interpreter in self._runs]

    def upto(self, index: int) -> None:
        """Run the nodes before that at `index`."""
        while self._next < index:
            self.proceed()

    def proceed(self, outputs: Sequence[Any] | None = None) -> None:
        """Run the next node, or take `outputs` for what it returns."""
        node = self.nodes[self._next]
        for i, interpreter in enumerate(self._runs):
            made = interpreter.run_node(node) if outputs is None else outputs[i]
            interpreter.env[node] = made
            for source in node.all_input_nodes:
                if self._last[source] is node:
                    del interpreter.env[source]
        self._next += 1


class _Arguments(BaseException):
    """Carries the graph's arguments out of the model around it, which may catch its own errors."""


def _arguments(run: Run, batch: Batch, positions: Tensor | None) -> list[Any]:
    def call(arguments: list[Any]) -> Sequence[Any]:
        raise _Arguments(arguments)

    try:
        run(call, batch, positions)
    except _Arguments as found:
        return found.args[0]
    raise AssertionError("the model was run without its graph")
