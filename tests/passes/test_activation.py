"""`activation.chunked` and `activation.last_logits`."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.capture import Captured, capture
from fxopt.decide.statistics import Recorded
from fxopt.emit.editor import GraphEditor
from fxopt.ir.errors import PlanError
from fxopt.ir.rewrite import Match, Refusal
from fxopt.ir.site import Site, TemporaryInfo
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.passes.activation.chunked import Chunked
from fxopt.passes.activation.last_logits import LastLogits

CHUNKED = Chunked(chunks=(8, 32))
LONG = scenarios(Forward(2, 30))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 48, bias=False), nn.Linear(16, 48)
        self.down = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Fused(nn.Module):
    """Gate and up projection as one, in float32 between."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(16, 96), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down((F.silu(gate.double()) * up.double()).to(x.dtype))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.fused = Gated(), Fused()
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 200)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return self.head(x + self.fused(x))


@cache
def captured() -> tuple[Model, Captured]:
    torch.manual_seed(0)
    model = Model().eval()
    return model, capture(model, {"x": torch.randn(2, 5, 16)})


def sites() -> dict[str, Site]:
    return {s.key: s for s in captured()[1].sites if s.family == "activation"}


def matched(name: str) -> Match:
    match = CHUNKED.match(sites()[name])
    assert isinstance(match, Match)
    return match


def test_chunks_are_exact_and_in_the_graph() -> None:
    model, found = captured()
    editor = GraphEditor(found)
    for name in ("mlp", "fused"):
        match = matched(name)
        with editor.applying(CHUNKED.name):
            CHUNKED.apply(match, CHUNKED.candidates(match, LONG)[0], {}, editor)
    graph = editor.finish()
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("fxopt.chunked.default") == 2
    assert targets.count("aten.linear.default") == 1
    assert "aten.silu.default" not in targets
    x = torch.randn(3, 21, 16)
    out = graph(x)
    torch.testing.assert_close(out[0] if isinstance(out, tuple | list) else out, model(x))


def test_quantized_layers_are_chunked_too() -> None:
    from fxopt.passes.linear.quantized import Quantized

    _, found = captured()
    editor, rewrite = GraphEditor(found), Quantized()
    linear = next(s for s in found.sites if s.family == "linear" and s.key == "mlp.up")
    match = Match(linear)
    candidate = rewrite.candidates(match, LONG)[0]

    layer, gram = captured()[0].mlp.up, torch.eye(16, dtype=torch.float64)
    recorded = Recorded(layer.weight.detach(), layer.bias.detach(), gram_sum=gram, gram_rows=1)
    tensors = rewrite.prepare(match, candidate, recorded)
    with editor.applying(rewrite.name):
        rewrite.apply(match, candidate, tensors, editor)
    x = torch.randn(2, 30, 16)
    expected = editor.finish()(x)
    with editor.applying(CHUNKED.name):
        match = matched("mlp")
        CHUNKED.apply(match, CHUNKED.candidates(match, LONG)[0], {}, editor)
    graph = editor.finish()
    assert any("fxopt.quantized_linear" in str(node.args) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), expected)


def test_an_mlp_without_one_input_is_an_error() -> None:
    _, found = captured()
    editor, match = GraphEditor(found), matched("mlp")
    first = editor.node(match.site).args[0].args[0].args[0]  # pyright: ignore
    first.args = (editor.node(sites()["fused"]), *first.args[1:])
    with pytest.raises(PlanError, match=r"mlp: activation\.chunked finds no single input"):
        CHUNKED.apply(match, CHUNKED.candidates(match, LONG)[0], {}, editor)


def test_candidates_and_refusals() -> None:
    match = matched("mlp")
    assert [c.label for c in CHUNKED.candidates(match, LONG)] == ["rows8"]
    assert [c.label for c in CHUNKED.candidates(match, scenarios(Forward(2, 32)))] == [
        "rows8",
        "rows32",
    ]
    few = scenarios(Forward(1, 15))
    assert CHUNKED.candidates(match, few) == []
    assert "the largest call has 15 rows" in str(CHUNKED.refusal(match, few))
    refusal = CHUNKED.match(sites()["head"])
    assert isinstance(refusal, Refusal)
    assert "have to exist whole" in refusal.reason


def test_price_is_one_chunk_and_its_launches() -> None:
    match = matched("mlp")
    candidate = CHUNKED.candidates(match, LONG)[0]
    (call,) = CHUNKED.lower(match, candidate, LONG[0])
    # gelu(gate), up and their product in float32, beside the result of all 60 rows
    assert call.temporary_bytes == 8 * 3 * 48 * 4 + 60 * 16 * 4
    assert call.launches == 7 * len(match.site.info.nodes)  # pyright: ignore
    (decode,) = CHUNKED.lower(match, candidate, Scenario("decode", 2, 1, 40))
    assert decode.temporary_bytes == 2 * 3 * 48 * 4
    assert decode.launches == 0


def test_features_of_a_matrix_are_no_rows() -> None:
    sites = capture(Gated().eval(), torch.randn(2, 16)).sites
    site = next(s for s in sites if s.family == "activation")
    match = CHUNKED.match(site)
    assert isinstance(match, Match)
    wide, small = scenarios(Forward(20, 16)), scenarios(Forward(4, 16))
    (candidate,) = CHUNKED.candidates(match, wide)
    assert "the largest call has 4 rows" in str(CHUNKED.refusal(match, small))
    (call,) = CHUNKED.lower(match, candidate, wide[0])
    assert call.temporary_bytes == 8 * 3 * 48 * 4 + 20 * 16 * 4


def test_the_widest_moment_counts_views_once_and_every_dtype() -> None:
    info = sites()["fused"].info
    assert isinstance(info, TemporaryInfo)
    # silu(gate), up and their product in float64; what gate and up view is dead by then
    assert info.row_bytes == 3 * 48 * 8
    assert info.out_bytes == 16 * 4


def test_last_logits() -> None:
    rewrite, head = LastLogits(), sites()["head"]
    match = rewrite.match(head)
    assert isinstance(match, Match)
    generate = scenarios(Generate(batch=3, prompt=50, new_tokens=2))
    (candidate,) = rewrite.candidates(match, generate)
    (call,) = rewrite.lower(match, candidate, generate[0])
    assert call.temporary_bytes == 3 * 200 * 4
    logits = torch.randn(2, 5, 7)
    emulated = rewrite.emulate(match, candidate, {}, {"x": logits})
    assert torch.equal(emulated, logits[:, 4:])
    assert isinstance(rewrite.match(sites()["mlp"]), Refusal)
    one = scenarios(Generate(batch=3, prompt=1, new_tokens=2))
    assert rewrite.candidates(match, one) == []
    assert "every call of the workload has one token" in str(rewrite.refusal(match, one))
    assert isinstance(head.info, TemporaryInfo)
