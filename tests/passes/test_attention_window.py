"""`attention.window` and `attention.exact`: refusals, prices, edits, what they do to outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxopt.kernels.attention.op  # noqa: F401 (registers the op)
from fxopt.ir import ops
from fxopt.ir.rewrite import Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.passes.attention.calls import attention_call, visible_pairs
from fxopt.passes.attention.exact import Exact
from fxopt.passes.attention.window import Window
from tests.passes.attention_graph import GraphEditor

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip
SMALL = Window(windows=(8, 16), sink=2)
PROMPT = scenarios(Generate(batch=1, prompt=60, new_tokens=4))


def site(head: int | None = 0, blocked: str | None = None, **changes: Any) -> Site:
    name = f"layer.attn/kv={head}"
    return Site("attention", name, "attend", replace(INFO, **changes), "layer.attn", head, blocked)


def matched(rewrite: Window | Exact, where: Site) -> Match:
    match = rewrite.match(where)
    assert isinstance(match, Match)
    return match


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cross": True}, "cross attention: queries and keys do not share positions"),
        ({"has_bias": True}, "a bias is added to the scores"),
        ({"window": 8}, "the model itself attends only within 8 tokens"),
        ({"blocked": "the model reads its own weights"}, "the model reads its own weights"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    refusal = SMALL.match(site(**changes))
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith(reason)


@pytest.mark.parametrize("rewrite", [Window(), Exact()])
def test_other_families_are_refused(rewrite: Window | Exact) -> None:
    info = LinearInfo("w", None, 64, 64, torch.float32)
    refusal = rewrite.match(Site("linear", "fc", "linear", info, "fc"))
    assert isinstance(refusal, Refusal)
    assert "linear site" in refusal.reason


def test_windows_fit_the_workload() -> None:
    match = matched(Window(), site())
    long = scenarios(Generate(batch=1, prompt=3900, new_tokens=200))
    labels = [c.label for c in Window().candidates(match, long)]
    assert [label for label in labels if "+d" not in label] == [
        "w256+s16", "w512+s16", "w1024+s16",
    ]  # fmt: skip
    short = scenarios(Generate(batch=1, prompt=400, new_tokens=100))
    assert Window().candidates(match, short) == []
    assert "longest sequence has 451 tokens" in str(Window().refusal(match, short))
    assert Window().refusal(match, long) is None
    narrow = matched(Window(), site(window=1024))
    assert [c.label for c in Window().candidates(narrow, long)] == ["w256+s16"]
    encoder = matched(Window(), site(causal=False))
    both = Window().candidates(encoder, scenarios(Forward(1, 1200)))
    assert [(c.label, c.parameters) for c in both] == [
        ("w256", {"window": 256, "sink": 0}),
        ("w512", {"window": 512, "sink": 0}),
    ]


def test_apply_changes_one_head_after_another() -> None:
    editor = GraphEditor(scale=0.25, causal=True)
    q, k, v = (torch.randn(1, heads, 60, 16) for heads in (6, 3, 3))
    dense = editor.run(q, k, v)
    for head, label in ((1, "w8+s2"), (2, "w16+s2")):
        match = matched(SMALL, site(head))
        candidate = next(c for c in SMALL.candidates(match, PROMPT) if c.label == label)
        SMALL.apply(match, candidate, {}, editor)  # pyright: ignore[reportArgumentType]
        assert editor.attend.kwargs["window"][head] == candidate.parameters["window"]
        emulated = SMALL.emulate(
            match, candidate, {}, {"q": q, "k": k, "v": v, "scale": 0.25, "causal": True}
        )
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(editor.run(q, k, v)[:, :, mine], emulated[:, :, mine])
    assert editor.attend.kwargs["window"] == (0, 8, 16)
    assert editor.attend.kwargs["sink_tokens"] == (0, 2, 2)
    torch.testing.assert_close(editor.run(q, k, v)[:, :, :2], dense[:, :, :2])


def test_exact_is_the_identity() -> None:
    editor, match = GraphEditor(scale=0.25, causal=True, window=(9,)), matched(Exact(), site())
    before = dict(editor.attend.kwargs)
    (candidate,) = Exact().candidates(match, PROMPT)
    Exact().apply(match, candidate, {}, editor)  # pyright: ignore[reportArgumentType]
    assert dict(editor.attend.kwargs) == before
    inputs = {name: torch.randn(1, 3, 20, 16) for name in "qkv"} | {"scale": 0.25, "window": (9,)}
    expected = ops.attend(**inputs)
    assert torch.equal(Exact().emulate(match, candidate, {}, inputs | {"prompt": 4}), expected)


def local(length: int) -> dict[str, Any]:
    """Attention whose weight falls off within a few positions."""
    position = torch.arange(length)[:, None] * torch.linspace(0.05, 0.8, 8)
    wave = torch.cat([position.cos(), position.sin()], 1).expand(1, 3, length, 16)
    q = wave.repeat_interleave(2, 1)
    v = torch.randn(1, 3, length, 16)
    return {"q": q, "k": wave, "v": v, "scale": 8.0, "causal": True}


def test_local_heads_lose_nothing_and_retrieving_ones_much() -> None:
    match, inputs = matched(SMALL, site()), local(60)
    candidate = SMALL.candidates(match, PROMPT)[-1]

    def error(inputs: dict[str, Any]) -> float:
        exact = ops.attend(**inputs)
        return float((SMALL.emulate(match, candidate, {}, inputs) - exact).norm() / exact.norm())

    assert error(inputs) < 1e-3
    # Each query now looks 30 tokens back.
    assert error(inputs | {"k": inputs["k"].roll(30, 2)}) > 0.5


@given(
    length=st.integers(1, 40),
    data=st.data(),
    window=st.integers(0, 50),
    sink=st.integers(0, 6),
)
def test_pairs_are_those_that_the_mask_lets_through(
    length: int, data: st.DataObject, window: int, sink: int
) -> None:
    queries = data.draw(st.integers(1, length))
    window = window if window < length else 0
    sink = sink if window else 0
    rows = torch.arange(length - queries, length)[:, None]
    columns = torch.arange(length)
    seen = columns <= rows
    if window:
        seen = seen & ((rows - columns < window) | (columns < sink))
    assert visible_pairs(queries, length, True, window, sink) == int(seen.sum())


def test_prices_follow_the_window() -> None:
    prefill, decode = Scenario("prefill", 2, 4096, 0), Scenario("decode", 2, 1, 4095)
    dense = [attention_call(INFO, scenario) for scenario in (prefill, decode)]
    window = [attention_call(INFO, scenario, 256, 16) for scenario in (prefill, decode)]
    assert dense[0].flops == 2 * 2 * 2 * (4096 * 4097 // 2) * 32
    assert dense[1].flops == 2 * 2 * 2 * 4096 * 32
    assert window[1].flops == 2 * 2 * 2 * 272 * 32
    assert 7 < dense[0].flops / window[0].flops < 8
    assert window[1].bytes_read == (2 * 2 * 16 + 2 * 272 * 32) * 4
    assert len({call.key for call in dense + window}) == 4
    # A window that hides nothing is the dense call.
    assert attention_call(INFO, prefill, 4096, 16) == dense[0]


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0, "has_sinks": True, "has_bias": True}])
def test_prices_can_be_measured(changes: dict[str, Any]) -> None:
    match = Match(site(**changes))
    for candidate in [*SMALL.candidates(match, PROMPT), *Exact().candidates(match, PROMPT)]:
        rewrite = SMALL if candidate.rewrite == SMALL.name else Exact()
        for scenario in PROMPT:
            (call,) = rewrite.lower(match, candidate, scenario)
            assert call.run is not None
            out = call.run("cpu")()
            assert out.shape == (1, scenario.queries, 6, 16)
            assert out.isfinite().all()
