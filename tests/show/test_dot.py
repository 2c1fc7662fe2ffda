"""`plan.to_dot`: a graph that Graphviz takes, whatever the plan's texts hold."""

from __future__ import annotations

import re

import pytest

from fxopt.ir.errors import PlanError
from fxopt.ir.evidence import Block
from fxopt.ir.plan import Plan
from fxopt.show.dot import quoted
from tests.show.synthetic import CHANGED, llama

STRING = r'"(?:[^"\\]|\\.)*"'
VALUE = rf"(?:{STRING}|[A-Za-z_]\w*|\d+)"
ATTRIBUTES = rf"\[{VALUE}={VALUE}(?:, {VALUE}={VALUE})*\]"
STATEMENTS = {
    "node": rf"{STRING} {ATTRIBUTES};",
    "edge": rf"{STRING} -> {STRING} {ATTRIBUTES};",
    "default": rf"node {ATTRIBUTES};",
    "setting": rf"\w+={VALUE};",
    "open": rf"(?:digraph \w+|subgraph {STRING}) \{{",
    "close": r"\}",
}


def parsed(text: str) -> dict[str, list[str]]:
    """The statements of a DOT file by kind, one a line; its braces must be balanced."""
    found: dict[str, list[str]] = {kind: [] for kind in STATEMENTS}
    depth = 0
    for line in text.splitlines():
        (kind,) = (k for k, form in STATEMENTS.items() if re.fullmatch(form, line.strip()))
        depth += (kind == "open") - (kind == "close")
        found[kind].append(line.strip())
    assert depth == 0
    return found


def test_every_call_and_edge_is_written() -> None:
    plan = llama(3, 2)
    graph, dot = plan.graph(), parsed(plan.to_dot())
    assert len(dot["node"]) == len(graph)
    assert len(dot["edge"]) == graph.number_of_edges()
    assert len(dot["open"]) == 1 + len({node.rpartition("/")[0] for node in graph})
    decision = next(d for d in plan.rewritten if d.family == "linear")
    module, _, leaf = decision.key.rpartition(".")
    (node,) = (
        n for n in dot["node"] if n.startswith(quoted(f"{module.rpartition('.')[0]}/{leaf}"))
    )
    assert f"~ {leaf}\\naten.linear -> fxopt.monarch_linear\\n{decision.rewrite}" in node
    assert decision.reason in node


def test_changes_are_told_apart_without_colour() -> None:
    plan = llama(1, 1)
    plan.blocks = [Block(modules=["l.0"], lines=CHANGED, inputs={"x": ["/in"]})]
    nodes = {n.split('"')[1]: n for n in parsed(plan.to_dot())["node"]}
    styles = {name: re.findall(r'label="(..).*style="(.*?)"', n)[0] for name, n in nodes.items()}
    assert styles["l.0/gone"] == ("- ", "rounded,dashed")
    assert styles["l.0/new"] == ("+ ", "rounded,bold")
    assert styles["l.0/b"] == ("~ ", "rounded,bold")
    assert styles["l.0/a"][1] == "rounded"


def test_texts_of_a_plan_stay_texts() -> None:
    plan = llama(1, 1)
    hostile = 'a "quoted" \\ back\nline ]; }'
    for decision in plan.decisions:
        decision.reason = hostile
    assert len(parsed(plan.to_dot())["node"]) == len(plan.graph())


def test_a_plan_without_blocks_says_so(plan: Plan) -> None:
    with pytest.raises(PlanError, match="holds no graph"):
        plan.to_dot()
