"""Blocks of real graphs: folded where layers are equal, and true to both graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxopt.capture import Captured, capture
from fxopt.emit.editor import GraphEditor
from fxopt.ir.evidence import Block
from fxopt.ir.site import Site
from fxopt.show import blocks as module
from fxopt.show.blocks import Graphs, blocks
from fxopt.show.network import Call, calls

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return capture(model, {"input_ids": torch.randint(0, 61, (2, 11))}, generate=True)


def site(captured: Captured, key: str) -> Site:
    return next(s for s in captured.sites if s.key == key and s.family != "activation")


def halve(editor: GraphEditor, at: Site) -> None:
    """A rewrite of one site: its result twice, halved."""
    with editor.applying("linear.halved"):
        half = editor.tensor(at, "scale", torch.tensor(0.5))
        twice = editor.call(at, torch.ops.aten.add.Tensor, (editor.node(at), editor.node(at)), {})
        editor.replace(at, editor.call(at, torch.ops.aten.mul.Tensor, (twice, half), {}))


def folded(captured: Captured, editor: GraphEditor) -> list[Block]:
    sites = [s for s in captured.sites if s.family != "activation"]
    return blocks(
        Graphs(
            captured.graph.graph,
            editor.graph.graph,
            {s.node: s.op for s in sites},
            {s.node: editor.node(s).name for s in sites},
            {name: dim.role for name, dim in captured.symbols.items() if dim.role},
        )
    )


def marked(block: Block, mark: str) -> Iterator[Call]:
    return (call for call in calls(block) if call.mark == mark)


def test_equal_layers_are_one_block(captured: Captured) -> None:
    outer, layer = folded(captured, GraphEditor(captured))
    assert outer.modules == [""]
    assert layer.modules == [f"model.layers.{i}" for i in range(3)]
    assert all(line[0] == " " for line in layer.lines)
    last = [c.name for c in calls(layer)][-1]
    assert layer.inputs["input"] == ["/embedding", *(f"model.layers.{i}/{last}" for i in (0, 1))]


def test_every_call_stands_in_one_line(captured: Captured) -> None:
    found = folded(captured, GraphEditor(captured))
    graph = captured.graph.graph
    shown = [n for n in graph.nodes if n.op == "call_function"]
    shown = [n for n in shown if not isinstance(n.meta.get("val"), torch.SymInt)]
    lines = sum(
        len(b.modules) * sum(c.op not in ("input", "return") for c in calls(b)) for b in found
    )
    assert lines == len(shown)


def test_a_rewritten_layer_is_a_block_of_its_own(captured: Captured) -> None:
    editor = GraphEditor(captured)
    at = site(captured, "model.layers.1.self_attn.q_proj")
    halve(editor, at)
    found = {tuple(b.modules): b for b in folded(captured, editor)}
    changed = found["model.layers.1",]
    assert ("model.layers.0", "model.layers.2") in found
    (after,) = (c for c in marked(changed, "+") if c.is_site)
    assert (after.name, after.op, after.module) == ("q_proj", "aten.mul", "self_attn.q_proj")
    assert "self_attn.q_proj.scale f32[]" in after.args
    assert "f32[batch, length, 32]" in after.type
    added = [c.op for c in marked(changed, "+") if not c.is_site]
    assert "aten.add" in added


def test_what_reads_a_rewritten_site_is_unchanged(captured: Captured) -> None:
    editor = GraphEditor(captured)
    at = site(captured, "model.layers.1.mlp.up_proj")
    with editor.applying("linear.negated"):
        old = editor.node(at)
        editor.replace(at, editor.call(at, torch.ops.aten.neg.default, (old.args[0],), {}))
    changed = next(b for b in folded(captured, editor) if b.modules == ["model.layers.1"])
    assert [c.op for c in marked(changed, "-")] == ["aten.linear"]
    assert [c.op for c in marked(changed, "+")] == ["aten.neg"]
    assert any("%up_proj" in c.args for c in marked(changed, " "))


def test_removed_calls_stand_where_they_stood(captured: Captured) -> None:
    editor = GraphEditor(captured)
    at = site(captured, "model.layers.1.mlp.down_proj")
    with editor.applying("linear.cut"):
        gate = editor.node(site(captured, "model.layers.1.mlp.gate_proj"))
        new = editor.call(at, torch.ops.aten.narrow.default, (gate, -1, 0, 32), {})
        editor.replace(at, new)
    changed = next(b for b in folded(captured, editor) if b.modules == ["model.layers.1"])
    removed = [c.name for c in marked(changed, "-")]
    assert {"up_proj", "silu", "down_proj"} <= set(removed)
    names = [c.name for c in calls(changed)]
    assert names.index("gate_proj") < names.index("silu") < names.index("down_proj")


def test_large_blocks_are_split_at_the_next_number(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 1)
    found = folded(captured, GraphEditor(captured))
    assert [b.modules[0] for b in found] == ["", "model.layers.0"]
    prefixes = {module._upto("a.0.b.1.c", depth) for depth in (1, 2, 3)}
    assert prefixes == {"a.0", "a.0.b.1"}
