"""MLP of all tokens at once -> the same MLP a few rows at a time.

    y = down(act(gate(x)) * up(x))                       # [B, T, intermediate] exists
    y = fxopt.chunked(x, weights, program, chunk=4096)   # [4096, intermediate] does

Exact. Pays in peak memory where the intermediate is the largest temporary, as in the prefill of
long prompts; costs one launch of each op a chunk. Calls of few rows run at once.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fxopt.ir.cost import OpCall
from fxopt.ir.errors import PlanError
from fxopt.ir.rewrite import Candidate, Editor, Match, Refusal, Statistic
from fxopt.ir.site import Family, Site, TemporaryInfo, rows_of
from fxopt.ir.workload import Scenario
from fxopt.kernels.chunked.op import TARGET
from fxopt.passes.activation import calls
from fxopt.passes.activation.unchanged import Unchanged


@dataclass(frozen=True)
class Chunked(Unchanged):
    """`chunks` are rows (tokens of all sequences) at a time."""

    chunks: tuple[int, ...] = (256, 1024, 4096)

    name: ClassVar[str] = "activation.chunked"
    family: ClassVar[Family] = "activation"
    workloads: ClassVar[frozenset[str]] = frozenset({"forward", "generate"})
    version: ClassVar[int] = 1
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.19370"
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    def match(self, site: Site) -> Match | Refusal:
        if not isinstance(site.info, TemporaryInfo):
            return Refusal(f"{site.family} site: the rewrite serves large temporaries")
        if site.blocked is not None:
            return Refusal(site.blocked)
        if site.info.kind != "mlp":
            return Refusal("the logits are an output and have to exist whole")
        return Match(site)

    def candidates(self, match: Match, scenarios: Sequence[Scenario]) -> list[Candidate]:
        rows = _most_rows(match, scenarios)
        return [
            Candidate(self.name, f"rows{chunk}", {"chunk": chunk})
            for chunk in sorted(self.chunks)
            if 2 * chunk <= rows
        ]

    def refusal(self, match: Match, scenarios: Sequence[Scenario]) -> str | None:
        """Why there is no candidate for these scenarios, in numbers; None if there are some."""
        if self.candidates(match, scenarios):
            return None
        return (
            f"the largest call has {_most_rows(match, scenarios)} rows; the smallest chunk, "
            f"{min(self.chunks)}, pays from {2 * min(self.chunks)}"
        )

    def lower(self, match: Match, candidate: Candidate, scenario: Scenario) -> list[OpCall]:
        """The bytes of one chunk and of the result, and the launches of the further chunks."""
        info = calls.temporary_info(match)
        return [calls.temporary_call(info, rows_of(info, scenario), _chunk(candidate))]

    def apply(
        self, match: Match, candidate: Candidate, tensors: Mapping[str, Tensor], editor: Editor
    ) -> None:
        """Replace the nodes up to the linears that share an input, whatever other rewrites have
        made of those linears."""
        site = match.site
        last = editor.node(site)
        x, nodes = _between(site, last)
        parameters, program = write(x, nodes)
        args = (x, parameters, program, _chunk(candidate))
        editor.replace(site, editor.call(site, TARGET, args, {}))


def write(x: fx.Node, nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], str]:
    """`nodes` as a program over `x` (see `kernels/chunked/program.py`), and its other tensors."""
    names: dict[fx.Node, str] = {x: "x"}
    parameters: list[fx.Node] = []
    lines: list[str] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in names:
                names[source] = f"t{len(parameters)}"
                parameters.append(source)
        words = [_word(value, names) for value in node.args]
        words += [f"{key}={_word(value, names)}" for key, value in node.kwargs.items()]
        names[node] = f"v{len(lines)}"
        target = "getitem" if node.target is operator.getitem else str(node.target)
        lines.append(f"{names[node]} = {target.removesuffix('.default')}({', '.join(words)})")
    return parameters, "; ".join(lines)


def _between(site: Site, last: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The shared input of the first linears, and the nodes from them to `last`, in order."""
    inside, sources, waiting = set[fx.Node](), set[fx.Node](), [last]
    while waiting:
        node = waiting.pop()
        if node.op != "call_function" or node in inside:
            continue
        inside.add(node)
        if not _is_linear(node):
            waiting += node.all_input_nodes
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        # a rewrite makes several calls of one linear
        again = _is_linear(source) and source.meta.get("fxopt")
        if again or node is last or _replaces(node, last):
            waiting.append(source)
        else:
            sources.add(source)
    if len(sources) != 1:
        raise PlanError(
            f"{site.key}: activation.chunked finds no single input of this MLP any more; another "
            "rewrite changed it; keep one of the two out with rewrites= or keep="
        )
    return sources.pop(), [node for node in last.graph.nodes if node in inside]


def _replaces(node: fx.Node, last: fx.Node) -> bool:
    """Whether a rewrite made both nodes, in place of one."""
    return bool(node.meta.get("fxopt")) and node.meta.get("fqn") == last.meta.get("fqn")


def _is_linear(node: fx.Node) -> bool:
    """A linear layer, or what a rewrite of the linear family made of it."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    return target is torch.ops.aten.linear.default or target.namespace == "fxopt"


def _word(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_word(item, names) for item in value)}]"
    return str(value) if isinstance(value, torch.dtype) else repr(value)


def _chunk(candidate: Candidate) -> int:
    return int(candidate.parameters["chunk"])


def _most_rows(match: Match, scenarios: Sequence[Scenario]) -> int:
    info = calls.temporary_info(match)
    return max((rows_of(info, scenario) for scenario in scenarios), default=0)
