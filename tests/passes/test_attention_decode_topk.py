"""`attention.decode_topk`: refusals, prices, edits, and the heads that it is for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.decide.options import calls_of
from fxopt.ir import ops
from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.kernels.decode_topk.reference import TILE
from fxopt.kernels.kv_attention import allocate, kept, parse, state_bytes
from fxopt.passes.attention.calls import attention_call
from fxopt.passes.attention.decode_topk import DecodeTopk
from fxopt.passes.attention.window import Window
from fxopt.passes.baseline import baseline_calls
from fxopt.passes.kv_cache.blocks import Blocks
from fxopt.passes.kv_cache.calls import cached_call, cached_calls

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip
LONG = scenarios(Generate(batch=2, prompt=32_000, new_tokens=100))
REWRITE = DecodeTopk()


def site(
    head: int | None = 0, blocked: str | None = None, family: Any = "attention", **changes: Any
) -> Site:
    info = replace(INFO, **changes)
    return Site(family, f"layer.attn/kv={head}", "attend", info, "layer.attn", head, blocked)


def candidate(top_keys: int, refresh: int = 1) -> Candidate:
    kept = {"refresh": refresh} if refresh > 1 else {}
    return Candidate(REWRITE.name, f"top{top_keys}", {"top_keys": top_keys, **kept})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cross": True}, "cross attention: queries and keys do not share positions"),
        ({"cached": False}, "this attention reads no cache while generating"),
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


def test_numbers_fit_the_past() -> None:
    match = Match(site())

    def labels(work: Forward | Generate) -> list[str]:
        return [c.label for c in REWRITE.candidates(match, scenarios(work))]

    each = ["top1024", "top2048", "top4096"]
    assert labels(Generate(1, 32_000, 10)) == [*each, "top1024/8", "top2048/8", "top4096/8"]
    # what keeping saves of 16,000 tokens: 29, 17 and 10 %
    assert labels(Generate(1, 16_000, 10)) == [*each, "top1024/8", "top2048/8"]
    assert labels(Generate(1, 4000, 96)) == ["top1024"]
    short = scenarios(Generate(batch=1, prompt=1500, new_tokens=100))
    assert REWRITE.candidates(match, short) == []
    said = REWRITE.refusal(match, short)
    assert said is not None
    assert "has 1550 tokens: with 1024 of them it would still read 67%" in said
    assert said.endswith("it pays up to 50%")
    assert REWRITE.candidates(match, scenarios(Forward(1, 50_000))) == []
    assert REWRITE.refusal(match, LONG) is None


@given(
    past=st.integers(1, 200_000),
    top_keys=st.integers(1, 9000),
    format=st.sampled_from([None, "k8v8g128r64s4", "k4v4g64r64s4", "k2v2g128r0s0"]),
)
def test_cost_falls_with_what_is_read(past: int, top_keys: int, format: str | None) -> None:
    fmt = parse(format or "").classes[0].format
    step = Scenario("decode", 2, 1, past)
    dense = cached_call(INFO, fmt, step)
    some, more = (
        cached_call(replace(INFO, top_keys=keys), fmt, step) for keys in (top_keys, top_keys + 500)
    )
    assert some.flops <= more.flops
    assert some.bytes_read <= more.bytes_read
    assert some.key != more.key != dense.key
    ranges = 0 if fmt else 2 * 2 * ((past + 1) // TILE) * 16 * 4
    assert some.state_bytes == dense.state_bytes + ranges
    # Several tokens at once see all.
    several = replace(step, queries=3)
    expected = cached_call(INFO, fmt, several)
    assert cached_call(replace(INFO, top_keys=top_keys), fmt, several).flops == expected.flops


@pytest.mark.parametrize("format", ["", "k8v8g128r64s4", "k4v4g64r64s4"])
def test_choosing_costs_a_token_its_part(format: str) -> None:
    """A step that keeps a choice and the part of one choice are a step that chooses, when one token
    in one chooses; of n tokens each has an n-th."""
    fmt, step = parse(format).classes[0].format, Scenario("decode", 2, 1, 30_000)
    each = cached_call(replace(INFO, top_keys=1024), fmt, step)

    def calls(refresh: int) -> tuple[OpCall, OpCall]:
        info = replace(INFO, top_keys=1024, refresh=refresh)
        reads, choice = cached_calls(info, fmt, step)
        return reads, choice

    some, choice = calls(8)
    assert some.flops + 8 * choice.flops == each.flops
    query = 2 * 2 * 16 * 4
    assert some.bytes_read + 8 * choice.bytes_read - query == each.bytes_read
    assert choice.bytes_read * 4 == calls(2)[1].bytes_read
    assert choice.share == 8 * 3
    assert len({one.key for one in (some, each, calls(2)[0])}) == 3
    assert choice.family != some.family
    more = some.state_bytes - each.state_bytes
    state = state_bytes(parse(f"{format or 'exact'}+t1024/8"), 2, 1, 16, 16, 30_001, 4)
    assert (some.state_bytes, choice.state_bytes) == (state, 0)
    assert 0 < more < 500
    # A prompt, and several tokens, choose nothing.
    for other in (LONG[0], replace(step, queries=3)):
        assert len(cached_calls(replace(INFO, top_keys=1024, refresh=8), fmt, other)) == 1


@pytest.mark.parametrize("format", ["", "k4v4g64r64s4"])
def test_what_is_timed_chooses_each_time_or_never(format: str) -> None:
    fmt, step = parse(format).classes[0].format, Scenario("decode", 2, 1, 900)
    info = replace(INFO, top_keys=256, refresh=8)
    asked: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        asked.append(1)
        return behind_best(*arguments)

    behind_best = kept.behind_best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "behind_best", counted)
        for call, expected in zip(cached_calls(info, fmt, step), (0, 3), strict=True):
            assert call.run is not None
            run = call.run("cpu")
            for _ in range(3):
                run()
            assert len(asked) == expected


@pytest.mark.parametrize("packed", [False, True])
def test_the_price_of_a_head_is_that_of_what_its_cache_reads(packed: bool) -> None:
    """Attention and cache are one decision: the cache's call attends, and knows what is read."""
    cache, step = Blocks(), LONG[1]
    format = cache.candidates(Match(site(family="kv_cache")), LONG)[2]
    stored: Any = SimpleNamespace(match=Match(site()), rewrite=cache, candidate=format)
    near: Any = SimpleNamespace(match=Match(site()), rewrite=REWRITE, candidate=candidate(2048))
    sites = (site(), site(family="kv_cache"))
    chosen = {"kv_cache": stored} if packed else {}
    (whole,) = calls_of(sites, chosen, step, baseline_calls)
    (some,) = calls_of(sites, {**chosen, "attention": near}, step, baseline_calls)
    # 6.4 % of the tokens, and two numbers a channel of 32 of them; packed, scales are read whole.
    assert some.bytes_read < (0.15 if packed else 0.1) * whole.bytes_read
    assert some.flops < 0.15 * whole.flops
    near = SimpleNamespace(match=Match(site()), rewrite=REWRITE, candidate=candidate(2048, 8))
    reads, choice = calls_of(sites, {**chosen, "attention": near}, step, baseline_calls)
    assert reads.bytes_read + 7 * choice.bytes_read < some.bytes_read
    assert choice.key.startswith("kv_choice/")
    prompt = [c for c in calls_of(sites, {"attention": near}, LONG[0], baseline_calls)]
    assert prompt[0].key == attention_call(INFO, LONG[0]).key


def test_prices_can_be_measured() -> None:
    for scenario in (Scenario("prefill", 1, 700, 0), Scenario("decode", 1, 1, 700)):
        (call,) = REWRITE.lower(Match(site()), candidate(128), scenario)
        assert call.run is not None
        out = call.run("cpu")()
        assert out.shape == (1, scenario.queries, 6, 16)
        assert out.isfinite().all()


class Editor:
    """The layout of one attention node."""

    def __init__(self) -> None:
        self.kwargs: dict[str, Any] = {}

    def node(self, site: Site) -> Any:
        return SimpleNamespace(kwargs=self.kwargs)

    def update(self, site: Site, **kwargs: Any) -> None:
        self.kwargs.update(kwargs)


def test_apply_changes_one_head_beside_packed_ones() -> None:
    editor: Any = Editor()
    REWRITE.apply(Match(site(1)), candidate(4096), {}, editor)
    assert editor.kwargs["layout"] == "0,2:exact|1:exact+t4096"
    cache = Blocks()
    format = cache.candidates(Match(site(family="kv_cache")), LONG)[2]
    for head in (1, 2):
        cache.apply(Match(site(head, family="kv_cache")), format, {}, editor)
    assert editor.kwargs["layout"] == "0:exact|1:kf8vf8g128r64s4+t4096|2:kf8vf8g128r64s4"
    REWRITE.apply(Match(site(2)), candidate(4096), {}, editor)
    assert editor.kwargs["layout"] == "0:exact|1,2:kf8vf8g128r64s4+t4096"
    REWRITE.apply(Match(site(0)), candidate(1024, 8), {}, editor)
    assert editor.kwargs["layout"] == "0:exact+t1024/8|1,2:kf8vf8g128r64s4+t4096"


LENGTH, PROMPT, NEEDLE = 2600, 2540, 700


def planted() -> dict[str, Any]:
    """One far key that all queries past the prompt want, among keys without a structure."""
    q, k, v = (torch.randn(1, heads, LENGTH, 16) for heads in (6, 3, 3))
    wanted = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    k[0, :, NEEDLE], v[0, :, NEEDLE] = 8 * wanted, 5.0
    q = q / 4 + 8 * wanted.repeat_interleave(2, 0)[:, None]
    return {"q": q, "k": k, "v": v, "scale": 0.25, "causal": True, "prompt": PROMPT}


def test_it_fetches_what_a_window_of_equal_cost_loses() -> None:
    inputs = planted()
    dense = ops.attend(**{name: x for name, x in inputs.items() if name != "prompt"})
    found = REWRITE.emulate(Match(site()), candidate(512), {}, inputs)
    near = Candidate("attention.window", "w512", {"window": 512, "sink": 32})
    lost = Window().emulate(Match(site()), near, {}, inputs)
    rows = slice(PROMPT, LENGTH)

    def error(out: Tensor) -> float:
        return float((out - dense)[:, rows].norm() / dense[:, rows].norm())

    assert error(found) < 0.05
    assert error(lost) > 0.5
    torch.testing.assert_close(found[:, :PROMPT], dense[:, :PROMPT])
    queries = torch.arange(PROMPT, LENGTH, 7)
    masses = [
        mask.kept_mass(Match(site()), choice, inputs, queries).mean()
        for mask, choice in ((REWRITE, candidate(512)), (Window(), near))
    ]
    assert masses[0] > 0.9 > 0.3 > masses[1]
    step = Scenario("decode", 1, 1, PROMPT)
    read = cached_call(replace(INFO, top_keys=512), None, step).bytes_read
    assert read < 1.35 * cached_call(INFO, None, step, 512).bytes_read


def test_all_tiles_are_dense_attention_and_choices_are_the_same_each_time() -> None:
    inputs = planted()
    dense = ops.attend(**{name: x for name, x in inputs.items() if name != "prompt"})
    every = REWRITE.emulate(Match(site()), candidate(LENGTH), {}, inputs)
    torch.testing.assert_close(every, dense, rtol=1e-4, atol=1e-5)
    some = [REWRITE.emulate(Match(site()), candidate(256), {}, inputs) for _ in range(2)]
    assert torch.equal(*some)


def test_the_error_has_what_comes_of_keeping() -> None:
    """Tokens that look each for another far key: who reads what the one before chose misses it."""
    inputs = planted()
    places = torch.arange(PROMPT, LENGTH) * 37 % 2300
    wanted = torch.nn.functional.normalize(torch.randn(3, len(places), 16), dim=-1)
    inputs["k"][0, :, places], inputs["v"][0, :, places] = 8 * wanted, 5.0
    inputs["q"][0, :, PROMPT:] = 8 * wanted.repeat_interleave(2, 0)
    dense = ops.attend(**{name: x for name, x in inputs.items() if name != "prompt"})
    rows = slice(PROMPT, LENGTH)
    errors = [
        float((REWRITE.emulate(Match(site()), one, {}, inputs) - dense)[:, rows].norm())
        for one in (candidate(512), candidate(512, 8))
    ]
    assert errors[1] > 3 * errors[0]
    queries = torch.arange(PROMPT, LENGTH)
    masses = [
        REWRITE.kept_mass(Match(site()), one, inputs, queries)
        for one in (candidate(512), candidate(512, 8))
    ]
    assert torch.equal(masses[0][..., ::8], masses[1][..., ::8])
    assert masses[1].mean() < masses[0].mean() - 0.2


@pytest.mark.parametrize("format", ["exact", "k4v4g32r8s4"])
def test_emulation_is_decoding(format: str) -> None:
    """What the one pass of `emulate` gives is what tokens one by one give through the cache."""
    inputs, prompt = planted(), 2580
    inputs = {n: x[:, :, :2590] if n in "qkv" else x for n, x in inputs.items()}
    layout = f"{format}+t128/4"
    expected = ops.attend_as_decoded(**{**inputs, "prompt": prompt, "layout": layout})
    state = allocate(parse(layout), 1, 3, 16, 16, 2590, torch.float32)
    start, outputs = torch.zeros((), dtype=torch.int64), list[Tensor]()
    for count in (prompt, *[1] * 10):
        done = int(start)
        new = [inputs[n][:, :, done : done + count] for n in "qkv"]
        outputs.append(
            ops.attend(*new, state=state, start=start, scale=0.25, causal=True, layout=layout)
        )
        start += count
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-4, atol=1e-5)
