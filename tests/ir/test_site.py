"""What a site sees of the calls of a workload."""

from __future__ import annotations

import torch

from fxopt.ir.site import AttentionInfo, LinearInfo, Site
from fxopt.ir.workload import Generate, Scenario, scenarios

LINEAR = LinearInfo("w", None, 8, 8, torch.float32)
CROSS = AttentionInfo(
    num_heads=2, num_kv_heads=2, head_dim=8, value_dim=8, dtype=torch.float32, causal=False,
    window=0, softcap=0.0, has_mask=True, has_bias=False, has_sinks=False, cross=True, cached=True,
)  # fmt: skip
WORK = Generate(batch=3, prompt=50, new_tokens=20)


def site(info: LinearInfo | AttentionInfo, side: str = "") -> Site:
    return Site("linear", "a", "a", info, "a", side=side)  # type: ignore[arg-type]


def test_without_an_encoder_every_site_sees_the_call() -> None:
    calls = scenarios(WORK)
    assert [call.source for call in calls] == [0, 0]
    assert [site(LINEAR).at(call) for call in calls] == list(calls)


def test_a_decoder_begins_with_one_token_whatever_the_prompt() -> None:
    prefill, decode = (site(LINEAR).at(call) for call in scenarios(WORK, source=40))
    assert prefill == Scenario("prefill", 3, 1, 0, source=40)
    assert decode == Scenario("decode", 3, 1, 10, repeats=20, source=40)


def test_the_encoders_side_runs_once() -> None:
    prefill, decode = (site(LINEAR, "encoder").at(call) for call in scenarios(WORK, source=40))
    assert prefill is not None
    assert (prefill.queries, prefill.past) == (40, 0)
    assert decode is None
    # its weights are there to the end
    final = site(LINEAR, "encoder").at(Scenario("final", 3, 1, 19, repeats=0, source=40))
    assert final is not None


def test_keys_of_cross_attention_are_the_source() -> None:
    prefill, decode = (site(CROSS).at(call) for call in scenarios(WORK, source=40))
    assert prefill is not None
    assert decode is not None
    assert (prefill.queries, prefill.past) == (40, 0)
    assert (decode.queries, decode.length, decode.repeats) == (1, 40, 20)
