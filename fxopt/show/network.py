"""The graph of a plan for other tools: every call before and after, as one networkx graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from networkx import DiGraph

from fxopt.ir.errors import PlanError
from fxopt.ir.evidence import Block
from fxopt.ir.plan import Decision, Plan

from .costs import together
from .entries import counted, ops_of, why

LINE = re.compile(
    r"(?P<mark>.)%(?P<name>\w+) = (?P<op>[\w.]+)\((?P<args>.*)\) -> (?P<type>.*) "
    r"(?P<word>at|in)(?: (?P<module>.*))?",
    re.DOTALL,
)
SIDES = {" ": ("before", "after"), "-": ("before",), "+": ("after",)}


@dataclass(frozen=True)
class Call:
    """One line of a block: a call on the sides where it stands."""

    mark: str
    name: str
    op: str
    args: str
    type: str
    is_site: bool
    module: str

    @property
    def inputs(self) -> list[str]:
        return re.findall(r"%(\w+)", self.args)


def calls(block: Block) -> Iterator[Call]:
    """The calls of a block in order."""
    for line in block.lines:
        found = LINE.fullmatch(line)
        if found is None:
            raise PlanError(f"the plan's graph has a line that is no call: {line!r}")
        parts = found.groupdict(default="")
        is_site = parts.pop("word") == "at"
        yield Call(**parts, is_site=is_site)


def render(plan: Plan) -> DiGraph[str]:
    """Nodes "module/name" with strings and numbers alone, so that every format takes them.

    `change` is "unchanged", "rewritten", "added" or "removed", of nodes and edges; `op_before`,
    `op_after`, `type` and `module` tell of the call; nodes of sites also have `family`, `rewrite`,
    `reason`, `error` and `seconds` (of all heads of an attention op; the first reason).
    `Plan.to_dot` writes it for Graphviz.
    """
    if not plan.blocks:
        raise PlanError("the plan holds no graph: make it again with fxopt.plan or fxopt.optimize")
    graph: DiGraph[str] = DiGraph()
    sites: dict[str, list[Decision]] = {}
    for decision in plan.decisions:
        for op in ops_of(decision.key):
            sites.setdefault(op, []).append(decision)
    for block in plan.blocks:
        for index, module in enumerate(block.modules):
            inputs = {name: origins[index] for name, origins in block.inputs.items()}
            _add(graph, block, module, inputs, sites, plan)
    return graph


def _add(
    graph: DiGraph[str],
    block: Block,
    module: str,
    inputs: Mapping[str, str],
    sites: Mapping[str, list[Decision]],
    plan: Plan,
) -> None:
    """The calls of one block in one module."""
    for call in calls(block):
        node = f"{module}/{call.name}"
        known = graph.nodes.get(node, {})
        marks = known.get("marks", "") + call.mark
        where = ".".join(part for part in (module, call.module) if part)
        facts = {f"op_{side}": call.op for side in SIDES[call.mark]}
        graph.add_node(node, marks=marks, module=where, type=call.type, **facts)
        if call.is_site and where in sites:
            graph.nodes[node].update(_facts(sites[where], plan))
        for name in call.inputs:
            origin = inputs.get(name, f"{module}/{name}")
            edge = graph.get_edge_data(origin, node, {})
            graph.add_edge(origin, node, marks=edge.get("marks", "") + call.mark)
    for node in (f"{module}/{name}" for name in {call.name for call in calls(block)}):
        _settle(graph.nodes[node], "rewritten")
        for origin in graph.predecessors(node):
            _settle(graph.edges[origin, node], "unchanged")


def _settle(facts: dict[str, str], both: str) -> None:
    """Marks become the word for them; `both` is what "-" and "+" together mean."""
    words = {" ": "unchanged", "-": "removed", "+": "added"}
    marks = set(facts.pop("marks"))
    facts["change"] = both if len(marks) > 1 else words[marks.pop()]


def _facts(decisions: list[Decision], plan: Plan) -> dict[str, str | float]:
    """What is decided at one op."""
    errors = [d.error for d in counted(decisions) if d.error is not None]
    rewritten = [d for d in decisions if d.rewritten] or decisions
    return {
        "family": rewritten[0].family,
        "rewrite": "; ".join(dict.fromkeys(d.choice for d in rewritten)),
        "reason": why(rewritten[0]),
        "error": together(errors, plan),
        "seconds": sum(d.cost.seconds for d in counted(decisions)),
    }
