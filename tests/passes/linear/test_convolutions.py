"""Convolutions whose kernel is their stride: found, recorded, priced and rewritten as linears."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.compiler import Compiler
from fxopt.decide.propose import Proposal
from fxopt.decide.recover import recover
from fxopt.decide.shrinkage import intensity, shrunk
from fxopt.ir.patches import from_rows, output_rows, to_rows
from fxopt.ir.site import LinearInfo
from fxopt.passes.baseline import baseline_calls
from fxopt.request import resolve

REWRITES = [
    "linear.low_rank",
    "linear.low_rank_pivoted",
    "linear.monarch",
    "linear.quantized",
    "linear.low_rank_quantized",
    "linear.quantized_low_rank",
]

SIZE = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))
"""Of a patch, how many, and what is left over."""


class Net(nn.Module):
    """A patch embedding, pointwise layers, others that are no linears, and a view at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(8, 128, (4, 2), stride=(4, 2))
        self.wide = nn.Conv2d(128, 128, 1)
        self.thin = nn.Conv2d(128, 128, 1, bias=False)
        self.mixed = nn.Conv2d(128, 128, 3, padding=1, groups=128)
        self.flat = nn.Conv1d(128, 128, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = x + self.mixed(self.thin(F.gelu(self.wide(x))))
        return self.flat(x.view(x.shape[0], 128, -1))


def images(count: int = 2, height: int = 17, width: int = 12) -> Tensor:
    return torch.randn(count, 8, height, width)


def compiled(rewrite: str) -> Compiler:
    data = [images() for _ in range(6)]
    request = resolve(
        Net().eval(), fxopt.Budget(weights="50%"), data[0], workload=None, calibration=data,
        keep=(), rewrites=[rewrite], at=None, seed=0, time_limit=None,
    )  # fmt: skip
    return Compiler(request)


def proposals(compiler: Compiler) -> list[Proposal]:
    return [p for found in compiler.proposals.by_site.values() for p in found]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(SIZE, min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_rows_times_the_weight_are_the_convolution(
    sizes: list[tuple[int, int, int]], channels: int
) -> None:
    patch = [p for p, _, _ in sizes]
    x = torch.randn(2, channels, *(p * count + min(rest, p - 1) for p, count, rest in sizes))
    weight, bias = torch.randn(5, channels, *patch), torch.randn(5)
    expected = getattr(F, f"conv{len(patch)}d")(x.double(), weight.double(), bias.double(), patch)
    rows = to_rows(x.double(), patch)
    y = F.linear(rows, weight.double().flatten(1), bias.double())
    torch.testing.assert_close(from_rows(y, patch), expected)
    assert torch.equal(output_rows(from_rows(y, patch), patch), y)
    if set(patch) == {1}:
        assert rows.data_ptr() != x.data_ptr()  # of the double copy
        assert to_rows(x, patch).data_ptr() == x.data_ptr()


def test_what_is_a_site() -> None:
    layers = nn.ModuleDict(
        {
            "pointwise": nn.Conv2d(64, 64, 1),
            "patches": nn.Conv2d(64, 64, 2, stride=2),
            "dilated": nn.Conv2d(64, 64, 1, dilation=3),
            "strided": nn.Conv2d(64, 64, 1, stride=2),
            "grouped": nn.Conv2d(64, 64, 1, groups=2),
            "padded": nn.Conv2d(64, 64, 1, padding=1),
            "wide": nn.Conv2d(64, 64, 3, padding=1),
            "spread": nn.Conv2d(64, 64, 2, stride=2, dilation=2),
        }
    ).eval()

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers.values()]

    sites = capture(All(), torch.randn(2, 64, 12, 10)).sites
    found = {s.key.removeprefix("layers."): s.info for s in sites}
    assert set(found) == {"pointwise", "patches", "dilated"}
    assert found["patches"] == LinearInfo(
        "layers.patches.weight", "layers.patches.bias", 256, 64, torch.float32,
        patch=(2, 2), positions=30,
    )  # fmt: skip
    assert (found["pointwise"].patch, found["pointwise"].positions) == ((1, 1), 120)


def test_a_computed_kernel_is_refused_with_a_reason() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.layer.weight * 2)

    (site,) = capture(Scaled().eval(), torch.randn(2, 64, 9)).sites
    assert site.blocked is not None
    assert "the weight is computed in the forward" in site.blocked


def test_statistics_are_of_patches() -> None:
    compiler = compiled("linear.low_rank")
    x = torch.cat([batch["x"] for batch in compiler.request.calibration.fit]).double()
    recorded = compiler.statistics.at(next(s for s in compiler.sites if s.key == "patch"))
    rows = F.unfold(x, (4, 2), stride=(4, 2)).transpose(1, 2).flatten(0, 1)
    seen = rows.T @ rows / len(rows)
    made = shrunk(seen, intensity(seen, len(rows)))
    torch.testing.assert_close(recorded.gram, made, rtol=1e-5, atol=1e-6)
    assert recorded.inputs["x"].shape[1] == 64
    assert recorded.exact().shape == recorded.gradients.shape


def test_priors_follow_the_error_that_a_change_makes() -> None:
    """Of noise in a kernel, against the model run with it."""
    compiler = compiled("linear.low_rank")
    for key in ("patch", "thin"):
        site = next(s for s in compiler.sites if s.key == key)
        recorded = compiler.statistics.at(site)
        noise = torch.randn_like(recorded.weight) * 1e-2
        predicted = compiler.statistics.second_order(site, recorded.inputs["x"] @ noise.T)
        model = compiler.request.model
        layer, errors = getattr(model, key), []
        for batch in compiler.request.calibration.fit:
            with torch.no_grad():
                exact = model(batch["x"])
                layer.weight += noise.view_as(layer.weight)
                changed = model(batch["x"])
                layer.weight -= noise.view_as(layer.weight)
            errors.append(float((changed - exact).square().sum() / exact.square().sum()))
        measured = sum(errors) / len(errors)
        # one random projection of the output a sequence
        assert measured / 8 < predicted < measured * 8


@pytest.mark.parametrize("rewrite", REWRITES)
def test_rewritten_graphs_convolve_with_what_was_emulated(rewrite: str) -> None:
    compiler = compiled(rewrite)
    x = images(3, height=16, width=10)
    model = copy.deepcopy(compiler.request.model).double()
    for proposal in proposals(compiler):
        key, patch = proposal.site.key, proposal.site.info.patch
        layer = getattr(model, key)
        tensors = compiler.preparer(proposal)
        if proposal.candidate.label == "fp8":
            continue  # rounds its input: below
        plain = {name: tensor for name, tensor in tensors.items() if name != "bias"}
        eye = torch.eye(proposal.site.info.in_features)
        effective = proposal.rewrite.emulate(
            proposal.match, proposal.candidate, plain, {"x": eye}
        ).T.double()
        kept = layer.weight.data
        layer.weight.data = effective.reshape(len(effective), -1, *patch)
        with torch.no_grad():
            expected = model(x.double())
            made = compiler.realise([proposal]).graph(x)[0]
        layer.weight.data = kept
        torch.testing.assert_close(made.double(), expected, rtol=1e-3, atol=1e-4)


def test_fp8_rounds_the_patches(recorded: Any) -> None:
    compiler = compiled("linear.quantized")
    found = [p for p in proposals(compiler) if p.candidate.label == "fp8"]
    assert {p.site.key for p in found} == {"patch", "wide", "thin", "flat"}
    x, model = images(), compiler.request.model
    with torch.no_grad():
        for proposal in found:
            made = compiler.realise([proposal]).graph(x)[0]
            assert (made - model(x)).norm() < 0.06 * model(x).norm()


@pytest.mark.parametrize("rewrite", REWRITES)
def test_prices_add_up(rewrite: str) -> None:
    compiler = compiled(rewrite)
    scenario = compiler.scenarios[0]
    keys = set[str]()
    for proposal in proposals(compiler):
        info = proposal.site.info
        (kept,) = baseline_calls(proposal.site, scenario)
        rows = scenario.batch * info.positions
        assert kept.flops == 2 * rows * info.in_features * info.out_features
        calls = proposal.rewrite.lower(proposal.match, proposal.candidate, scenario)
        stored = sum(t.nbytes for t in compiler.preparer(proposal).values())
        assert sum(call.weight_bytes for call in calls) == stored
        for call in (kept, *calls):
            y = call.run(torch.device("cpu"))()
            assert y.shape[0] in (scenario.batch, rows)
            assert y.numel() % rows == 0
            keys.add(call.key)
    assert any("/1x1b2" in key for key in keys)


def test_recovery_fits_convolutions_behind_convolutions() -> None:
    compiler = compiled("linear.low_rank")
    chosen = [found[0] for found in compiler.proposals.by_site.values()]
    graph = compiler.captured.graph
    recovery = recover(
        graph, graph, chosen, compiler.request.calibration.fit,
        compiler._run,  # pyright: ignore[reportPrivateUsage]
        compiler.quality, compiler.statistics, compiler.preparer,
    )  # fmt: skip
    assert set(recovery.errors) == {"patch", "wide", "thin", "flat"}
    assert all(new <= old for old, new in recovery.errors.values())
    assert recovery.errors["flat"][1] < recovery.errors["flat"][0]


@pytest.mark.parametrize(
    ("rewrite", "most"), [("linear.low_rank", 0.95), ("linear.quantized", 0.1)]
)
def test_optimized_saved_exported(rewrite: str, most: float, tmp_path: Path) -> None:
    model, data = Net().eval(), [images() for _ in range(3)]
    opt = fxopt.optimize(
        model, fxopt.Budget(weights="28%"), data[0], calibration=data, rewrites=[rewrite]
    )
    assert {d.key for d in opt.plan.rewritten} >= {"wide", "thin"}
    assert opt.export_onnx(tmp_path / "model.onnx").difference < 1e-4
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    for x in (images(5, height=21), images(1).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(loaded(x), opt(x), rtol=0, atol=0)
        assert (opt(x) - model(x)).norm() < most * model(x).norm()
    compiled_ = torch.compile(opt, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_(data[0]), opt(data[0]))


def test_planted_low_rank_kernel_is_factored() -> None:
    model, data = (
        nn.Sequential(nn.Conv2d(96, 128, 1)).eval(),
        [torch.randn(1, 96, 9, 7) for _ in range(3)],
    )
    model[0].weight.data = (torch.randn(128, 16) @ torch.randn(16, 96) / 16)[:, :, None, None]
    names = ["linear.low_rank", "linear.quantized"]
    budget = fxopt.Budget(weights="40%", relative_error=1e-3, minimize="memory")
    opt = fxopt.optimize(model, budget, data[0], calibration=data, rewrites=names)
    assert [(d.rewrite, d.label) for d in opt.plan.rewritten] == [("linear.low_rank", "rank16")]
    torch.testing.assert_close(opt(data[0]), model(data[0]), rtol=1e-3, atol=1e-3)
    assert opt(data[0]).is_contiguous()  # two convolutions, nothing moved
