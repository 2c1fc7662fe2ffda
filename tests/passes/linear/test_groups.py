"""Linears decided together: what makes a group, what its rewrites promise, what excludes what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.decide.statistics import Recorded
from fxopt.emit.editor import GraphEditor
from fxopt.ir.errors import PlanError
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import GroupInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.activation.chunked import Chunked
from fxopt.passes.baseline import baseline_calls
from fxopt.passes.linear import projection
from fxopt.passes.linear.channel_pruned import ChannelPruned
from fxopt.passes.linear.low_rank_pivoted import LowRankPivoted
from fxopt.passes.linear.low_rank_quantized import LowRankQuantized
from fxopt.passes.linear.low_rank_shared import LowRankShared
from fxopt.passes.linear.quantized import Quantized
from fxopt.passes.linear.quantized_low_rank import QuantizedLowRank

CALL = Scenario("forward", batch=3, queries=7, past=0)


class Mlp(nn.Module):
    def __init__(self, width: int = 96, channels: int = 256, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(width, channels, bias=bias)
        self.up = nn.Linear(width, channels, bias=bias)
        self.down = nn.Linear(channels, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) * 0.5)


class Cross(nn.Module):
    """Two layers that read one memory, each through two linears."""

    def __init__(self) -> None:
        super().__init__()
        pair = [nn.ModuleDict({n: nn.Linear(96, 64) for n in "kv"}) for _ in range(2)]
        self.layers = nn.ModuleList(pair)

    def forward(self, memory: Tensor) -> Tensor:
        return sum(layer["k"](memory).softmax(-1) * layer["v"](memory) for layer in self.layers)


class Model(nn.Module):
    """A gated MLP, a plain one, and one that shows its channels to others."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.gated = Mlp(bias=bias)
        self.plain = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 96))
        self.seen = nn.ModuleList([nn.Linear(96, 128), nn.Linear(128, 96)])
        self.mixed = nn.ModuleList([nn.Linear(96, 128), nn.Linear(128, 96)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rest(x + self.gated(x))

    def rest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.plain(x)
        hidden = self.seen[0](x).relu()
        x = x + self.seen[1](hidden)
        return x + self.mixed[1](self.mixed[0](x).softmax(-1)), hidden


@lru_cache(maxsize=2)
def captured(bias: bool = True) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model(bias).eval()
    return model, capture(model, {"x": torch.randn(2, 5, 96)})


def groups(bias: bool = True) -> dict[str, Site]:
    return {s.key: s for s in captured(bias)[1].sites if isinstance(s.info, GroupInfo)}


def recorded(site: Site, bias: bool = True) -> Any:
    """Statistics of a group from random inputs of its first layers."""
    model, _ = captured(bias)
    members = [model.get_submodule(m.op) for m in site.info.members]
    x = torch.randn(700, 24) @ torch.randn(24, 96) / 5
    inputs = [x] * len(members)
    if site.info.kind == "channels":
        made = [layer(x) for layer in members[:-1]]
        hidden = F.gelu(made[0]) if len(made) == 1 else F.silu(made[0]) * made[1] * 0.5
        inputs[-1] = hidden.detach()
    found = [_statistics(layer, rows) for layer, rows in zip(members, inputs, strict=True)]
    return replace(found[-1], members=tuple(found))


def _statistics(layer: nn.Linear, rows: Tensor) -> Recorded:
    gram = rows.double().T @ rows.double()
    bias = None if layer.bias is None else layer.bias.detach()
    return Recorded(layer.weight.detach(), bias, {"x": rows}, gram_sum=gram, gram_rows=len(rows))


def rewritten(rewrite: Any, site: Site, candidate: Candidate, tensors: Any) -> GraphEditor:
    editor = GraphEditor(captured("bias0" in tensors)[1])
    with editor.applying(rewrite.name):
        rewrite.apply(Match(site), candidate, tensors, editor)
    editor.finish()
    return editor


def test_groups_are_found_where_they_are_legal() -> None:
    kinds = {key: site.info.kind for key, site in groups().items()}
    assert kinds == {
        "gated.gate+up": "shared_input",
        "gated.gate+up+down": "channels",
        "plain.0+2": "channels",
    }
    site = groups()["gated.gate+up+down"]
    assert [m.key for m in site.info.members] == ["gated.gate", "gated.up", "gated.down"]
    assert len(site.info.between) == 3
    assert list(site.info.outputs) == [2]
    assert list(groups()["gated.gate+up"].info.outputs) == [0, 1]


def test_layers_do_not_share_a_group() -> None:
    found = capture(Cross().eval(), {"memory": torch.randn(2, 5, 96)}).sites
    keys = [s.key for s in found if isinstance(s.info, GroupInfo)]
    assert keys == ["layers.0.k+v", "layers.1.k+v"]


@pytest.mark.parametrize("bias", [False, True])
def test_pruned_mlp_computes_what_was_emulated(bias: bool) -> None:
    site, rewrite = groups(bias)["gated.gate+up+down"], ChannelPruned()
    statistics, match = recorded(site, bias), rewrite.match(site)
    assert isinstance(match, Match)
    found = rewrite.candidates(match, (CALL,))
    assert [c.label for c in found] == ["keep128", "keep192"]
    assert found[0].touches == ("gated.gate", "gated.up", "gated.down")
    model, _ = captured(bias)
    for candidate in found:
        tensors = rewrite.prepare(match, candidate, statistics)
        graph = rewritten(rewrite, site, candidate, tensors).graph
        x = torch.randn(3, 7, 96)
        hidden = F.silu(model.gated.gate(x)) * model.gated.up(x) * 0.5
        expected = rewrite.emulate(match, candidate, tensors, {"x": hidden, "member": 2})
        node = next(n for n in graph.graph.nodes if n.meta.get("fqn") == "gated.down")
        while node.target is not torch.ops.aten.linear.default:
            node = node.next
        torch.testing.assert_close(_value(graph, node, x), expected)
        weights = {str(n.target): n.meta["val"] for n in graph.graph.nodes if n.op == "get_attr"}
        count = candidate.parameters["channels"]
        assert weights["gated.gate.pruned"].shape == (count, 96)
        assert weights["gated.down.pruned"].shape == (96, count)
        assert "gated.gate.weight" not in weights
        assert ("gated.down.bias" in weights) == bias
        calls = rewrite.lower(match, candidate, CALL)
        kept = baseline_calls(site, CALL)
        ratio = sum(c.flops for c in calls) / sum(c.flops for c in kept)
        assert ratio == pytest.approx(count / 256)
        stored = sum(t.nbytes for n, t in tensors.items() if n != "kept")
        assert sum(c.weight_bytes for c in calls) == stored


def _value(graph: Any, wanted: Any, x: Tensor) -> Tensor:
    class Until(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            self.found = super().run_node(n) if n is not wanted else None
            if n is wanted:
                self.value = super().run_node(n)
                return self.value
            return self.found

    run = Until(graph)
    run.run(x)
    return run.value


def test_last_layer_is_fitted_to_what_the_whole_mlp_returned() -> None:
    site, rewrite = groups()["gated.gate+up+down"], ChannelPruned()
    statistics, match = recorded(site), Match(site)
    candidate = Candidate(rewrite.name, "keep128", {"channels": 128})
    tensors = rewrite.prepare(match, candidate, statistics)
    # any rows with the moments that were recorded
    rows = torch.linalg.cholesky(statistics.gram).mT
    kept, target = rows[:, tensors["kept"]], rows @ statistics.weight.double().T
    best = torch.linalg.lstsq(kept, target).solution.T
    torch.testing.assert_close(tensors["weight2"].double(), best, rtol=1e-3, atol=1e-3)
    alone = kept @ statistics.weight.double()[:, tensors["kept"]].T
    fitted = kept @ tensors["weight2"].double().T
    assert (fitted - target).norm() < 0.9 * (alone - target).norm()


def test_channels_that_say_nothing_go_first() -> None:
    weight, energy = torch.ones(8, 256), torch.ones(256, dtype=torch.float64)
    dead = torch.arange(0, 256, 2)
    energy[dead[:64]] = 1e-6
    weight[:, dead[64:]] = 1e-4
    for least, count in ((0.0, 0), (0.25, 32)):
        site = groups()["gated.gate+up+down"]
        members = [
            SimpleNamespace(weight=torch.ones(256, 8), bias=None),
            SimpleNamespace(weight=torch.ones(256, 8), bias=None),
            SimpleNamespace(weight=weight, bias=None),
        ]
        statistics = SimpleNamespace(members=members, gram=energy.diag())
        candidate = Candidate("linear.channel_pruned", "keep128", {"channels": 128})
        kept = ChannelPruned(least=least).prepare(Match(site), candidate, statistics)["kept"]
        assert torch.isin(kept, dead).sum() == count


@pytest.mark.parametrize("bias", [False, True])
def test_shared_factor_computes_what_was_emulated(bias: bool) -> None:
    site, rewrite = groups(bias)["gated.gate+up"], LowRankShared()
    statistics, match = recorded(site, bias), rewrite.match(site)
    assert isinstance(match, Match)
    model, found = captured(bias)
    x = torch.randn(3, 7, 96)
    for candidate in rewrite.candidates(match, (CALL,)):
        tensors = rewrite.prepare(match, candidate, statistics)
        gate, up = (
            rewrite.emulate(match, candidate, tensors, {"x": x, "member": k}) for k in (0, 1)
        )
        hidden = x + model.gated.down(F.silu(gate) * up * 0.5)
        y, _ = rewritten(rewrite, site, candidate, tensors).graph(x)
        expected, _ = model.rest(hidden)
        torch.testing.assert_close(y, expected)
        stored = sum(t.nbytes for t in tensors.values())
        calls = rewrite.lower(match, candidate, CALL)
        assert sum(c.weight_bytes for c in calls) == stored
        assert stored < sum(c.weight_bytes for c in baseline_calls(site, CALL))
    assert found.sites  # the capture itself is untouched
    assert rewrite.refusal(match, (CALL,)) is None


def test_shared_factor_weighs_each_layer_by_what_it_returns() -> None:
    weights = [100 * torch.randn(80, 96), torch.randn(40, 96)]
    rows = torch.randn(500, 96).double()
    gram = rows.T @ rows / 500
    down, ups = projection.Shared.of(weights, gram).low_rank(64)
    losses = [
        projection.relative_error(u @ down - w, w, gram) for u, w in zip(ups, weights, strict=True)
    ]
    assert losses[1] < losses[0]  # fewer outputs, so each of them weighs more
    down, up = projection.low_rank(torch.cat(weights), gram, 64)
    unweighted = projection.relative_error(up[80:] @ down - weights[1], weights[1], gram)
    assert sum(losses) < 0.5 + unweighted
    assert losses[1] < 0.5 * unweighted


def test_layers_of_one_subspace_cost_nothing_together() -> None:
    basis = torch.randn(24, 96)
    weights = [torch.randn(80, 24) @ basis, torch.randn(40, 24) @ basis]
    gram = torch.eye(96, dtype=torch.float64)
    down, ups = projection.Shared.of(weights, gram).low_rank(24)
    for up, weight in zip(ups, weights, strict=True):
        assert projection.relative_error(up @ down - weight, weight, gram) < 1e-9


def test_a_member_that_was_rewritten_is_an_error() -> None:
    _, found = captured()
    member = next(s for s in found.sites if s.key == "gated.up")
    site = groups()["gated.gate+up+down"]
    editor, single = GraphEditor(found), Quantized(bits=(8,), fp8=False)
    (candidate,) = single.candidates(Match(member), (CALL,))
    tensors = single.prepare(Match(member), candidate, recorded(site).members[1])
    with editor.applying(single.name):
        single.apply(Match(member), candidate, tensors, editor)
    pruned = Candidate("linear.channel_pruned", "keep128", {"channels": 128})
    statistics = recorded(site)
    with pytest.raises(PlanError, match=r"gated\.gate\+up\+down: .* needs gated\.up as it was"):
        ChannelPruned().apply(
            Match(site), pruned, ChannelPruned().prepare(Match(site), pruned, statistics), editor
        )


def test_refusals_say_why() -> None:
    site = groups()["gated.gate+up"]
    refusal = ChannelPruned().match(site)
    assert isinstance(refusal, Refusal)
    assert "serves groups" in refusal.reason
    few = ChannelPruned(fractions=(0.1,)).match(groups()["plain.0+2"])
    assert isinstance(few, Refusal)
    assert "128 channels: no multiple of 64" in few.reason
    match = LowRankShared(fractions=(1.5,)).match(site)
    assert isinstance(match, Match)
    reason = LowRankShared(fractions=(1.5,)).refusal(match, (CALL,))
    assert reason == "no rank saves bytes at 512 x 96 in all"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "rewrite",
    [
        LowRankPivoted(),
        LowRankQuantized(),
        QuantizedLowRank(ranks=(8,), group_size=32),
        LowRankShared(),
    ],
)
def test_rewritten_mlps_are_chunked_too(rewrite: Any) -> None:
    _, found = captured()
    shared = rewrite.name == "linear.low_rank_shared"
    keys = ["gated.gate+up"] if shared else ["gated.gate", "gated.up", "gated.down"]
    sites = [s for s in found.sites if s.family == "linear" and s.key in keys]
    statistics = recorded(groups()["gated.gate+up+down"]).members
    editor = GraphEditor(found)
    for k, site in enumerate(sites):
        match = rewrite.match(site)
        (candidate, *_) = rewrite.candidates(match, (CALL,))
        given = recorded(site) if shared else statistics[k]
        with editor.applying(rewrite.name):
            rewrite.apply(match, candidate, rewrite.prepare(match, candidate, given), editor)
    x = torch.randn(3, 7, 96)
    expected = editor.finish()(x)
    mlp = next(s for s in found.sites if s.family == "activation" and s.key == "gated")
    with editor.applying("activation.chunked"):
        Chunked().apply(
            Match(mlp), Candidate("activation.chunked", "rows4", {"chunk": 4}), {}, editor
        )
    graph = editor.finish()
    (chunked,) = [node for node in graph.graph.nodes if "chunked" in str(node.target)]
    assert "silu" in chunked.args[2]  # the whole of it, not its last layer
    torch.testing.assert_close(graph(x), expected)
