"""`attention.block_topk`: refusals, prices, edits, and the heads that it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxopt
from fxopt.ir import ops
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.kernels.block_topk.reference import TILE, chosen_tiles
from fxopt.passes.attention.block_topk import BlockTopk
from fxopt.passes.attention.calls import attention_call, kept_pairs, kept_tiles_call
from fxopt.passes.attention.window import Window
from tests.passes.attention_graph import GraphEditor
from tests.passes.planted import LENGTH, NEEDLES, Planted, planted_inputs

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip
PROMPT = scenarios(Generate(batch=1, prompt=8000, new_tokens=4))
REWRITE = BlockTopk()


def site(head: int | None = 0, blocked: str | None = None, **changes: Any) -> Site:
    name = f"layer.attn/kv={head}"
    return Site("attention", name, "attend", replace(INFO, **changes), "layer.attn", head, blocked)


def matched(where: Site) -> Match:
    match = REWRITE.match(where)
    assert isinstance(match, Match)
    return match


def labels(workload: Forward | Generate) -> list[str]:
    found = REWRITE.candidates(matched(site()), scenarios(workload))
    return [c.label for c in found if "+d" not in c.label]


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


def test_other_families_are_refused() -> None:
    info = LinearInfo("w", None, 64, 64, torch.float32)
    refusal = REWRITE.match(Site("linear", "fc", "linear", info, "fc"))
    assert isinstance(refusal, Refusal)
    assert "linear site" in refusal.reason


def test_shares_fit_the_prompt() -> None:
    assert labels(Generate(1, 100_000, 10)) == ["top5%", "top10%", "top20%"]
    # Eight tiles are more than a fifth of 32: one candidate stands for all shares.
    assert labels(Forward(1, 4096)) == ["top20%"]
    assert labels(Generate(1, 8000, 10)) == ["top10%", "top20%"]
    match = matched(site())
    short = scenarios(Generate(batch=1, prompt=2000, new_tokens=100_000))
    assert REWRITE.candidates(match, short) == []
    said = REWRITE.refusal(match, short)
    assert said is not None
    assert "longest prompt has 2000 tokens" in said
    assert "with 5% of its tiles, but at least 8 of 128 keys, 83% of the attention" in said
    assert said.endswith("it pays below 60%")
    tiny = REWRITE.refusal(match, [Scenario("forward", 1, 90, 0)])
    assert tiny is not None
    assert "brings more than 90 tokens, and the last 256 of a call see all keys" in tiny
    assert REWRITE.refusal(match, PROMPT) is None


@given(length=st.integers(1, 5000), top=st.integers(1, 999), data=st.data())
def test_pairs_are_those_of_the_chosen_tiles(length: int, top: int, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, length))
    q, k = torch.randn(1, 1, queries, 1), torch.randn(1, 1, length, 1)
    chosen = chosen_tiles(q, k, None, 1.0, 0.0, [top])[0, 0, 0]
    rows = torch.arange(queries) // TILE
    first = torch.arange(length - queries, length)[:, None]
    starts = torch.arange(chosen.shape[1]) * TILE
    inside = (first - starts + 1).clamp(0, TILE)
    assert kept_pairs(queries, length, top) == int((chosen[rows] * inside).sum())


def test_prices_follow_the_share() -> None:
    prefill, decode = Scenario("prefill", 2, 32_768, 0), Scenario("decode", 2, 1, 32_768)
    dense, some = attention_call(INFO, prefill), kept_tiles_call(INFO, prefill, 100)
    more = kept_tiles_call(INFO, prefill, 200)
    # A tenth of the tiles, more in the first and last rows, and a 32nd for the estimate.
    assert 0.1 + 1 / 32 < some.flops / dense.flops < 0.17
    assert some.flops < more.flops < dense.flops / 4
    assert some.key != more.key != dense.key
    assert some.bytes_read > dense.bytes_read
    assert some.temporary_bytes > 0
    assert kept_tiles_call(INFO, decode, 100) == attention_call(INFO, decode)
    short = Scenario("prefill", 2, 900, 0)
    assert kept_tiles_call(INFO, short, 100) == attention_call(INFO, short)


def test_the_estimate_is_cheap() -> None:
    """At 131,072 tokens it is at most a twentieth of the dense arithmetic."""
    info = replace(INFO, num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128)
    scenario = Scenario("prefill", 1, 131_072, 0)
    dense = attention_call(info, scenario)
    pairs = kept_pairs(131_072, 131_072, 50) / (131_072 * 131_073 // 2)
    estimate = kept_tiles_call(info, scenario, 50).flops - pairs * dense.flops
    assert 0 < estimate < 0.05 * dense.flops


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0, "has_sinks": True}])
def test_prices_can_be_measured(changes: dict[str, Any]) -> None:
    match = Match(site(**changes))
    for scenario in (Scenario("prefill", 1, 1500, 0), Scenario("decode", 1, 1, 1500)):
        (call,) = REWRITE.lower(match, Candidate(REWRITE.name, "top5%", {"top": 50}), scenario)
        assert call.run is not None
        out = call.run("cpu")()
        assert out.shape == (1, scenario.queries, 6, 16)
        assert out.isfinite().all()


def test_apply_changes_one_head_beside_windows() -> None:
    editor = GraphEditor(scale=0.25, causal=True)
    q, k, v = (torch.randn(1, heads, 1500, 16) for heads in (6, 3, 3))
    dense = editor.run(q, k, v)
    inputs = {"q": 2 * q, "k": k, "v": v, "scale": 0.25, "causal": True}
    window = Window(windows=(64,), sink=2)
    for rewrite, head in ((REWRITE, 1), (window, 2)):
        match = Match(site(head))
        candidate = rewrite.candidates(match, PROMPT)[0]
        rewrite.apply(match, candidate, {}, editor)  # pyright: ignore[reportArgumentType]
        emulated = rewrite.emulate(match, candidate, {}, inputs)
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(editor.run(2 * q, k, v)[:, :, mine], emulated[:, :, mine])
    assert editor.attend.kwargs["top"] == (0, 100, 0)
    assert editor.attend.kwargs["window"] == (0, 0, 64)
    torch.testing.assert_close(editor.run(q, k, v)[:, :, :2], dense[:, :, :2])


def test_tokens_past_the_prompt_see_all_keys() -> None:
    q, k, v = (torch.randn(1, heads, 1500, 16) for heads in (6, 3, 3))
    inputs = {"q": 2 * q, "k": k, "v": v, "scale": 0.25, "causal": True}
    candidate = Candidate(REWRITE.name, "top5%", {"top": 50})
    out = REWRITE.emulate(matched(site()), candidate, {}, inputs | {"prompt": 1300})
    dense = ops.attend(**inputs)
    torch.testing.assert_close(out[:, 1300:], dense[:, 1300:])
    prompt = {name: x[:, :, :1300] if name in "qkv" else x for name, x in inputs.items()}
    torch.testing.assert_close(out[:, :1300], ops.attend(**prompt, top=[50]))
    assert (out - dense)[:, 1100:1300].abs().max() > 0.01


def test_the_retrieving_head_gets_it_and_the_diffuse_one_is_kept() -> None:
    data = [planted_inputs([n + 97 * i for n in NEEDLES]) for i in range(3)]
    plan = fxopt.plan(
        Planted().eval(), fxopt.Budget(relative_error=0.05), data[0], calibration=data,
        rewrites=["attention"],
    )  # fmt: skip
    first, second = plan.decisions
    assert (first.key.endswith("kv=0"), first.label) == (True, "top20%")
    assert second.rewrite != "attention.block_topk"
    offered = {other.label: other.error for other in [*second.alternatives]}
    assert offered["top20%"] > 0.05
    # A window that costs about as much loses what the head looks for.
    windows = {other.label: other.error for other in first.alternatives}
    scenario = Scenario("forward", 1, LENGTH, 0)
    info = replace(INFO, num_heads=2, num_kv_heads=2)
    cost = kept_tiles_call(info, scenario, 200).flops
    assert attention_call(info, scenario, 1024, 16).flops > 0.8 * cost
    assert windows["w1024+s16"] > 0.1
    assert first.error < 0.01
