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
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.passes.attention.calls import attention_call, dilated_call, visible_pairs
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


ENCODER = {"causal": False, "cached": False}


@pytest.mark.parametrize(
    ("length", "changes", "labels"),
    [
        (1024, {}, ["w256"]),
        (1026, {}, ["w256", "w512", "w256/2"]),
        (8192, {}, ["w256", "w512", "w1024", "w2048", "w256/2", "w256/4"]),
        (8192, {"window": 4096}, ["w256", "w512", "w1024"]),
        (4096, {"grid": (0, 64, 64)}, ["w256", "w512", "w1024"]),
        (4096, {"cached": True}, ["w256", "w512", "w1024"]),
    ],
)
def test_encoders_get_dilated_windows(
    length: int, changes: dict[str, Any], labels: list[str]
) -> None:
    """Where more than twice the window is of one rest, and no grid or window of the model's own
    says better where to look."""
    match = matched(Window(), site(**ENCODER | changes))
    offered = Window().candidates(match, [Scenario("forward", 1, length, 0)])
    assert [c.label for c in offered] == labels


def test_apply_dilates_one_head_alone() -> None:
    editor, rewrite = GraphEditor(scale=0.25), Window(windows=(8,))
    q, k, v = (torch.randn(1, heads, 61, 16) for heads in (6, 3, 3))
    inputs = {"q": q, "k": k, "v": v, "scale": 0.25}
    match = matched(rewrite, site(**ENCODER))
    offered = rewrite.candidates(match, [Scenario("forward", 1, 61, 0)])
    chosen = {c.label: c for c in offered}
    distance = (torch.arange(61)[:, None] - torch.arange(61)).abs()
    masks = {"w8": distance < 8, "w8/2": (distance % 2 == 0) & (distance < 16)}
    for head, label in ((1, "w8/2"), (2, "w8")):
        place = matched(rewrite, site(head, **ENCODER))
        rewrite.apply(place, chosen[label], {}, editor)  # pyright: ignore[reportArgumentType]
    assert editor.attend.kwargs["window"] == (0, 8, 8)
    assert editor.attend.kwargs["dilation"] == (1, 2, 1)
    out = editor.run(q, k, v)
    for head, label in ((1, "w8/2"), (2, "w8")):
        mine = slice(2 * head, 2 * head + 2)
        emulated = rewrite.emulate(match, chosen[label], {}, inputs)
        torch.testing.assert_close(out[:, :, mine], emulated[:, :, mine])
        scores = (q[:, mine] @ k[:, head, None].mT * 0.25).double()
        weights = scores.masked_fill(~masks[label], -torch.inf).softmax(-1)
        expected = weights @ v[:, head, None].double()
        torch.testing.assert_close(out[:, :, mine], expected.float().transpose(1, 2))


@pytest.mark.parametrize("length", [61, 8])
def test_a_dilated_window_keeps_the_keys_that_its_emulation_weighs(length: int) -> None:
    rewrite, rows = Window(windows=(8,)), torch.tensor([0, 5, 7])
    shape = (2, 6, length, 16)
    q, k = torch.randn(shape).double(), torch.randn(shape).double()[:, :3]
    mask = torch.ones(2, length)
    mask[1, 4] = 0
    v = torch.eye(length).double().expand(2, 3, -1, -1)
    inputs = {"q": q, "k": k, "v": v, "mask": mask, "scale": 0.25}
    candidate = Candidate(rewrite.name, "w8/2", {"window": 8, "sink": 0, "dilation": 2})
    match = matched(rewrite, site(**ENCODER))
    assert rewrite.is_mask(candidate)
    found = rewrite.kept_mass(match, candidate, inputs, rows)
    weights = ops.attend(**inputs)[:, rows].transpose(1, 2)
    masked = rewrite.emulate(match, candidate, {}, inputs)[:, rows].transpose(1, 2)
    torch.testing.assert_close(found, (weights * (masked > 0)).sum(-1))
    assert (found.max() < 0.95) == (length > 8)


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


def test_prices_follow_the_dilated_window() -> None:
    info, scenario = replace(INFO, causal=False), Scenario("forward", 2, 4096, 0)
    dense, plain = (attention_call(info, scenario, window) for window in (0, 256))
    some, more = (dilated_call(info, scenario, 256, dilation) for dilation in (2, 16))
    # As many keys as the plain window has, at most those of one rest.
    assert some.flops == plain.flops == dense.flops * 511 / 4096
    assert more.flops == dense.flops * 256 / 4096
    moved, before = (call.bytes_read + call.bytes_written for call in (some, dense))
    assert moved == 3 * before
    assert some.temporary_bytes == before
    assert len({call.key for call in (dense, plain, some, more)}) == 4
    assert len({call.family for call in (dense, plain, some, more)}) == 4
    # A window that hides nothing is the dense call.
    assert dilated_call(info, Scenario("forward", 2, 256, 0), 256, 2) == attention_call(
        info, Scenario("forward", 2, 256, 0)
    )


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0, "has_sinks": True}])
def test_prices_of_dilated_windows_can_be_measured(changes: dict[str, Any]) -> None:
    rewrite = Window(windows=(8,))
    match = matched(rewrite, site(**ENCODER | changes))
    scenario = Scenario("forward", 1, 75, 0)
    *_, candidate = rewrite.candidates(match, [scenario])
    assert candidate.label == "w8/4"
    (call,) = rewrite.lower(match, candidate, scenario)
    assert call.run is not None
    out = call.run("cpu")()
    assert out.shape == (1, 75, 6, 16)
    assert out.isfinite().all()


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
