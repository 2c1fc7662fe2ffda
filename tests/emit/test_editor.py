"""The editor: legal edits, their records, and what remains of the graph and its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxopt.capture import capture
from fxopt.capture.shapes import static_dims
from fxopt.emit.editor import Edit, GraphEditor, check_legal
from fxopt.emit.module import emit
from fxopt.ir.errors import FxoptError


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6, bias=False)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def pair():
    model = Pair().eval()
    x = torch.randn(3, 6)
    captured = capture(model, x)
    return model, x, captured, {s.key: s for s in captured.sites if s.family == "linear"}


def test_nothing_edited_is_the_same_graph(pair):
    _, x, captured, _ = pair
    editor = GraphEditor(captured)
    graph = editor.finish()
    before, after = (list(g.graph.nodes) for g in (captured.graph, graph))
    assert [n.format_node() for n in before] == [n.format_node() for n in after]
    assert torch.equal(graph(x)[0], captured.graph(x)[0])
    assert editor.records == []


def test_replacing_changes_only_the_copy(pair):
    model, x, captured, sites = pair
    editor = GraphEditor(captured)
    site = sites["second"]
    with editor.applying("linear.test"):
        weight = editor.tensor(site, "weight", 2 * model.second.weight.detach())
        source = editor.node(site).args[0]
        new = editor.call(site, torch.ops.aten.linear.default, (source, weight), {})
        editor.replace(site, new)
    graph = editor.finish()
    torch.testing.assert_close(graph(x)[0], 2 * model(x))
    torch.testing.assert_close(captured.graph(x)[0], model(x))
    assert editor.node(site) is new
    assert new.meta["fxopt"] == "linear.test"
    assert new.meta["fqn"] == "second"
    assert tuple(new.meta["val"].shape)[1:] == (6,)
    assert new.meta["val"].shape[0] == source.meta["val"].shape[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_new_call_leaves_the_sizes_open(device):
    """`aten.linear` on CUDA in torch 2.11 reads those of a batch of rows as numbers."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).to(device, torch.bfloat16).eval()
    captured = capture(model, torch.randn(2, 11, 16, device=device, dtype=torch.bfloat16))
    fixed = static_dims(captured.graph.graph)
    assert fixed == ("input dim 2 = 16",)
    site = next(site for site in captured.sites if site.family == "linear")
    editor = GraphEditor(captured)
    weight = editor.tensor(site, "weight", torch.ones(16, 16, device=device, dtype=torch.bfloat16))
    arguments = (editor.node(site).args[0], weight)
    editor.replace(site, editor.call(site, torch.ops.aten.linear.default, arguments, {}))
    assert static_dims(editor.finish().graph) == fixed
    captured.arguments(torch.ones(3, 5, 16, device=device, dtype=torch.bfloat16))


def test_records_tell_what_happened_in_order(pair):
    model, _, captured, sites = pair
    editor = GraphEditor(captured)
    site = sites["first"]
    with editor.applying("linear.test"):
        weight = editor.tensor(site, "weight", model.first.weight.detach())
        new = editor.call(
            site, torch.ops.aten.linear.default, (editor.node(site).args[0], weight), {}
        )
        editor.replace(site, new)
    editor.finish()
    kinds = [record.kind for record in editor.records]
    assert kinds == ["tensor", "call", "replace", "drop", "drop"]
    assert {record.rewrite for record in editor.records[:3]} == {"linear.test"}
    assert editor.records[0] == Edit(
        "tensor", "first", "linear.test", "", "first.weight_1 float32[8, 6]"
    )
    assert "first.weight float32[8, 6]" in editor.records[2].before
    assert {record.site_key for record in editor.records[3:]} == {"first.weight", "first.bias"}


def test_a_wrapped_site_keeps_its_own_call(pair):
    model, x, captured, sites = pair
    editor = GraphEditor(captured)
    site = sites["first"]
    with editor.applying("linear.test"):
        half = editor.call(site, torch.ops.aten.mul.Tensor, (editor.node(site), 0.5), {})
        editor.replace(site, editor.call(site, torch.ops.aten.neg.default, (half,), {}))
    expected = model.second(torch.relu(-0.5 * model.first(x)))
    torch.testing.assert_close(editor.finish()(x)[0], expected)


def test_replaced_parameters_stand_in_place_and_unread_ones_stay(pair):
    model, x, captured, sites = pair
    editor = GraphEditor(captured)
    site = sites["first"]
    with editor.applying("linear.test"):
        source, _, bias = editor.node(site).args
        codes = editor.tensor(site, "codes", torch.ones(8, 6, dtype=torch.int8))
        scale = editor.tensor(site, "scale", torch.ones(8, 1))
        weight = editor.call(site, torch.ops.aten.mul.Tensor, (codes, scale), {})
        editor.replace(
            site, editor.call(site, torch.ops.aten.linear.default, (source, weight, bias), {})
        )
    opt = emit(captured, editor, model)
    assert list(opt.state_dict()) == [
        "spare", "first.scale", "first.bias", "first.codes", "second.weight",
    ]  # fmt: skip
    assert opt.first.bias is model.first.bias
    assert opt.second.weight is model.second.weight
    hidden = torch.relu(x @ torch.ones(6, 8) + model.first.bias)
    torch.testing.assert_close(opt(x), hidden @ model.second.weight.T)


def test_one_name_of_a_tied_weight_goes_and_the_other_stays(case):
    found = case("gpt2")
    site = next(s for s in found.captured.sites if s.key == "lm_head")
    editor = GraphEditor(found.captured)
    with editor.applying("linear.test"):
        weight = editor.tensor(site, "codes", found.model.lm_head.weight.detach().clone())
        source = editor.node(site).args[0]
        editor.replace(site, editor.call(site, torch.ops.aten.linear.default, (source, weight), {}))
    opt = found.emit(editor)
    names = list(opt.state_dict())
    assert "lm_head.weight" not in names
    assert "lm_head.codes" in names
    assert opt.transformer.wte.weight is found.model.transformer.wte.weight
    with torch.no_grad():
        assert torch.equal(opt(**found.example).logits, found.model(**found.example).logits)


def test_illegal_calls_are_one_error(pair):
    _, _, captured, sites = pair
    editor = GraphEditor(captured)
    site = sites["second"]
    with editor.applying("linear.bad"):
        editor.replace(site, editor.call(site, torch.nn.functional.relu, (editor.node(site),), {}))
    with pytest.raises(FxoptError, match=r"second: the graph calls .*relu.*linear\.bad"):
        editor.finish()


@pytest.mark.parametrize(
    "target", [eval, print, torch.load, "method"], ids=lambda t: getattr(t, "__name__", t)
)
def test_only_ops_and_known_functions_are_legal(target):
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("numpy", (x,)) if target == "method" else graph.call_function(
        target, (x,))  # fmt: skip
    graph.output((node,))
    with pytest.raises(FxoptError, match="neither save nor"):
        check_legal(graph)


def test_a_site_of_another_capture_is_named(pair, case):
    site = next(s for s in case("llama").captured.sites if s.family == "linear")
    with pytest.raises(FxoptError, match="another capture"):
        GraphEditor(pair[2]).node(site)


def test_arguments_of_a_call_change_by_name(case):
    """`attend` takes q, k and v by position, its layout by name."""
    found = case("llama")
    editor = GraphEditor(found.captured)
    site = next(s for s in found.captured.sites if s.family == "kv_cache")
    with editor.applying("kv_cache.test"):
        doubled = editor.call(site, torch.ops.aten.mul.Tensor, (editor.node(site).args[1], 2.0), {})
        editor.update(site, k=doubled, layout="k8v8g32r8s4")
    node = editor.node(site)
    assert node.args[1] is doubled
    assert node.kwargs["layout"] == "k8v8g32r8s4"
    assert "k" not in node.kwargs
    assert editor.records[-1].kind == "update"


def test_a_registered_tensor_can_be_amended(pair):
    model, x, captured, sites = pair
    editor, site = GraphEditor(captured), sites["second"]
    with editor.applying("linear.test"):
        weight = editor.tensor(site, "weight", torch.zeros(6, 8))
        source = editor.node(site).args[0]
        new = editor.call(site, torch.ops.aten.linear.default, (source, weight), {})
        editor.replace(site, new)
        editor.amend(site, weight, lambda held: held + 1)
    with torch.no_grad():
        hidden = torch.relu(model.first(x))
        summed = hidden.sum(1, keepdim=True).expand(3, 6)
    torch.testing.assert_close(editor.finish()(x)[0], summed)
    assert [record.kind for record in editor.records[:4]] == ["tensor", "call", "replace", "tensor"]
