"""Linears fitted again to the inputs that a rewritten model gives them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide.propose import Proposal
from fxopt.decide.recover import Recovery, recover
from fxopt.request import resolve


class Block(nn.Module):
    """What one loses is linear in what flows past it, so that the next can make up for it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(96, 128)
        self.up = nn.Linear(96, 128)
        self.down = nn.Linear(128, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) + self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def compiled(rewrite: str, sequences: int = 9) -> Compiler:
    model = Model().eval()
    mixing = torch.randn(96, 96) * torch.arange(1, 97) ** -0.5
    data = [torch.randn(1, 500, 96) @ mixing for _ in range(sequences)]
    request = resolve(
        model, fxopt.Budget(weights="50%"), data[0], workload=None, calibration=data, keep=(),
        rewrites=[rewrite], at=None, seed=0, time_limit=None,
    )  # fmt: skip
    return Compiler(request)


def mildest(compiler: Compiler) -> list[Proposal]:
    return [found[-1] for found in compiler.proposals.by_site.values() if found]


def recovered(compiler: Compiler, proposals: Sequence[Proposal]) -> Recovery:
    graph, fit = compiler.captured.graph, compiler.request.calibration.fit
    return recover(
        graph,
        graph,
        proposals,
        fit,
        compiler._run,  # pyright: ignore[reportPrivateUsage]
        compiler.quality,
        compiler.statistics,
        compiler.preparer,
    )


@pytest.mark.parametrize(
    "rewrite",
    ["linear.low_rank", "linear.low_rank_quantized", "linear.low_rank_shared"],
)
def test_recovery_lowers_the_error_on_data_it_has_not_seen(rewrite: str) -> None:
    compiler = compiled(rewrite)
    proposals = mildest(compiler)
    recovery = recovered(compiler, proposals)
    with torch.no_grad():
        before, after = (
            compiler.verify_reference.measure(compiler.realise(proposals, tensors).graph).mean
            for tensors in (None, recovery)
        )
    assert after < 0.99 * before
    assert set(recovery.errors) == {p.site.key for p in proposals}
    assert all(new <= old for old, new in recovery.errors.values())


def test_without_a_rewritten_prefix_there_is_nothing_to_recover() -> None:
    compiler = compiled("linear.low_rank")
    alone = [p for p in mildest(compiler) if p.site.key == "layers.0.up"]
    ((before, after),) = recovered(compiler, alone).errors.values()
    assert after == pytest.approx(before, rel=1e-3)


def test_errors_are_those_of_the_rewritten_prefix() -> None:
    compiler = compiled("linear.low_rank")
    chosen = [p for p in mildest(compiler) if p.site.key in ("layers.0.down", "layers.1.gate")]
    recovery = recovered(compiler, chosen)
    model = compiler.request.model
    assert isinstance(model, Model)
    x = torch.cat([batch["x"] for batch in compiler.request.calibration.fit])
    with torch.no_grad():
        tensors = recovery(chosen[0])
        hidden = model.layers[0].gate(x) + model.layers[0].up(x)
        down = F.linear(F.linear(hidden, tensors["down"]), tensors["up"], tensors["bias"])
        seen, exact = x + down, x + model.layers[0](x)
        for tensors, error in zip(
            (compiler.preparer(chosen[1]), recovery(chosen[1])),
            recovery.errors["layers.1.gate"],
            strict=True,
        ):
            y = F.linear(F.linear(seen, tensors["down"]), tensors["up"], tensors["bias"])
            target = model.layers[1].gate(exact)
            expected = (y - target).square().sum() / target.square().sum()
            assert error == pytest.approx(float(expected), rel=1e-3)


def test_pruned_channels_are_fitted_to_the_channels_that_reach_them() -> None:
    compiler = compiled("linear.channel_pruned")
    proposals = mildest(compiler)
    recovery = recovered(compiler, proposals)
    old, new = recovery.errors["layers.2.gate+up+down"]
    assert new < old
    with torch.no_grad():
        graph = compiler.realise(proposals, recovery).graph
        measured = compiler.verify_reference.measure(graph).mean
        assert measured < compiler.verify_reference.measure(compiler.realise(proposals).graph).mean
