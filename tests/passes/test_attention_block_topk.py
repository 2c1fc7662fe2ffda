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
from fxopt.ir.cost import OpCall
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
    return [c.label for c in found if c.label.startswith("top") and "+d" not in c.label]


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


def test_parts_of_the_mass_are_offered_where_their_cap_pays() -> None:
    def offered(prompt: int, rewrite: BlockTopk = REWRITE) -> list[Candidate]:
        found = rewrite.candidates(matched(site()), scenarios(Generate(1, prompt, 10)))
        return [c for c in found if c.label.startswith("mass")]

    assert [c.label for c in offered(4096)] == ["mass90%", "mass95%"]
    assert [c.parameters["top"] for c in offered(4096)] == [400, 400]
    assert offered(4096, BlockTopk(cap=900)) == offered(2000) == offered(200) == []


@given(
    length=st.integers(1, 5000), top=st.integers(1, 999), mass=st.sampled_from([0, 1000]),
    data=st.data(),
)  # fmt: skip
def test_pairs_are_those_of_the_chosen_tiles(
    length: int, top: int, mass: int, data: st.DataObject
) -> None:
    queries = data.draw(st.integers(1, length))
    q, k = torch.randn(1, 1, queries, 1), torch.randn(1, 1, length, 1)
    chosen = chosen_tiles(q, k, None, 1.0, 0.0, [top], [mass])[0, 0, 0]
    rows = torch.arange(queries) // TILE
    first = torch.arange(length - queries, length)[:, None]
    starts = torch.arange(chosen.shape[1]) * TILE
    inside = (first - starts + 1).clamp(0, TILE)
    assert kept_pairs(queries, length, top, mass) == int((chosen[rows] * inside).sum())


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


def test_prices_of_a_part_of_the_mass_follow_what_is_expected() -> None:
    prefill = Scenario("prefill", 2, 32_768, 0)
    candidate = Candidate(REWRITE.name, "mass95%", {"mass": 950, "top": 500})

    def price(**extra: float) -> OpCall:
        (call,) = REWRITE.lower(Match(site(), extra), candidate, prefill)
        return call

    dense, cap = attention_call(INFO, prefill), price()
    few, some = price(density=0.05), price(density=0.3)
    # Of the pairs half at most where nothing is known, and a 32nd for the estimate.
    assert 0.5 + 1 / 32 < cap.flops / dense.flops < 0.56
    assert 0.05 + 1 / 32 < few.flops / dense.flops < 0.11
    assert few.flops < some.flops < cap.flops
    assert price(density=0.9).flops <= cap.flops
    assert len({few.key, some.key, cap.key, dense.key}) == 4
    (decode,) = REWRITE.lower(Match(site()), candidate, Scenario("decode", 2, 1, 32_768))
    assert decode == attention_call(INFO, Scenario("decode", 2, 1, 32_768))


def test_what_is_expected_is_what_is_kept() -> None:
    """Of each KV head, with padding, behind which decoded tokens count for nothing."""
    q, k = torch.randn(2, 6, 1500, 16), torch.randn(2, 3, 1500, 16)
    q[:, :2, :, 0], k[:, 0, :, 0], k[:, 0, 250, 0] = 40.0, 0.0, 6.0  # all want one key
    mask = torch.ones(2, 1500)
    mask[0, :200] = 0
    inputs = {"q": q, "k": k, "mask": mask, "scale": 0.25, "causal": True, "prompt": 1300}
    candidate = Candidate(REWRITE.name, "mass80%", {"mass": 800, "top": 600})
    assert REWRITE.varies(candidate)
    assert not REWRITE.varies(Candidate(REWRITE.name, "top5%", {"top": 50}))
    found = REWRITE.density(matched(site()), candidate, inputs)
    prompt = (q[:, :, :1300], k[:, :, :1300], mask[:, :1300], 0.25, 0.0)
    chosen = chosen_tiles(*prompt, [600] * 3, [800] * 3)[:, :, :, :-2]
    every = 4 * sum(range(1, 10))
    torch.testing.assert_close(found, chosen.sum((0, 2, 3, 4)) / float(every), check_dtype=False)
    assert found[0] < 0.9 * found[1]
    short = inputs | {"prompt": 256}
    assert REWRITE.density(matched(site()), candidate, short).tolist() == [1.0] * 3


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
        for parameters in ({"top": 50}, {"top": 500, "mass": 900}):
            told = Match(match.site, {"density": 0.2} if "mass" in parameters else {})
            (call,) = REWRITE.lower(told, Candidate(REWRITE.name, "", parameters), scenario)
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
    candidate = Candidate(REWRITE.name, "mass70%", {"mass": 700, "top": 500})
    REWRITE.apply(Match(site(0)), candidate, {}, editor)  # pyright: ignore[reportArgumentType]
    assert editor.attend.kwargs["top"] == (500, 100, 0)
    assert editor.attend.kwargs["mass"] == (700, 0, 0)
    emulated = REWRITE.emulate(matched(site()), candidate, {}, inputs)
    torch.testing.assert_close(editor.run(2 * q, k, v)[:, :, :2], emulated[:, :, :2])


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
    part = Candidate(REWRITE.name, "mass70%", {"mass": 700, "top": 400})
    out = REWRITE.emulate(matched(site()), part, {}, inputs | {"prompt": 1300})
    torch.testing.assert_close(out[:, 1300:], dense[:, 1300:])
    torch.testing.assert_close(out[:, :1300], ops.attend(**prompt, top=[400], mass=[700]))


def test_the_retrieving_head_gets_it_and_the_diffuse_one_is_kept() -> None:
    data = [planted_inputs([n + 97 * i for n in NEEDLES]) for i in range(3)]
    model = Planted().eval()
    plan = fxopt.plan(
        model, fxopt.Budget(relative_error=0.05), data[0], calibration=data,
        rewrites=["attention"],
    )  # fmt: skip
    first, second = plan.decisions
    assert (first.key.endswith("kv=0"), first.rewrite) == (True, "attention.block_topk")
    assert second.rewrite != "attention.block_topk"
    offered = {other.label: other.error for other in [*second.alternatives]}
    assert offered["top20%"] > 0.05
    # A window that costs about as much loses what the head looks for.
    windows = {other.label: other.error for other in first.alternatives}
    # A part of its mass is in few tiles; the other's is in as many as the cap lets it keep.
    few, many = (
        next(one for one in [d, *d.alternatives] if one.label == "mass95%") for d in (first, second)
    )
    assert few.density is not None
    assert many.density is not None
    assert few.density < 0.35 < 0.5 < many.density
    said = f"{few.density:.1%} of the work expected"
    assert any(said in text for text in plan.explain(first.key).splitlines())
    first.choose("attention.block_topk", "mass95%")
    again = fxopt.Plan.model_validate_json(plan.model_dump_json())
    opt = fxopt.apply(model, again, example_inputs=data[0])
    (attend,) = (node for node in opt.graph.nodes if "mass" in node.kwargs)
    assert (attend.kwargs["mass"], attend.kwargs["top"]) == ((950, 0), (400, 0))
    assert first.density == few.density
    scenario = Scenario("forward", 1, LENGTH, 0)
    info = replace(INFO, num_heads=2, num_kv_heads=2)
    cost = kept_tiles_call(info, scenario, 200).flops
    assert attention_call(info, scenario, 1024, 16).flops > 0.8 * cost
    assert windows["w1024+s16"] > 0.1
    assert first.error < 0.01


def test_parts_of_the_mass_need_prompts_of_which_tiles_are_left_out() -> None:
    """Shares are priced by sizes alone, and offered all the same."""
    data = [planted_inputs(NEEDLES) for _ in range(3)]
    plan = fxopt.plan(
        Planted().eval(), fxopt.Budget(relative_error=0.05), data[0],
        calibration=[x[:, :300] for x in data], rewrites=["attention.block_topk"],
    )  # fmt: skip
    reasons = {refusal.reason for refusal in plan.refusals}
    assert any(reason.startswith("mass95%: no tile of the calibration") for reason in reasons)
    for decision in plan.decisions:
        labels = {one.label for one in [decision, *decision.alternatives]}
        assert "top20%" in labels
        assert not labels & {"mass90%", "mass95%"}
