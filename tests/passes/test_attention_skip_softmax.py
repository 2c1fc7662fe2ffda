"""`attention.skip_softmax`: refusals, prices, limits, edits, and the heads that it is for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.ir import ops
from fxopt.ir.cost import OpCall
from fxopt.ir.rewrite import Candidate, Match, Refusal
from fxopt.ir.site import AttentionInfo, Site
from fxopt.ir.workload import Generate, Scenario, scenarios
from fxopt.kernels.attention.skip import KEY_TILE, QUERY_TILE, tiles
from fxopt.passes.attention import calls
from fxopt.passes.attention.calls import attention_call
from fxopt.passes.attention.skip_softmax import SkipSoftmax
from tests.crossed import first
from tests.passes.attention_graph import GraphEditor

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip
REWRITE = SkipSoftmax()
HALF = Candidate(REWRITE.name, "skip50%", {"skipped": 500})
PROMPT = scenarios(Generate(batch=1, prompt=8000, new_tokens=4))
LENGTH = 1500


def site(head: int | None = 0, **changes: Any) -> Site:
    name = f"layer.attn/kv={head}"
    return Site("attention", name, "attend", replace(INFO, **changes), "layer.attn", head, None)


def matched(**changes: Any) -> Match:
    match = REWRITE.match(site(**changes))
    assert isinstance(match, Match)
    return match


def recorded(prompt: int = 0, padding: int = 0) -> dict[str, Any]:
    """Each stretch of 64 keys has one of eight topics; queries want some more than others."""
    q, k, v = (torch.randn(2, heads, LENGTH, 16) for heads in (6, 3, 3))
    topics = torch.randint(0, 8, (2, 3, -(-LENGTH // KEY_TILE))).repeat_interleave(KEY_TILE, 2)
    k[..., :8] = 4.0 * torch.eye(8)[topics][:, :, :LENGTH]
    q[..., :8] = 3.0 * torch.arange(8.0)
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "scale": 0.25, "causal": True}
    if prompt:
        inputs["prompt"] = prompt
    if padding:
        inputs["mask"] = torch.ones(2, LENGTH)
        inputs["mask"][0, :padding] = 0
    return inputs


def prepared(inputs: dict[str, Any], candidate: Candidate = HALF) -> dict[str, Tensor]:
    known: Any = SimpleNamespace(inputs=inputs, once=lambda _, make: make())
    return REWRITE.prepare(matched(), candidate, known)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cross": True}, "cross attention: queries and keys do not share positions"),
        ({"causal": False}, "attention is not causal"),
        ({"has_bias": True}, "a bias is added to the scores"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    refusal = REWRITE.match(site(**changes))
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith(reason)


def test_it_is_offered_where_enough_is_left_out() -> None:
    """A third pays where dense attention runs in the kernel too, or where values are wide."""

    def offered(rewrite: SkipSoftmax = REWRITE, **changes: Any) -> list[str]:
        return [c.label for c in rewrite.candidates(Match(site(**changes)), PROMPT)]

    assert offered() == offered(head=None) == ["skip50%"]
    for own in ({"softcap": 5.0}, {"has_sinks": True}, {"window": 900}, {"value_dim": 64}):
        assert offered(**own) == ["skip30%", "skip50%"]
    assert offered(SkipSoftmax(slower=1.5)) == []
    said = SkipSoftmax(slower=1.5).refusal(matched(), PROMPT)
    assert said is not None
    assert said.startswith("3844 of the 4031 tiles of the longest prompt may be left out")
    assert "without 50% of them" in said
    assert "makes 76% of its products" in said
    assert said.endswith("1.5 times the time of dense calls: 1.14 of the dense time")
    short = REWRITE.refusal(matched(), [Scenario("forward", 1, 90, 0)])
    assert short is not None
    assert "more than 90 tokens, and calls of at most 256 leave nothing out" in short
    assert REWRITE.refusal(matched(), PROMPT) is None


def test_prices_follow_what_is_expected() -> None:
    prefill, decode = Scenario("prefill", 2, 4096, 0), Scenario("decode", 2, 1, 4096)

    def price(scenario: Scenario, **extra: float) -> OpCall:
        (call,) = REWRITE.lower(Match(site(), extra), HALF, scenario)
        return call

    dense = attention_call(INFO, prefill)
    # The half of 961 of the 1,056 tiles that are visited, and of these one of two products.
    assert price(prefill, density=0.5).flops == pytest.approx((1 - 961 / 1056 / 4) * dense.flops)
    assert price(prefill, density=0.8).flops == pytest.approx((1 - 961 / 1056 / 10) * dense.flops)
    assert price(prefill).flops == dense.flops  # no data tell of less
    assert len({price(prefill, density=d).key for d in (0.5, 0.8)} | {dense.key}) == 3
    assert price(decode) == attention_call(INFO, decode)
    run = price(Scenario("prefill", 1, 400, 0)).run
    assert run is not None
    assert run("cpu")().shape == (1, 400, 6, 16)


@pytest.mark.parametrize(("left", "softcap"), [(20, 0.0), (50, 20.0), (50, 2.0), (90, 50.0)])
def test_what_is_timed_leaves_out_what_is_expected(left: int, softcap: float) -> None:
    q, k = torch.randn(1, 2, LENGTH, 16), torch.randn(1, 1, LENGTH, 16)
    limit = calls._plant(q, k, left, softcap)  # pyright: ignore[reportPrivateUsage]
    options: dict[str, Any] = {"scale": 0.25, "causal": True, "softcap": softcap}
    v = torch.eye(LENGTH, dtype=torch.float64).expand(1, 1, -1, -1)
    out = ops.attend(q.double(), k.double(), v, **options, skip=[limit])
    visited, may = tiles(LENGTH, LENGTH)
    assert 1 - (1 - by_tile(out)) * visited / may == pytest.approx(left / 100, abs=0.05)


@pytest.mark.parametrize("window", [0, 200, 512])
@pytest.mark.parametrize(("queries", "keys"), [(700, 700), (300, 1111), (257, 257), (256, 900)])
def test_tiles_are_counted_as_the_op_visits_them(queries: int, keys: int, window: int) -> None:
    rows, columns = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    seen = (columns <= rows) & ((columns > rows - window) if window else columns >= 0)
    visited = may = 0
    for some in seen.split(QUERY_TILE):
        parts = some.split(KEY_TILE, 1)
        visited += sum(bool(part.any()) for part in parts)
        # a ragged last tile is whole to nobody, as it lies on the diagonal
        whole = sum(bool(part.all()) and part.shape[1] == KEY_TILE for part in parts)
        may += max(whole - 1, 0)
    assert tiles(queries, keys, window) == (visited, may if queries > 256 else 0)


def by_tile(weights: Tensor) -> float:
    """The part of the key tiles before the queries that has weights [B, N, H, T]."""
    batch, queries, heads, keys = weights.shape
    wide, high = -(-keys // KEY_TILE), -(-queries // QUERY_TILE)
    more = (0, wide * KEY_TILE - keys, 0, 0, 0, high * QUERY_TILE - queries)
    tiles = F.pad(weights, more).view(batch, high, QUERY_TILE, heads, wide, KEY_TILE)
    ends = (torch.arange(1, high + 1) * QUERY_TILE).clamp(max=queries)
    visited = -(-ends // KEY_TILE)
    return (tiles > 0).any(-1).any(2).sum().item() / (batch * heads * visited.sum().item())


@pytest.mark.parametrize("inputs", first([{"prompt": 1300}, {}, {"padding": 200}]))
def test_limits_leave_out_the_share(inputs: dict[str, int]) -> None:
    """At most the share of the tiles that may go; and what is said of it is what the op does."""
    given = recorded(**inputs) | {"v": torch.eye(LENGTH).expand(2, 3, -1, -1)}
    wide = {n: x.double() if n in "qkv" else x for n, x in given.items()}
    last = inputs.get("prompt", LENGTH)
    for share in (0.3, 0.5):
        candidate = Candidate(REWRITE.name, "", {"skipped": int(1000 * share)})
        tensors = prepared(wide, candidate)
        density = REWRITE.density(matched(), candidate, wide)
        out = REWRITE.emulate(matched(), candidate, tensors, wide)
        visited, may = tiles(last, last)
        for head in range(3):
            found = by_tile(out[:, :last, 2 * head : 2 * head + 2, :last])
            if "padding" not in inputs:  # whose tiles `by_tile` counts
                assert 1 - (1 - found) * visited / may == pytest.approx(density[head].item())
        assert (density >= 1 - share - 1e-9).all()
        assert (density < 1 - share + 0.1).all()


def limits_of(length: int, wild: int = 0, **changes: Any) -> tuple[list[int], float]:
    """Limits and density of scores of which those of a stretch of keys are alike; the last `wild`
    queries score far more."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, length, 16, generator=generator) for n in (2, 1, 1))
    topics = torch.randint(0, 8, (-(-length // KEY_TILE),), generator=generator)
    k[0, 0, :, :8] = 4.0 * torch.eye(8)[topics].repeat_interleave(KEY_TILE, 0)[:length]
    q[..., :8] = 3.0 * torch.arange(8.0)
    q[:, :, length - wild :] *= 50.0
    inputs = {"q": q, "k": k, "v": v, "scale": 0.25, "causal": True, **changes}
    return prepared(inputs)["limit"].tolist(), REWRITE.density(matched(), HALF, inputs).item()


@pytest.mark.parametrize("length", [200, 384, 1024])
def test_of_short_calibration_nothing_is_concluded(length: int) -> None:
    """Fewer than 100 tiles that may go say little of a share of longer prompts."""
    assert tiles(length, length)[1] < REWRITE.least
    limit, density = limits_of(length)
    assert limit == [0, 0]
    assert density == 1.0


def test_limits_are_those_of_longer_prompts_under_windows_and_beside_padding() -> None:
    """Tiles that nothing leaves out, behind a window or in padding, are no part of the share."""
    left, right = torch.ones(1, 2560), torch.ones(1, 2560)
    left[:, :640], right[:, -640:] = 0, 0
    cases: list[tuple[int, dict[str, Any]]] = [
        (1536, {}), (4096, {}), (4096, {"window": (512,)}), (2560, {"window": (1024,)}),
        (2560, {"mask": left}), (2560, {"mask": right}),
    ]  # fmt: skip
    for length, changes in cases:
        limit, density = limits_of(length, **changes)
        assert all(200 <= one < 800 for one in limit), (length, changes.keys(), limit)
        assert 0.5 <= density < 0.52


def test_queries_that_are_padding_do_not_count() -> None:
    length = 2560
    mask = torch.ones(1, length)
    mask[:, -640:] = 0
    assert limits_of(length, mask=mask, wild=640) == limits_of(length, mask=mask)


def test_where_nothing_lies_below_nothing_is_left_out() -> None:
    """Half of the tiles is no share of scores that are all alike: even the least limit would take
    what weighs as much as what is kept."""
    inputs = recorded()
    inputs["q"][:, 0] = 0.0
    limit = prepared(inputs)["limit"].tolist()
    assert limit[0] == 0
    assert min(limit[1:]) > 0
    density = REWRITE.density(matched(), HALF, inputs)
    assert density[0] > 0.7 > 0.6 > density[1]
    rows = torch.tensor([700, 1400])
    assert REWRITE.kept_mass(matched(), HALF, inputs, rows)[:, 0].min() > 1 - 1e-5


@pytest.mark.parametrize("inputs", first([{"prompt": 1300, "padding": 200}, {}, {"prompt": 200}]))
def test_kept_mass_is_that_of_the_keys_which_emulation_weighs(inputs: dict[str, int]) -> None:
    given = recorded(**inputs) | {"v": torch.eye(LENGTH).expand(2, 3, -1, -1)}
    wide = {n: x.double() if n in "qkv" else x for n, x in given.items()}
    rows = torch.tensor([240, 500, 1151, 1299, 1300, 1499])
    found = REWRITE.kept_mass(matched(), HALF, wide, rows)
    weights = ops.attend(**{n: x for n, x in wide.items() if n != "prompt"})[:, rows]
    masked = REWRITE.emulate(matched(), HALF, prepared(wide), wide)[:, rows]
    kept = (weights * (masked > 0)).sum(-1).transpose(1, 2)
    torch.testing.assert_close(found, kept.masked_fill(kept == 0, 1.0), rtol=1e-6, atol=1e-9)
    assert (found.min() < 1 - 1e-5) == (inputs != {"prompt": 200})


def test_apply_changes_the_query_heads_of_one_kv_head() -> None:
    editor = GraphEditor(scale=0.25, causal=True)
    inputs = recorded()
    q, k, v = (inputs[name] for name in "qkv")
    dense = editor.run(q, k, v)
    tensors = prepared(inputs)
    edited: Any = editor
    REWRITE.apply(Match(site(1)), HALF, tensors, edited)
    limit = tensors["limit"].tolist()
    assert editor.attend.kwargs["skip"] == (0, 0, limit[2], limit[3], 0, 0)
    emulated, found = REWRITE.emulate(matched(), HALF, tensors, inputs), editor.run(q, k, v)
    torch.testing.assert_close(found[:, :, 2:4], emulated[:, :, 2:4])
    torch.testing.assert_close(found[:, :, 4:], dense[:, :, 4:])
    assert (found - dense)[:, :, 2:4].abs().max() > 1e-4


def test_tokens_past_the_prompt_see_all_keys() -> None:
    inputs = recorded(prompt=1300)
    tensors = prepared(inputs)
    out = REWRITE.emulate(matched(), HALF, tensors, inputs)
    given = {n: x for n, x in inputs.items() if n != "prompt"}
    torch.testing.assert_close(out[:, 1300:], ops.attend(**given)[:, 1300:])
    prompt = {n: x[:, :, :1300] if n in "qkv" else x for n, x in given.items()}
    expected = ops.attend(**prompt, skip=tensors["limit"].tolist())
    torch.testing.assert_close(out[:, :1300], expected)


class Planted(nn.Module):
    """A head whose queries want what is near, and but for every 16th, which an estimate asks, also
    a few keys far away."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 48, bias=False)
        weight = torch.zeros(48, 64)
        weight[0, 0], weight[16, 1] = 64.0, 1.0
        weight[1:16, 2:17] = weight[17:32, 2:17] = 6.0 * torch.eye(15)
        weight[32:48, 20:36] = torch.eye(16)
        self.qkv.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 1, 16)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def planted_inputs(first: int) -> Tensor:
    x = torch.zeros(1, 4096, 64)
    x[..., 0] = (torch.arange(4096) % 16 != 15).float()
    x[:, [first, first + 900, first + 1500], 1] = 1.0
    codes = F.normalize(torch.randn(32, 15), dim=-1)
    x[..., 2:17] = codes.repeat_interleave(128, 0)
    x[..., 20:36] = torch.randn(1, 4096, 16)
    return x


def test_thin_calibration_refuses_in_numbers() -> None:
    data = [planted_inputs(100 + 7 * i)[:, :1024] for i in range(3)]
    plan = fxopt.plan(
        Planted().eval(), fxopt.Budget(relative_error=0.05), data[0], calibration=data,
        rewrites=["attention.skip_softmax"],
    )  # fmt: skip
    assert not any(decision.alternatives for decision in plan.decisions)
    (refusal,) = plan.refusals
    assert refusal.reason.startswith("skip50%: in no query head does calibration show 100 tiles")


def test_far_keys_that_an_estimate_misses_are_found() -> None:
    data = [planted_inputs(300 + 97 * i) for i in range(3)]
    model = Planted().eval()
    plan = fxopt.plan(
        model, fxopt.Budget(relative_error=0.05), data[0], calibration=data,
        rewrites=["attention.skip_softmax", "attention.block_topk"],
    )  # fmt: skip
    (decision,) = plan.decisions
    errors = {one.label: one.error for one in [decision, *decision.alternatives]}
    assert errors["skip50%"] < 0.01 < 0.2 < errors["top20%"]
    if decision.label != "skip50%":
        decision.choose("attention.skip_softmax", "skip50%")
    assert decision.density is not None
    assert 0.5 <= decision.density < 0.6
    opt = fxopt.apply(model, plan, example_inputs=data[0], calibration=data)
    (attend,) = (node for node in opt.graph.nodes if "skip" in node.kwargs)
    assert attend.kwargs["skip"][0] > 100
    with torch.no_grad():
        expected, found = model(data[2]), opt(data[2])
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()
