"""`attention.neighborhood`: refusals, prices, edits, and the heads that it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.ir.rewrite import Match, Refusal
from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Scenario
from fxopt.kernels.attention.grid import density
from fxopt.passes.attention.calls import attention_call, neighborhood_call
from fxopt.passes.attention.neighborhood import Neighborhood
from fxopt.passes.attention.window import Window
from tests.passes.attention_graph import GraphEditor

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=False,
    window=0, softcap=0.0, has_mask=False, has_bias=False, has_sinks=False, cross=False,
    cached=False, grid=(1, 37, 38),
)  # fmt: skip
TOKENS = 1 + 37 * 38
REWRITE = Neighborhood()


def site(head: int | None = 0, **changes: Any) -> Site:
    name = f"layer.attn/kv={head}"
    return Site("attention", name, "attend", replace(INFO, **changes), "layer.attn", head)


def matched(**changes: Any) -> Match:
    match = REWRITE.match(site(**changes))
    assert isinstance(match, Match)
    return match


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cross": True}, "cross attention: queries and keys do not share positions"),
        ({"causal": True}, "attention is causal"),
        ({"grid": (), "no_grid": "it was flipped"}, "no grid of tokens: it was flipped"),
        ({"has_bias": True}, "a bias is added to the scores"),
        ({"has_mask": True}, "a mask hides keys"),
        ({"window": 8}, "the model itself attends only within 8 tokens"),
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


@pytest.mark.parametrize(
    ("grid", "labels"),
    [
        ((1, 28, 28), ["7x7"]),
        ((1, 37, 37), ["7x7", "15x15", "15x15/2"]),
        ((0, 64, 64), ["15x15", "31x31", "15x15/2", "15x15/4"]),
        ((1, 128, 128), ["15x15", "31x31", "63x63", "15x15/2", "15x15/4"]),
        (
            (5, 8, 48, 48),
            ["7x7x7", "8x15x15", "8x31x31", "4x7x7/2", "7x7x7/1x2x2", "2x7x7/4", "7x7x7/1x4x4"],
        ),
        # Time is left alone however long it is, and along an axis of one place there is nothing.
        (
            (0, 16, 48, 48),
            ["7x7x7", "15x15x15", "16x31x31", "7x7x7/2", "7x7x7/1x2x2", "4x7x7/4", "7x7x7/1x4x4"],
        ),
        (
            (0, 3, 64, 64),
            ["3x7x7", "3x15x15", "3x31x31", "2x7x7/2", "3x7x7/1x2x2", "1x7x7/4", "3x7x7/1x4x4"],
        ),
        ((0, 1, 64, 64), ["1x7x7", "1x15x15", "1x31x31", "1x7x7/2", "1x7x7/4"]),
        # A spectrogram is long along one axis alone, as are some videos in time.
        ((2, 12, 101), ["12x15", "12x31", "6x15/2", "12x15/1x2", "3x15/4", "12x15/1x4"]),
        (
            (0, 64, 6, 6),
            ["7x6x6", "15x6x6", "31x6x6", "7x3x3/2", "7x6x6/2x1x1", "7x2x2/4", "7x6x6/4x1x1"],
        ),
    ],
)
def test_windows_fit_the_grid(grid: tuple[int, ...], labels: list[str]) -> None:
    assert [c.label for c in REWRITE.candidates(matched(grid=grid), [])] == labels
    assert REWRITE.refusal(matched(grid=grid), []) is None


def test_a_grid_of_dilated_windows_alone_is_not_refused() -> None:
    rewrite = Neighborhood(reaches=(32,))
    assert [c.label for c in rewrite.candidates(matched(), [])] == ["15x15/2"]
    assert rewrite.refusal(matched(), []) is None


def test_small_grids_are_refused_in_numbers() -> None:
    match = matched(grid=(1, 14, 14))
    assert REWRITE.candidates(match, []) == []
    said = REWRITE.refusal(match, [])
    assert said is not None
    assert said.startswith("the grid has 14 x 14 tokens: with the tiles around windows of 7x7, ")
    assert said.endswith("100% of the attention would still be computed, and it pays below 60%")


def test_a_grid_says_how_many_tokens_a_call_has() -> None:
    """What the workload calls a length may be the channels of an image."""
    seen = site().at(Scenario("forward", 2, 3, 0))
    assert seen == Scenario("forward", 2, TOKENS, 0)


def test_prices_follow_the_tiles() -> None:
    scenario = Scenario("forward", 2, TOKENS, 0)
    dense = attention_call(INFO, scenario)
    some, more = (neighborhood_call(INFO, scenario, near) for near in (4, 8))
    assert some.flops == dense.flops * density(INFO.grid, 4)
    assert some.flops < more.flops < 0.6 * dense.flops
    dilated = neighborhood_call(INFO, scenario, 8, 2)
    assert dilated.flops == dense.flops * density(INFO.grid, 8, 2)
    uneven = neighborhood_call(INFO, scenario, 8, (1, 2))
    assert uneven.flops == dense.flops * density(INFO.grid, 8, (1, 2))
    assert len({dense.key, some.key, more.key, dilated.key, uneven.key}) == 5
    assert len({dense.family, some.family, more.family, dilated.family, uneven.family}) == 5
    # Queries, keys and values are written once more in their order, and the result read.
    extra = 2 * TOKENS * (2 * 2 + 2) * 16 * 4
    moved, before = (call.bytes_read + call.bytes_written for call in (some, dense))
    assert moved == before + 2 * extra
    assert some.temporary_bytes == extra


@pytest.mark.parametrize("changes", [{}, {"softcap": 5.0, "has_sinks": True}])
def test_prices_can_be_measured(changes: dict[str, Any]) -> None:
    match = matched(**changes)
    for candidate in REWRITE.candidates(match, []):
        (call,) = REWRITE.lower(match, candidate, Scenario("forward", 1, TOKENS, 0))
        assert call.run is not None
        out = call.run("cpu")()
        assert out.shape == (1, TOKENS, 6, 16)
        assert out.isfinite().all()


def test_apply_changes_one_head_beside_windows() -> None:
    editor = GraphEditor(scale=0.25)
    q, k, v = (torch.randn(1, heads, TOKENS, 16) for heads in (6, 3, 3))
    dense = editor.run(q, k, v)
    inputs = {"q": q, "k": k, "v": v, "scale": 0.25}
    scenarios = [Scenario("forward", 1, TOKENS, 0)]
    for rewrite, head in ((REWRITE, 1), (Window(windows=(64,)), 2)):
        match = Match(site(head))
        candidate = rewrite.candidates(match, scenarios)[0]
        rewrite.apply(match, candidate, {}, editor)  # pyright: ignore[reportArgumentType]
        emulated = rewrite.emulate(match, candidate, {}, inputs)
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(editor.run(q, k, v)[:, :, mine], emulated[:, :, mine])
        assert (emulated - dense)[:, :, mine].abs().max() > 1e-3
    assert editor.attend.kwargs["grid"] == INFO.grid
    assert editor.attend.kwargs["near"] == (0, 4, 0)
    assert editor.attend.kwargs["window"] == (0, 0, 64)
    torch.testing.assert_close(editor.run(q, k, v)[:, :, :2], dense[:, :, :2])


def test_apply_dilates_one_head_alone() -> None:
    editor = GraphEditor(scale=0.25)
    q, k, v = (torch.randn(1, heads, TOKENS, 16) for heads in (6, 3, 3))
    inputs = {"q": q, "k": k, "v": v, "scale": 0.25}
    plain, *_, dilated = REWRITE.candidates(matched(), [])
    for head, candidate in ((1, dilated), (2, plain)):
        match = Match(site(head))
        REWRITE.apply(match, candidate, {}, editor)  # pyright: ignore[reportArgumentType]
    assert editor.attend.kwargs["near"] == (0, 8, 4)
    assert editor.attend.kwargs["dilation"] == (1, 2, 1)
    out = editor.run(q, k, v)
    for head, candidate in ((1, dilated), (2, plain)):
        emulated = REWRITE.emulate(matched(), candidate, {}, inputs)
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(out[:, :, mine], emulated[:, :, mine])


def test_apply_dilates_along_some_axes_beside_other_heads() -> None:
    """In either order; the op gets a number for each head and axis."""
    grid = (0, 6, 22, 21)
    q, k, v = (torch.randn(1, heads, 6 * 22 * 21, 16) for heads in (6, 3, 3))
    inputs = {"q": q, "k": k, "v": v, "scale": 0.25}
    offered = {c.label: c for c in REWRITE.candidates(matched(grid=grid), [])}
    chosen = [offered["6x7x7/1x2x2"], offered["3x7x7/2"], offered["6x7x7"]]
    assert chosen[0].parameters == {"near": 4, "dilation": "1x2x2"}
    for heads in ([0, 1, 2], [2, 1, 0]):
        editor = GraphEditor(scale=0.25)
        for head in heads:
            match = Match(site(head, grid=grid))
            REWRITE.apply(match, chosen[head], {}, editor)  # pyright: ignore[reportArgumentType]
        assert editor.attend.kwargs["near"] == (4, 4, 4)
        assert editor.attend.kwargs["dilation"] == (1, 2, 2, 2, 2, 2, 1, 1, 1)
    out = editor.run(q, k, v)
    for head, candidate in enumerate(chosen):
        emulated = REWRITE.emulate(matched(grid=grid), candidate, {}, inputs)
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(out[:, :, mine], emulated[:, :, mine])
    a, b = out[:, :, :2], REWRITE.emulate(matched(grid=grid), chosen[1], {}, inputs)[:, :, :2]
    assert (a - b).abs().max() > 1e-3


EDGE, SPREAD = 64, 2.0


class Planted(nn.Module):
    """Two heads of 16 channels over a grid and a class token: the first looks at places nearby in
    both directions, or along axes of a dilation of 2 at every other one, the second everywhere
    alike, at values that differ from place to place."""

    def __init__(
        self, dilation: tuple[int, int] = (1, 1), sizes: tuple[int, int] = (EDGE, EDGE),
        spread: float = SPREAD,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch = nn.Conv2d(32, 32, 1)
        self.patch.weight.data = torch.eye(32).view(32, 32, 1, 1)
        self.patch.bias.data.zero_()
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        lines = [torch.arange(size) - size // 2 for size in sizes]
        places, spacing = torch.cartesian_prod(*lines).float(), torch.tensor(dilation)
        # Scores fall with the square of the distance, and are the same at all queries but for that.
        wanted = torch.cat([places, torch.ones_like(places)], 1)
        width = 2 * (spread * spacing) ** 2
        given = torch.cat([2 * places / width, -(places**2) / width], 1)
        other = 8.0 * (spacing - 1) * (-1.0) ** places  # 8 at places of the same parity, else -8
        wanted, given = torch.cat([wanted, (-1.0) ** places], 1), torch.cat([given, other], 1)
        self.q, self.k = (nn.Parameter(F.pad(x, (0, 10, 1, 0))) for x in (wanted, given))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        v = x.view(*x.shape[:2], 2, 16).transpose(1, 2)
        one = torch.tensor([1.0, 0.0]).view(2, 1, 1)
        q, k = (0 * v + one * place for place in (self.q, self.k))
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return y.transpose(1, 2).flatten(2)


def image() -> Tensor:
    """The mean of all places is small, that of a region is not."""
    regions = torch.randn(1, 32, EDGE // 8, EDGE // 8)
    return F.interpolate(regions, scale_factor=8) + 0.1 * torch.randn(1, 32, EDGE, EDGE)


@pytest.mark.slow
def test_the_local_head_gets_it_and_the_global_one_every_fourth_place() -> None:
    """Values of neighbouring places are alike: some of them have the mean of all."""
    data = [image() for _ in range(3)]
    plan = fxopt.plan(
        Planted().eval(), fxopt.Budget(relative_error=0.02), data[0], calibration=data,
        rewrites=["attention"],
    )  # fmt: skip
    first, second = plan.decisions
    assert first.key.endswith("kv=0")
    assert first.label in ("15x15", "31x31")
    assert first.error < 0.02**2
    assert second.label == "15x15/4"
    offered = {other.label: other.error for other in second.alternatives}
    assert offered["31x31"] > 0.02
    # A window along the sequence is a few whole rows: of equal cost, it loses columns above.
    windows = {other.label: other.error for other in first.alternatives}
    assert windows["w256"] > 0.02**2


@pytest.mark.slow
def test_a_head_that_looks_at_every_other_place_gets_a_dilated_window() -> None:
    data = [torch.randn(1, 32, EDGE, EDGE) for _ in range(3)]
    plan = fxopt.plan(
        Planted((2, 2)).eval(), fxopt.Budget(relative_error=0.02), data[0], calibration=data,
        rewrites=["attention"],
    )  # fmt: skip
    first, second = plan.decisions
    assert first.label == "15x15/2"
    assert second.rewrite not in ("attention.neighborhood", "attention.window")
    assert first.error < 0.02**2
    assert first.kept_mass is not None
    assert first.kept_mass.low > 0.99
    offered = {other.label: other.error for other in first.alternatives}
    assert min(offered["15x15"], offered["15x15/4"]) > 0.02**2


@pytest.mark.slow
def test_a_head_that_skips_along_one_axis_gets_a_window_dilated_along_that() -> None:
    """It looks at all of the 12 rows, and of the columns at every other one."""
    data = [torch.randn(1, 32, 12, 251) for _ in range(3)]
    plan = fxopt.plan(
        Planted((1, 2), (12, 251), 2 * SPREAD).eval(), fxopt.Budget(relative_error=0.03), data[0],
        calibration=data, rewrites=["attention.neighborhood"],
    )  # fmt: skip
    first, second = plan.decisions
    assert first.label == "12x15/1x2"
    assert second.rewrite != "attention.neighborhood"
    assert first.error < 0.03**2
    assert first.kept_mass is not None
    assert first.kept_mass.low > 0.99
    offered = {other.label: other.error for other in first.alternatives}
    assert min(offered["12x15"], offered["6x15/2"], offered["12x15/1x4"]) > 0.03**2
