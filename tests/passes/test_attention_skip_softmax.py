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
from fxopt.kernels.attention.skip import KEY_TILE, QUERY_TILE
from fxopt.passes.attention import calls
from fxopt.passes.attention.calls import attention_call
from fxopt.passes.attention.skip_softmax import SkipSoftmax
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
    assert "without 50% of its tiles" in said
    assert "makes 75% of its products" in said
    assert said.endswith("1.5 times the library's time: 1.12 of the dense time")
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
    assert price(prefill).flops == 0.75 * dense.flops
    assert price(prefill, density=0.8).flops == pytest.approx(0.9 * dense.flops)
    assert len({price(prefill, density=d).key for d in (0.5, 0.8)} | {dense.key}) == 3
    assert price(decode) == attention_call(INFO, decode)
    run = price(Scenario("prefill", 1, 400, 0)).run
    assert run is not None
    assert run("cpu")().shape == (1, 400, 6, 16)


@pytest.mark.parametrize("left", [20, 50, 90])
def test_what_is_timed_leaves_out_what_is_expected(left: int) -> None:
    inputs = recorded()
    inputs["q"], inputs["k"] = torch.randn(2, 6, LENGTH, 16), torch.randn(2, 3, LENGTH, 16)
    calls._plant(inputs["q"], inputs["k"], left)  # pyright: ignore[reportPrivateUsage]
    v = torch.eye(LENGTH).expand(2, 3, -1, -1)
    limit = calls.PLANTED_LIMIT
    out = ops.attend(inputs["q"], inputs["k"], v, scale=0.25, causal=True, skip=[limit])
    # Diagonal and first tiles are computed beside, more of a short call than of a long one.
    assert left / 100 - 0.05 < by_tile(out) < left / 100 + 0.2


def by_tile(weights: Tensor) -> float:
    """The part of the key tiles before the queries that has weights [B, N, H, T]."""
    batch, queries, heads, keys = weights.shape
    wide, high = -(-keys // KEY_TILE), -(-queries // QUERY_TILE)
    more = (0, wide * KEY_TILE - keys, 0, 0, 0, high * QUERY_TILE - queries)
    tiles = F.pad(weights, more).view(batch, high, QUERY_TILE, heads, wide, KEY_TILE)
    ends = (torch.arange(1, high + 1) * QUERY_TILE).clamp(max=queries)
    visited = -(-ends // KEY_TILE)
    return (tiles > 0).any(-1).any(2).sum().item() / (batch * heads * visited.sum().item())


@pytest.mark.parametrize("inputs", [{}, {"prompt": 1300}, {"padding": 200}])
def test_limits_leave_out_the_share(inputs: dict[str, int]) -> None:
    """At most the share, in each query head; and what is said of it is what the op does."""
    given = recorded(**inputs) | {"v": torch.eye(LENGTH).expand(2, 3, -1, -1)}
    wide = {n: x.double() if n in "qkv" else x for n, x in given.items()}
    last = inputs.get("prompt", LENGTH)
    for share in (0.3, 0.5):
        candidate = Candidate(REWRITE.name, "", {"skipped": int(1000 * share)})
        tensors = prepared(wide, candidate)
        density = REWRITE.density(matched(), candidate, wide)
        out = REWRITE.emulate(matched(), candidate, tensors, wide)
        for head in range(3):
            found = by_tile(out[:, :last, 2 * head : 2 * head + 2, :last])
            if "padding" not in inputs:  # whose tiles count as visited
                assert found == pytest.approx(density[head].item())
        assert (density >= 1 - share).all()
        assert (density < 1 - share + 0.1).all()


@pytest.mark.parametrize("inputs", [{}, {"prompt": 1300, "padding": 200}, {"prompt": 200}])
def test_kept_mass_is_that_of_the_keys_which_emulation_weighs(inputs: dict[str, int]) -> None:
    given = recorded(**inputs) | {"v": torch.eye(LENGTH).expand(2, 3, -1, -1)}
    wide = {n: x.double() if n in "qkv" else x for n, x in given.items()}
    rows = torch.tensor([240, 500, 1151, 1299, 1300, 1499])
    found = REWRITE.kept_mass(matched(), HALF, wide, rows)
    weights = ops.attend(**{n: x for n, x in wide.items() if n != "prompt"})[:, rows]
    masked = REWRITE.emulate(matched(), HALF, prepared(wide), wide)[:, rows]
    kept = (weights * (masked > 0)).sum(-1).transpose(1, 2)
    torch.testing.assert_close(found, kept.masked_fill(kept == 0, 1.0), rtol=1e-6, atol=1e-9)
    assert (found.min() < 0.999) == (inputs != {"prompt": 200})


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
