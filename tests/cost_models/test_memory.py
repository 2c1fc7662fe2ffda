"""Peaks by liveness against a count by hand and against live storages of a real run."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.cost_models.memory import live_bytes, peak_temporaries
from fxopt.decide.verify import peak_live_bytes


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(x))
        return self.down(hidden).transpose(0, 1).reshape(-1, 8) + 1


def exported() -> torch.fx.GraphModule:
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Chain(), (torch.randn(2, 5, 8),), dynamic_shapes=dynamic)
    return program.module(check_guards=False)


def sizes_for(graph: torch.fx.GraphModule, batch: int, length: int) -> dict[str, int]:
    shape = next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"].shape
    return {str(shape[0].node.expr): batch, str(shape[1].node.expr): length}


def test_peak_is_the_two_hidden_tensors() -> None:
    graph = exported()
    peak = peak_temporaries(graph.graph, sizes_for(graph, 3, 7))
    # up's output and relu's output live together; 64 float32 channels for 21 tokens each
    assert peak.bytes == 2 * 3 * 7 * 64 * 4


def test_peak_agrees_with_live_storages() -> None:
    graph = exported()
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        lived = peak_live_bytes(lambda: graph.forward(x), x.device)
    assert peak_temporaries(graph.graph, sizes_for(graph, 3, 7)).bytes == lived


def test_every_node_has_its_live_bytes() -> None:
    graph = exported()
    sizes = sizes_for(graph, 3, 7)
    live = live_bytes(graph.graph, sizes)
    assert set(live) == {node.name for node in graph.graph.nodes}
    assert max(live.values()) == peak_temporaries(graph.graph, sizes).bytes
    assert live["relu"] == 2 * live["linear"] == 2 * 3 * 7 * 64 * 4


def test_what_our_own_ops_allocate_inside_is_seen() -> None:
    import fxopt.kernels.chunked.op  # noqa: F401

    x, weight = torch.randn(64, 8), torch.randn(256, 8)
    program = "a = aten.linear(x, t0); b = aten.sum.dim_IntList(a, [-1], True)"
    for chunk in (64, 16):
        lived = peak_live_bytes(
            lambda rows=chunk: torch.ops.fxopt.chunked(x, [weight], program, rows), x.device
        )
        assert chunk * 256 * 4 <= lived < chunk * 256 * 4 + 3 * 64 * 4


def test_views_do_not_count_twice() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return y.view(-1)[:4].clone()

    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return f(x)

    graph = torch.export.export(Views(), (torch.randn(4, 4),)).module(check_guards=False)
    assert peak_temporaries(graph.graph, {}).bytes == 4 * 4 * 4 + 4 * 4
