"""What rounding is assumed to lose of weights that are not there."""

from __future__ import annotations

import pytest
import torch

from fxopt.decide.assumed import Assumed
from fxopt.decide.propose import Proposal
from fxopt.ir.rewrite import Match
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.passes.kv_cache.blocks import Blocks
from fxopt.passes.linear.quantized import Quantized

CALLS = [Scenario("decode", 1, 1, 2048)]


def errors(rewrite: Quantized | Blocks, site: Site) -> dict[str, float]:
    assumed, match = Assumed(), rewrite.match(site)
    assert isinstance(match, Match)
    found = rewrite.candidates(match, CALLS)
    return {c.label: assumed(Proposal(site, rewrite, match, c)) for c in found}


def linear(in_features: int, out_features: int = 256) -> Site:
    info = LinearInfo("w", None, in_features, out_features, torch.float32)
    return Site("linear", "w", "w", info, "w")


def cache(num_heads: int, num_kv_heads: int) -> Site:
    info = AttentionInfo(
        num_heads, num_kv_heads, 64, 64, torch.float32, causal=True, window=0, softcap=0.0,
        has_mask=False, has_bias=False, has_sinks=False, cross=False, cached=True,
    )  # fmt: skip
    return Site("kv_cache", "a/kv=0", "a", info, "a", head=0)


@pytest.mark.parametrize("in_features", [512, 1536])
def test_linears_lose_what_rounding_to_a_grid_over_each_group_does(in_features: int) -> None:
    found = errors(Quantized(), linear(in_features))
    weight = torch.randn(2000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    for bits, label in ((4, "int4-g64"),):
        step = (high - low) / (2**bits - 1)
        rounded = low + torch.round((weight - low) / step) * step
        expected = ((rounded - weight).square().sum() / weight.square().sum()).item()
        assert found[label] == pytest.approx(expected, rel=0.2)
    assert found["int8-g128"] < found["fp8"] < found["int4-g64"] < found["int4-g128"]


def test_a_cache_loses_more_the_fewer_its_bits_and_heads_share_an_output() -> None:
    info = AttentionInfo(
        8, 4, 64, 64, torch.float32, True, 0, 0.0, False, False, False, False, True
    )
    site = Site("kv_cache", "a/kv=0", "a", info, "a", head=0)
    found = errors(Blocks(), site)
    order = [next(e for label, e in found.items() if label.startswith(kind))
             for kind in ("k8v8", "k8v4", "k4v4", "k4v2", "k2v2")]  # fmt: skip
    assert order == sorted(order)
    assert order[0] < found["k8vf8g128r64s4"] < found["kf8vf8g128r64s4"] < order[2]
    assert order[0] > 0
    alone = AttentionInfo(
        2, 1, 64, 64, torch.float32, True, 0, 0.0, False, False, False, False, True
    )
    whole = errors(Blocks(), Site("kv_cache", "a/kv=0", "a", alone, "a", head=0))
    for label, error in whole.items():
        assert error == pytest.approx(4 * found[label], rel=1e-6)


def test_random_numbers_of_the_caller_are_as_before() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    errors(Quantized(), linear(512))
    assert torch.equal(torch.rand(2), expected)
