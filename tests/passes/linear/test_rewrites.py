"""What all rewrites of linear layers promise: refusals, prices, prepared tensors, edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.rewrite import Match, Refusal, Rewrite
from fxopt.ir.site import Site, TemporaryInfo
from fxopt.ir.workload import Scenario
from fxopt.passes.linear.dense import dense_call, linear_info
from fxopt.passes.linear.low_rank import LowRank
from fxopt.passes.linear.low_rank_pivoted import LowRankPivoted
from fxopt.passes.linear.low_rank_quantized import LowRankQuantized
from fxopt.passes.linear.monarch import Monarch
from fxopt.passes.linear.quantized import Quantized
from fxopt.passes.linear.quantized_low_rank import QuantizedLowRank

REWRITES: tuple[Rewrite, ...] = (
    LowRank(),
    LowRankPivoted(),
    Monarch(),
    Quantized(),
    LowRankQuantized(),
    QuantizedLowRank(ranks=(8, 16)),
)
CALLS = {
    "linear.low_rank": ["low_rank_linear"],
    "linear.low_rank_pivoted": ["low_rank_pivoted"],
    "linear.monarch": ["monarch_linear"],
    "linear.quantized": ["quantized_linear"],
    "linear.low_rank_quantized": ["quantized_linear", "quantized_linear"],
    "linear.quantized_low_rank": ["quantized_linear", "low_rank_linear", "add"],
}
DECODE = Scenario("decode", batch=3, queries=1, past=10)
PREFILL = Scenario("prefill", batch=2, queries=500, past=0)
STORED = (torch.uint8, torch.float8_e4m3fn, torch.float32, torch.int32)
Make = Callable[..., Any]


@pytest.fixture(params=REWRITES, ids=lambda r: r.name)
def rewrite(request: pytest.FixtureRequest) -> Rewrite:
    return request.param


def candidates(rewrite: Rewrite, site: Site) -> tuple[Match, list[Any]]:
    match = rewrite.match(site)
    assert isinstance(match, Match)
    found = rewrite.candidates(match, (PREFILL, DECODE))
    assert found
    assert len({c.label for c in found}) == len(found)
    assert all(c.rewrite == rewrite.name for c in found)
    return match, found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocked": "an expert of a group"}, "an expert of a group"),
        ({"shared_with": ("embed",)}, "the weight is shared with embed"),
        ({"dtype": torch.float8_e4m3fn}, "float8_e4m3fn are not supported"),
        ({"out_features": 63}, "63 x 128 is too small"),
        ({"in_features": 32}, "192 x 32 is too small"),
    ],
)
def test_refusals_say_why(rewrite: Rewrite, site: Make, changes: Any, reason: str) -> None:
    refusal = rewrite.match(site(torch.empty(192, 128), **changes))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_other_families_are_refused(rewrite: Rewrite) -> None:
    info = TemporaryInfo("mlp", (), 256, 64)
    refusal = rewrite.match(Site("activation", "mlp", "mul", info, "mlp"))
    assert isinstance(refusal, Refusal)
    assert "activation site" in refusal.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_edited_graph_computes_what_was_emulated(
    rewrite: Rewrite,
    site: Make,
    recorded: Make,
    rewritten: Make,
    correlated: Make,
    dtype: torch.dtype,
    with_bias: bool,
    transposed: bool,
) -> None:
    weight = torch.randn(192, 128).to(dtype)
    bias = torch.randn(192).to(dtype) if with_bias else None
    statistics = recorded(weight, bias, correlated(300, 128))
    match, found = candidates(rewrite, site(weight, bias, transposed=transposed))
    for candidate in (found[0], found[-1]):
        tensors = rewrite.prepare(match, candidate, statistics)
        assert all(t.is_contiguous() for t in tensors.values())
        assert {t.dtype for t in tensors.values()} <= {dtype, *STORED}
        emulated = rewrite.emulate(match, candidate, tensors, statistics.inputs)
        graph, editor = rewritten(rewrite, candidate, tensors, weight, bias, transposed)
        x = statistics.inputs["x"]
        assert torch.equal(graph(x), emulated)
        assert "bias" not in editor.registered  # the original's own is read again
        targets = {str(n.target) for n in graph.graph.nodes}
        assert "weight" not in targets
        assert ("bias" in targets) == with_bias
        again = rewrite.prepare(match, candidate, statistics)
        assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scenario", [DECODE, PREFILL], ids=lambda s: s.name)
def test_prices_add_up(
    rewrite: Rewrite, site: Make, recorded: Make, scenario: Scenario, with_bias: bool
) -> None:
    weight, rows = torch.randn(192, 128).bfloat16(), torch.randn(300, 128)
    bias = torch.randn(192).bfloat16() if with_bias else None
    match, found = candidates(rewrite, site(weight, bias))
    kept = dense_call(linear_info(match), scenario)
    tokens = scenario.batch * scenario.queries
    assert kept.weight_bytes == weight.nbytes + (192 * 2 if with_bias else 0)
    assert kept.flops == 2 * tokens * weight.numel()
    assert kept.bytes_read == kept.weight_bytes + tokens * 128 * 2
    assert kept.bytes_written == tokens * 192 * 2
    keys = {kept.key}
    for candidate in found:
        tensors = rewrite.prepare(match, candidate, recorded(weight, bias, rows))
        calls = rewrite.lower(match, candidate, scenario)
        ops = [call.op.partition("::")[2] for call in calls]
        assert ops == (["fp8_linear"] if candidate.label == "fp8" else CALLS[rewrite.name])
        stored = sum(t.nbytes for t in tensors.values())
        assert sum(call.weight_bytes for call in calls) == stored < kept.weight_bytes
        assert sum(call.bytes_read for call in calls) >= stored + tokens * 128 * 2
        if len(calls) == 1 and "fp8" not in ops[0] and "quantized" not in ops[0]:
            factors = sum(t.numel() for t in tensors.values() if t.ndim > 1)
            assert calls[0].flops == 2 * tokens * factors
            assert calls[0].bytes_written == tokens * 192 * 2 + calls[0].temporary_bytes
        keys.add("+".join(call.key for call in calls))
        assert calls[-1].run is not None
        assert calls[-1].run(torch.device("cpu"))().shape == (tokens, 192)
    assert len(keys) == len(found) + 1


def test_key_names_op_form_and_sizes(site: Make) -> None:
    match, found = candidates(Quantized(), site(torch.empty(192, 128, dtype=torch.bfloat16)))
    keys = [Quantized().lower(match, c, DECODE)[0].key for c in found]
    assert keys == [
        *(f"quantized_linear/{form}/m3n192k128/bf16" for form in ("b8g128", "b4g64", "b4g128")),
        "fp8_linear/m3n192k128/bf16",
    ]
    assert dense_call(linear_info(match), DECODE).key == "linear/m3n192k128/bf16"


def test_workloads_are_those_of_inference(rewrite: Rewrite) -> None:
    assert rewrite.workloads == {"forward", "generate"}
    assert rewrite.family == "linear"
    assert not rewrite.exact
    assert rewrite.paper.startswith("https://")


def site_errors(statistics: Any, rewrite: Rewrite, site: Site) -> dict[str, float]:
    """E‖D x‖² / E‖W x‖² of every candidate by its label."""
    match, found = candidates(rewrite, site)
    exact = F.linear(statistics.inputs["x"], statistics.weight, statistics.bias)
    errors: dict[str, float] = {}
    for candidate in found:
        tensors = rewrite.prepare(match, candidate, statistics)
        change = rewrite.emulate(match, candidate, tensors, statistics.inputs) - exact
        errors[candidate.label] = float(change.square().sum() / exact.square().sum())
    return errors


def test_planted_low_rank_is_found_by_low_rank(
    site: Make, recorded: Make, correlated: Make
) -> None:
    weight = torch.randn(256, 24) @ torch.randn(24, 192)
    rows = correlated(400, 192)
    errors = site_errors(recorded(weight, None, rows), LowRank(), site(weight))
    assert errors["rank16"] > 1e-3
    assert errors["rank24"] < 1e-5
    noise = torch.randn(256, 192)
    errors = site_errors(recorded(noise, None, rows), LowRank(), site(noise))
    assert errors["rank24"] > 0.05


def test_planted_outlier_channels_want_small_groups(site: Make, recorded: Make) -> None:
    weight: Tensor = torch.randn(192, 256)
    weight[:, 7] *= 50
    rows = torch.randn(400, 256)
    rows[:, 7] /= 50
    rewrite = Quantized(bits=(8, 4), group_sizes=(32, 256))
    _, found = candidates(rewrite, site(weight))
    assert [c.label for c in found] == ["int8", "int4-g32", "int4", "fp8"]
    errors = site_errors(recorded(weight, None, rows), rewrite, site(weight))
    assert errors["int8"] < 1e-2
    assert errors["int4-g32"] < 0.2 * errors["int4"]


def test_sizes_that_do_not_divide(site: Make) -> None:
    odd = site(torch.empty(193, 126))
    refusal = Monarch().match(odd)
    assert isinstance(refusal, Refusal)
    assert "193 x 126 does not split into (2, 4) equal blocks" in refusal.reason
    assert [c.label for c in candidates(Quantized(), odd)[1]] == ["int8", "fp8"]
    refusal = Quantized(bits=(4,), fp8=False).match(odd)
    assert isinstance(refusal, Refusal)
    assert "no group size of (64, 128) divides the 126 input features" in refusal.reason
    half = site(torch.empty(194, 126))
    assert {c.parameters["blocks"] for c in candidates(Monarch(), half)[1]} == {2}
