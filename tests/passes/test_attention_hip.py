"""`attention.hip`: refusals, prices, edits, and the heads that it is for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxopt
from fxopt.ir import ops
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.kernels.block_topk.reference import SPARED, TILE, kept_tiles, tiles
from fxopt.kernels.hip.reference import halvings
from fxopt.passes.attention.block_topk import BlockTopk
from fxopt.passes.attention.calls import (
    attention_call,
    kept_pairs,
    kept_tiles_call,
    looked_at,
)
from fxopt.passes.attention.hip import Hip
from tests.passes.attention_graph import GraphEditor
from tests.passes.planted import NEEDLES, Planted, planted_inputs

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip
REWRITE = Hip()


def site(head: int | None = 0, blocked: str | None = None, **changes: Any) -> Site:
    name = f"layer.attn/kv={head}"
    return Site("attention", name, "attend", replace(INFO, **changes), "layer.attn", head, blocked)


def matched(where: Site) -> Match:
    match = REWRITE.match(where)
    assert isinstance(match, Match)
    return match


def labels(workload: Forward | Generate) -> list[str]:
    return [c.label for c in REWRITE.candidates(matched(site()), scenarios(workload))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cross": True}, "cross attention: queries and keys do not share positions"),
        ({"causal": False}, "attention is not causal"),
        ({"has_bias": True}, "a bias is added to the scores"),
        ({"window": 8}, "the model itself attends only within 8 tokens"),
        ({"blocked": "the model reads its own weights"}, "the model reads its own weights"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    refusal = REWRITE.match(site(**changes))
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith(reason)
    info = LinearInfo("w", None, 64, 64, torch.float32)
    assert isinstance(REWRITE.match(Site("linear", "fc", "linear", info, "fc")), Refusal)


def test_shares_fit_the_prompt() -> None:
    assert labels(Generate(1, 100_000, 10)) == ["hip5%", "hip10%", "hip20%"]
    assert labels(Forward(1, 4096)) == ["hip20%"]
    short = scenarios(Generate(batch=1, prompt=2000, new_tokens=100_000))
    assert REWRITE.candidates(matched(site()), short) == []
    said = REWRITE.refusal(matched(site()), short)
    assert said is not None
    assert "longest prompt has 2000 tokens" in said
    assert "with 5% of its tiles, but at least 8 of 128 keys, 83% of the attention" in said
    tiny = REWRITE.refusal(matched(site()), [Scenario("forward", 1, 90, 0)])
    assert tiny is not None
    assert "brings more than 90 tokens, and the last 256 of a call see all keys" in tiny
    assert REWRITE.refusal(matched(site()), scenarios(Forward(1, 4096))) is None


@given(queries=st.integers(1, 9000), past=st.integers(0, 90_000), top=st.integers(1, 999))
@settings(max_examples=50)
def test_the_search_looks_at_chunks_level_by_level(queries: int, past: int, top: int) -> None:
    expected = 0
    for number in range(tiles(queries) - SPARED):
        seen = tiles((number + 1) * TILE + past)
        levels = range(halvings(top), -1, -1)
        chunks = [-(-seen // 2**level) for level in levels]
        # Each level but the first looks at the halves of what the one before kept.
        expected += chunks[0]
        for before, here in pairwise(chunks):
            expected += min(2 * min(before, kept_tiles(seen, top)), here)
    assert looked_at(queries, queries + past, top) == expected


def test_prices_follow_the_share() -> None:
    prefill, decode = Scenario("prefill", 2, 32_768, 0), Scenario("decode", 2, 1, 32_768)
    dense, some = attention_call(INFO, prefill), kept_tiles_call(INFO, prefill, 100, hip=True)
    asking, more = kept_tiles_call(INFO, prefill, 100), kept_tiles_call(INFO, prefill, 200, True)
    assert 0.1 < some.flops / dense.flops < asking.flops / dense.flops < 0.17
    assert some.flops < more.flops < dense.flops / 4
    assert len({some.key, more.key, asking.key, dense.key}) == 4
    assert some.bytes_read > dense.bytes_read
    assert some.temporary_bytes > 0
    assert kept_tiles_call(INFO, decode, 100, hip=True) == attention_call(INFO, decode)
    short = Scenario("prefill", 2, 900, 0)
    assert kept_tiles_call(INFO, short, 100, hip=True) == attention_call(INFO, short)


@pytest.mark.parametrize("share", [50, 100, 200])
def test_the_estimate_is_cheap(share: int) -> None:
    """At 131,072 tokens it is a hundredth of the dense arithmetic, and of what asking some queries
    of all keys multiplies an eighth."""
    info = replace(INFO, num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128)
    scenario = Scenario("prefill", 1, 131_072, 0)
    dense = attention_call(info, scenario)
    pairs = kept_pairs(131_072, 131_072, share) / (131_072 * 131_073 // 2)
    found, asked = (
        kept_tiles_call(info, scenario, share, hip=hip).flops - pairs * dense.flops
        for hip in (True, False)
    )
    assert 0 < found < 0.01 * dense.flops
    assert found < asked / 8


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0, "has_sinks": True}])
def test_prices_can_be_measured(changes: dict[str, Any]) -> None:
    match = Match(site(**changes))
    for scenario in (Scenario("prefill", 1, 1500, 0), Scenario("decode", 1, 1, 1500)):
        (call,) = REWRITE.lower(match, Candidate(REWRITE.name, "hip5%", {"top": 50}), scenario)
        assert call.run is not None
        out = call.run("cpu")()
        assert out.shape == (1, scenario.queries, 6, 16)
        assert out.isfinite().all()


def test_apply_changes_one_head_beside_those_of_another_way() -> None:
    editor = GraphEditor(scale=0.25, causal=True)
    q, k, v = (torch.randn(1, heads, 1500, 16) for heads in (6, 3, 3))
    dense = editor.run(2 * q, k, v)
    inputs = {"q": 2 * q, "k": k, "v": v, "scale": 0.25, "causal": True}
    work = scenarios(Generate(batch=1, prompt=8000, new_tokens=4))
    emulated: dict[int, Tensor] = {}
    for rewrite, head in ((REWRITE, 1), (BlockTopk(), 2)):
        match = Match(site(head))
        candidate = rewrite.candidates(match, work)[0]
        rewrite.apply(match, candidate, {}, editor)  # pyright: ignore[reportArgumentType]
        emulated[head] = rewrite.emulate(match, candidate, {}, inputs)
    out = editor.run(2 * q, k, v)
    for head, alone in emulated.items():
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(out[:, :, mine], alone[:, :, mine])
    assert (emulated[1] - emulated[2]).abs().max() > 0.01
    assert editor.attend.kwargs["top"] == (0, 100, 100)
    assert editor.attend.kwargs["hip"] == (0, 1, 0)
    torch.testing.assert_close(out[:, :, :2], dense[:, :, :2])


def test_tokens_past_the_prompt_see_all_keys() -> None:
    q, k, v = (torch.randn(1, heads, 1500, 16) for heads in (6, 3, 3))
    inputs = {"q": 2 * q, "k": k, "v": v, "scale": 0.25, "causal": True}
    candidate = Candidate(REWRITE.name, "hip5%", {"top": 50})
    out = REWRITE.emulate(matched(site()), candidate, {}, inputs | {"prompt": 1300})
    dense = ops.attend(**inputs)
    torch.testing.assert_close(out[:, 1300:], dense[:, 1300:])
    prompt = {name: x[:, :, :1300] if name in "qkv" else x for name, x in inputs.items()}
    torch.testing.assert_close(out[:, :1300], ops.attend(**prompt, top=[50], hip=[1]))
    assert (out - dense)[:, 1100:1300].abs().max() > 0.01


def test_the_retrieving_head_gets_it_and_the_diffuse_one_is_kept() -> None:
    data = [planted_inputs([n + 97 * i for n in NEEDLES]) for i in range(3)]
    plan = fxopt.plan(
        Planted().eval(), fxopt.Budget(relative_error=0.05), data[0], calibration=data,
        rewrites=["attention.hip"],
    )  # fmt: skip
    first, second = plan.decisions
    assert (first.key.endswith("kv=0"), first.label) == (True, "hip20%")
    assert second.rewrite != "attention.hip"
    offered = {other.label: other.error for other in second.alternatives}
    assert offered["hip20%"] > 0.05
    assert first.error < 0.01
    assert first.kept_mass is not None
    assert first.kept_mass.mean > 0.95
