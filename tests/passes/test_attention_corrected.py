"""`+d64`: where it is offered, what it costs, what it fits, and the head that it is for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.decide.statistics import Recorded
from fxopt.ir import ops
from fxopt.ir.rewrite import Candidate, Match
from fxopt.ir.site import AttentionInfo, Site
from fxopt.ir.workload import Forward, Generate, Scenario, scenarios
from fxopt.kernels.attention.delta import EVERY, corrected_rows
from fxopt.passes.attention import corrected
from fxopt.passes.attention.block_topk import BlockTopk
from fxopt.passes.attention.calls import (
    attention_call,
    corrected_call,
    kept_tiles_call,
    visible_pairs,
)
from fxopt.passes.attention.window import Window
from tests.passes.attention_graph import GraphEditor

INFO = AttentionInfo(
    num_heads=6, num_kv_heads=3, head_dim=16, value_dim=16, dtype=torch.float32, causal=True,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=False,
    cached=True,
)  # fmt: skip


def matched(rewrite: Window | BlockTopk, head: int | None = 0, **changes: Any) -> Match:
    where = Site("attention", "a", "attend", replace(INFO, **changes), "a", head)
    match = rewrite.match(where)
    assert isinstance(match, Match)
    return match


def offered(
    rewrite: Window | BlockTopk, workload: Forward | Generate, **changes: Any
) -> list[Candidate]:
    found = rewrite.candidates(matched(rewrite, **changes), scenarios(workload))
    return [candidate for candidate in found if candidate.label.endswith("+d64")]


def test_it_is_offered_where_most_of_a_long_prompt_is_hidden() -> None:
    labels = [c.label for c in offered(Window(), Generate(1, 16_384, 64))]
    assert labels == ["w256+s16+d64", "w512+s16+d64", "w1024+s16+d64", "w2048+s16+d64"]
    labels = [c.label for c in offered(BlockTopk(), Generate(1, 16_384, 64))]
    assert labels == ["top5%+d64", "top10%+d64", "top20%+d64"]
    # Half of the pairs are kept at 4,096 tokens, and more by a window of 1,024.
    assert offered(BlockTopk(), Forward(1, 4096)) == []
    assert [c.label for c in offered(Window(), Forward(1, 4096))] == [
        "w256+s16+d64", "w512+s16+d64",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("workload", "changes"),
    [
        (Generate(1, 200, 8000), {}),  # prompts that see all keys
        (Forward(1, 8000), {"causal": False}),
        (Forward(1, 8000), {"window": 1500}),  # the last rows would see more than the model's do
    ],
)
def test_it_is_not_offered(workload: Forward | Generate, changes: dict[str, Any]) -> None:
    assert Window().candidates(matched(Window(), **changes), scenarios(workload))
    assert offered(Window(), workload, **changes) == []


@pytest.mark.parametrize("past", [0, 700])
def test_the_price_counts_every_pair(past: int) -> None:
    queries = 5000
    scenario = Scenario("prefill", 2, queries, past)
    call = corrected_call(INFO, scenario, 300, 16)
    early = corrected_rows(queries)
    rows = torch.arange(queries)[:, None] + past
    columns = torch.arange(past + queries)
    near = (rows - columns < 300) | (columns < 16)
    seen = (columns <= rows) & (near | (rows >= early + past))
    asked = sum(row + past + 1 for row in range(0, early, EVERY))
    assert call.flops == 2 * 2 * 2 * 32 * (int(seen.sum()) + asked)
    dense = attention_call(INFO, scenario)
    assert dense.key != call.key != attention_call(INFO, scenario, 300, 16).key
    assert call.flops < 0.5 * dense.flops
    kept = kept_tiles_call(INFO, scenario, 100)
    both = corrected_call(INFO, scenario, top=100)
    assert both.flops - kept.flops == 2 * 2 * 2 * 32 * asked
    assert both.bytes_read > kept.bytes_read
    assert visible_pairs(queries, past + queries, True, 0, 0) / asked > 60


def test_decoding_is_dense_and_priced_so() -> None:
    decode = Scenario("decode", 2, 1, 9000)
    assert corrected_call(INFO, decode, 300, 16) == attention_call(INFO, decode)
    for rewrite in (Window(), BlockTopk()):
        candidate = offered(rewrite, Generate(2, 9000, 10))[0]
        (call,) = rewrite.lower(matched(rewrite), candidate, decode)
        assert call == attention_call(INFO, decode)


@pytest.mark.parametrize("rewrite", [Window(), BlockTopk()])
def test_prices_can_be_measured(rewrite: Window | BlockTopk) -> None:
    match = matched(rewrite, has_sinks=True)
    candidate = offered(rewrite, Forward(1, 16_384))[0]
    (call,) = rewrite.lower(match, candidate, Scenario("prefill", 1, 1500, 0))
    assert call.run is not None
    out = call.run("cpu")()
    assert out.shape == (1, 1500, 6, 16)
    assert out.isfinite().all()


def recorded(length: int = 1000, **more: Any) -> dict[str, Any]:
    q, k, v = (torch.randn(2, heads, length, 16) for heads in (6, 3, 3))
    return {"q": 2 * q, "k": k, "v": v, "scale": 0.25, "causal": True} | more


def test_shares_are_the_best_of_the_prompt() -> None:
    """No other share of any head brings the followers of recorded prompts nearer to the exact."""
    inputs = recorded(prompt=900)
    mask = torch.ones(2, 1000, dtype=torch.int64)
    mask[1, :77] = 0
    inputs["mask"] = mask
    # Values that differ from head to head in how fast they change.
    steps = torch.arange(1000)[None, None, :, None] / torch.tensor([5.0, 60, 700])[:, None, None]
    inputs["v"] = inputs["v"] + 4 * steps.sin()
    options = {"window": [100], "sink_tokens": [4]}
    share = corrected.shares(Recorded(inputs=inputs), **options)["share"]
    assert share.dtype == torch.int32
    assert share.unique().numel() > 3
    prompt = inputs | {name: inputs[name][:, :, :900] for name in "qkv"} | {"mask": mask[:, :900]}
    del prompt["prompt"]
    exact = ops.attend(**prompt)

    def error(delta: Tensor) -> Tensor:
        out = ops.attend(**prompt, **options, delta=delta.tolist())
        return ((out - exact).double() * mask[:, :900, None, None]).square().sum((0, 1, 3))

    best = error(share)
    for other in (share + 20, share - 20):
        inside = (other >= 1) & (other <= 1000)
        assert (error(other.clamp(1, 1000)) >= best)[inside].all()


def test_prompts_that_see_all_keys_fit_nothing() -> None:
    share = corrected.shares(Recorded(inputs=recorded(200)), window=[50])["share"]
    assert share.tolist() == [1] * 6


def test_apply_changes_one_head_beside_others() -> None:
    editor, inputs = GraphEditor(scale=0.25, causal=True), recorded(1500)
    tensors = [inputs[name] for name in "qkv"]
    dense = editor.run(*tensors)
    workload = Forward(1, 16_384)
    for rewrite, head in ((Window(), 2), (BlockTopk(), 1)):
        match, candidate = matched(rewrite, head), offered(rewrite, workload)[0]
        made = rewrite.prepare(match, candidate, Recorded(inputs=inputs))
        rewrite.apply(match, candidate, made, editor)  # pyright: ignore[reportArgumentType]
        emulated = rewrite.emulate(match, candidate, made, inputs)
        mine = slice(2 * head, 2 * head + 2)
        torch.testing.assert_close(editor.run(*tensors)[:, :, mine], emulated[:, :, mine])
        assert editor.attend.kwargs["delta"][mine] == tuple(made["share"][mine].tolist())  # pyright: ignore
    assert editor.attend.kwargs["delta"][:2] == (0, 0)  # pyright: ignore
    assert editor.attend.kwargs["window"] == (0, 0, 256)
    assert editor.attend.kwargs["top"] == (0, 50, 0)
    torch.testing.assert_close(editor.run(*tensors)[:, :, :2], dense[:, :, :2])


@pytest.mark.parametrize("rewrite", [Window(), BlockTopk()])
def test_tokens_past_the_prompt_see_all_keys(rewrite: Window | BlockTopk) -> None:
    inputs = recorded(1500)
    match, candidate = matched(rewrite), offered(rewrite, Forward(1, 16_384))[0]
    made = {"share": torch.full((6,), 400)}
    out = rewrite.emulate(match, candidate, made, inputs | {"prompt": 1300})
    dense = ops.attend(**inputs)
    torch.testing.assert_close(out[:, 1300:], dense[:, 1300:])
    prompt = inputs | {name: inputs[name][:, :, :1300] for name in "qkv"}
    torch.testing.assert_close(out[:, :1300], rewrite.emulate(match, candidate, made, prompt))
    assert (out - dense)[:, :1150].abs().max() > 0.01


LENGTH = 4096


class Planted(nn.Module):
    """Two heads of 16 channels that look everywhere: at values that stay alike for a while, and at
    values that each query finds anew."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 96, bias=False)
        weight = torch.zeros(96, 64)
        weight[:16, :16] = weight[32:48, :16] = 0.1 * torch.randn(16, 16)
        weight[16:32, :16], weight[48:64, :16] = 4 * torch.eye(16), 4 * torch.eye(16)
        weight[64:80, 16:32], weight[80:96, 32:48] = torch.eye(16), torch.eye(16)
        self.qkv.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 2, 16)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


def planted_inputs() -> Tensor:
    x = torch.randn(1, LENGTH, 64)
    stretches = torch.randn(LENGTH // 256, 16).repeat_interleave(256, 0)
    x[..., 16:32] = 3.0 * stretches + 0.1 * x[..., 16:32]
    return x


def test_the_head_whose_far_values_last_gets_it_and_the_other_is_kept() -> None:
    data = [planted_inputs() for _ in range(3)]
    plan = fxopt.plan(
        Planted().eval(), fxopt.Budget(relative_error=0.18), data[0], calibration=data,
        rewrites=["attention.window", "attention.block_topk"],
    )  # fmt: skip
    first, second = plan.decisions
    assert first.label == "w512+s16+d64"
    without = {other.label: other.error for other in first.alternatives}
    assert without["w512+s16"] > 10 * first.error
    assert without["w1024+s16"] > 5 * first.error
    # There an asked row says nothing of its followers, and the shares come out near nothing.
    assert not second.rewritten
    offered = {other.label: other.error for other in second.alternatives}
    assert offered["w512+s16+d64"] > 0.5 * offered["w512+s16"]
    assert "relative_error has room for" in second.reason
    # A mask keeps some of the attention; what makes up for what it hides has no such figure.
    assert first.kept_mass is None
    for other in second.alternatives:
        assert (other.kept_mass is None) == ("+d" in other.label)
