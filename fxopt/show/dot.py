"""The graph of a plan as DOT, for Graphviz: each module a frame, each change a shape and colour."""

from __future__ import annotations

from networkx import DiGraph

from fxopt.ir.plan import Plan

from .network import render as network

# Told apart without colour too: by the line and by the sign before the name.
STYLES = {
    "unchanged": {"color": "gray50", "style": "rounded"},
    "rewritten": {"color": "darkorange3", "style": "rounded,bold"},
    "added": {"color": "darkgreen", "style": "rounded,bold"},
    "removed": {"color": "firebrick", "style": "rounded,dashed"},
}
SIGNS = {"unchanged": "", "rewritten": "~ ", "added": "+ ", "removed": "- "}
EDGES = {"unchanged": "solid", "rewritten": "solid", "added": "bold", "removed": "dashed"}


def render(plan: Plan) -> str:
    """Every call before and after, as `plan.graph()` has them; `dot -Tsvg` draws it."""
    graph = network(plan)
    lines = [
        "digraph plan {",
        "  rankdir=TB;",
        '  node [shape=box, fontname="Helvetica", fontsize=10];',
    ]
    for index, (module, nodes) in enumerate(_modules(graph).items()):
        lines += [f"  subgraph {quoted(f'cluster_{index}')} {{", f"    label={quoted(module)};"]
        lines += [f"    {_node(graph, node)}" for node in nodes]
        lines.append("  }")
    for origin, node, facts in graph.edges(data=True):
        style = EDGES[facts["change"]]
        lines.append(f"  {quoted(origin)} -> {quoted(node)} [style={style}];")
    return "\n".join([*lines, "}"]) + "\n"


def quoted(text: str) -> str:
    """A DOT string, in which only the quote and the backslash mean something else."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _modules(graph: DiGraph[str]) -> dict[str, list[str]]:
    """Nodes by the block that they lie in."""
    found: dict[str, list[str]] = {}
    for node in graph:
        found.setdefault(node.rpartition("/")[0] or "outside the layers", []).append(node)
    return found


def _node(graph: DiGraph[str], node: str) -> str:
    facts = graph.nodes[node]
    change = facts.get("change", "unchanged")
    ops = dict.fromkeys(facts[key] for key in ("op_before", "op_after") if key in facts)
    words = [SIGNS[change] + node.rpartition("/")[2], " -> ".join(ops)]
    if change != "unchanged" and facts.get("rewrite"):
        words.append(facts["rewrite"])
    tip = facts.get("reason", facts.get("type", ""))
    values = {"label": "\n".join(filter(None, words)), "tooltip": str(tip), **STYLES[change]}
    listed = ", ".join(f"{key}={quoted(value)}" for key, value in values.items())
    return f"{quoted(node)} [{listed}];"
