from __future__ import annotations

from pathlib import Path

import networkx
import pytest

from fxopt.ir.errors import PlanError
from fxopt.ir.evidence import Block
from fxopt.ir.plan import Plan
from tests.show.synthetic import CHANGED, llama


def test_graph_has_every_call_once_a_layer_and_its_decision() -> None:
    plan = llama(3, 2)
    graph = plan.graph()
    names = {line.partition(" = ")[0][1:] for line in plan.blocks[0].lines}
    inner = [node for node in graph if node.startswith("model.layers.0/")]
    assert len(inner) == len(names)
    assert networkx.is_directed_acyclic_graph(graph)
    for decision in plan.decisions:
        if decision.family == "linear":
            layer, _, leaf = decision.key.rpartition(".")
            node = graph.nodes[f"{layer.rpartition('.')[0]}/{leaf}"]
            assert node["change"] == ("rewritten" if decision.rewritten else "unchanged")
            assert node["rewrite"].startswith(decision.rewrite.replace("keep", "kept"))
            assert node["error"] == decision.error
    last = plan.blocks[0].lines[-1].partition(" = ")[0][2:]
    assert graph.has_edge(f"model.layers.0/{last}", "model.layers.1/pow_1")


def test_added_and_removed_calls_and_edges() -> None:
    plan = llama(1, 1)
    plan.blocks = [Block(modules=["l.0", "l.1"], lines=CHANGED, inputs={"x": ["/in", "l.0/b"]})]
    graph = plan.graph()
    changes = {node: data["change"] for node, data in graph.nodes(data=True) if node != "/in"}
    for layer in ("l.0", "l.1"):
        assert changes[f"{layer}/a"] == "unchanged"
        assert changes[f"{layer}/gone"] == "removed"
        assert changes[f"{layer}/new"] == "added"
        assert changes[f"{layer}/b"] == "rewritten"
        assert graph.edges[f"{layer}/a", f"{layer}/b"]["change"] == "unchanged"
        assert graph.edges[f"{layer}/gone", f"{layer}/b"]["change"] == "removed"
        assert graph.edges[f"{layer}/new", f"{layer}/b"]["change"] == "added"
    assert graph.nodes["l.0/b"]["op_before"] == "aten.add"
    assert graph.nodes["l.0/b"]["op_after"] == "aten.mul"
    assert list(graph.successors("l.0/b")) == ["l.1/a"]


def test_other_formats_take_the_graph(tmp_path: Path) -> None:
    graph = llama(2, 1).graph()
    networkx.write_graphml(graph, tmp_path / "plan.graphml")
    read = networkx.read_graphml(tmp_path / "plan.graphml")
    assert set(read) == set(graph)
    assert not any(":" in node for node in graph)  # in DOT a colon begins a port


def test_a_plan_without_blocks_says_so(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"holds no graph: make it again"):
        plan.graph()
