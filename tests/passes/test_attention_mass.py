"""Kept mass of masks of attention, against the weights that their emulation shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt.kernels.attention.op  # noqa: F401 (registers the op)
from fxopt.ir.ops import attend
from fxopt.ir.rewrite import Candidate, Masking, Match
from fxopt.ir.site import AttentionInfo, Site
from fxopt.passes.attention.block_topk import BlockTopk
from fxopt.passes.attention.decode_topk import DecodeTopk
from fxopt.passes.attention.hip import Hip
from fxopt.passes.attention.neighborhood import Neighborhood
from fxopt.passes.attention.window import Window

LENGTH = 1500
CASES = {
    "window": (Window(), {"window": 70, "sink": 5}),
    "block_topk": (BlockTopk(), {"top": 50}),
    "hip": (Hip(), {"top": 50}),
    "decode_topk": (DecodeTopk(), {"top_keys": 256}),
    "decode_topk, kept": (DecodeTopk(), {"top_keys": 256, "refresh": 8}),
}
CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padded": {"mask": 37},
    "decoded": {"prompt": 1460},
    "few decoded": {"prompt": 200},
    "padded and decoded": {"mask": 37, "prompt": 1440},
    "sinks and softcap": {"sinks": True, "softcap": 3.0},
    "own window": {"window": (300,), "sink_tokens": (5,)},
}


TWICE = ("causal", "padded", "decoded")
"""Kinds that "padded and decoded" has parts of."""
# only windows serve sites that have one of their own, and without a prompt nothing is decoded
SERVED = [
    pytest.param(name, kind, marks=[pytest.mark.slow] if name != "window" and kind in TWICE else [])
    for name in CASES
    for kind, call in CALLS.items()
    if name == "window"
    or ("window" not in call and (name in ("block_topk", "hip") or "prompt" in call))
]


def recorded(kind: str) -> dict[str, Any]:
    """A call whose values are the unit vectors: its output are its weights."""
    given = dict(CALLS[kind])
    if "mask" in given:
        given["mask"] = (torch.arange(LENGTH) >= given["mask"]).long()[None]
    if "sinks" in given:
        given["sinks"] = torch.randn(4, dtype=torch.float64)
    q, k = (torch.randn(1, h, LENGTH, 8, dtype=torch.float64) for h in (4, 2))
    v = torch.eye(LENGTH, dtype=torch.float64).expand(1, 2, -1, -1)
    return {"q": 2 * q, "k": k, "v": v, "scale": 0.5, "causal": True, **given}


def match() -> Match:
    info = AttentionInfo(4, 2, 8, LENGTH, torch.float64, True, 0, 0.0, True, False, False, False, 
                         True)  # fmt: skip
    return Match(Site("attention", "a/kv=0", "attend", info, "a", 0))


@pytest.mark.parametrize(("name", "kind"), SERVED)
def test_kept_mass_is_that_of_the_keys_which_emulation_weighs(name: str, kind: str) -> None:
    rewrite, parameters = CASES[name]
    assert isinstance(rewrite, Masking)
    inputs = recorded(kind)
    rows = torch.tensor([40, 128, 500, 1151, 1152, 1279, 1459, 1460, 1499])
    candidate = Candidate(rewrite.name, "", parameters)
    found = rewrite.kept_mass(match(), candidate, inputs, rows)
    options = {n: x for n, x in inputs.items() if n != "prompt"}
    weights = attend(**options)[:, rows].transpose(1, 2)
    masked = rewrite.emulate(match(), candidate, {}, inputs)[:, rows].transpose(1, 2)
    sink = 1 - weights.sum(-1)  # of the sink's logit, which nothing hides
    kept = (weights * (masked > 0)).sum(-1) + sink
    torch.testing.assert_close(found, kept, rtol=1e-9, atol=1e-12)
    hides = kind != "few decoded" or name not in ("block_topk", "hip")
    assert (found.min() < 0.95) == hides
    _check_identity(weights, masked, kept)


def _check_identity(weights: Tensor, masked: Tensor, kept: Tensor) -> None:
    """o - o_S = tau * (mu_tail - mu_S), the sink's value being 0."""
    tau = (1 - kept)[..., None]
    values = torch.randn(LENGTH, 3, dtype=torch.float64)
    tail = (weights * (masked == 0)) @ values / tau.clamp_min(1e-300)
    left = (weights * (masked > 0)) @ values / kept[..., None]
    torch.testing.assert_close(
        (weights - masked) @ values, tau * (tail - left), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    "window",
    [{"near": 4}, {"near": 9}, {"near": 8, "dilation": 2}, {"near": 8, "dilation": "1x4"}],
)
def test_neighborhoods_keep_the_tiles_that_their_emulation_weighs(window: dict[str, Any]) -> None:
    site = match().site
    assert isinstance(site.info, AttentionInfo)
    place = Match(replace(site, info=replace(site.info, causal=False, grid=(4, 34, 44))))
    inputs = {**recorded("sinks and softcap"), "causal": False}
    rows = torch.tensor([0, 3, 4, 700, 1499])
    rewrite = Neighborhood()
    assert isinstance(rewrite, Masking)
    candidate = Candidate(rewrite.name, "", window)
    assert rewrite.is_mask(candidate)
    found = rewrite.kept_mass(place, candidate, inputs, rows)
    weights = attend(**inputs)[:, rows].transpose(1, 2)
    masked = rewrite.emulate(place, candidate, {}, inputs)[:, rows].transpose(1, 2)
    kept = (weights * (masked > 0)).sum(-1) + 1 - weights.sum(-1)
    torch.testing.assert_close(found, kept, rtol=1e-9, atol=1e-12)
    assert (found[..., :2] == 1).all()  # the prefix sees all
    assert found[..., 2:].max() < 0.95


@pytest.mark.parametrize(
    ("rewrite", "parameters"),
    [
        (Window(), {"prompt_window": 70, "sink": 5}),
        (BlockTopk(), {"top": 50, "delta": 64}),
    ],
)
def test_what_is_made_up_for_has_no_kept_mass(rewrite: Any, parameters: dict[str, Any]) -> None:
    assert not rewrite.is_mask(Candidate(rewrite.name, "", parameters))
    plain = next(p for r, p in CASES.values() if r == rewrite)
    assert rewrite.is_mask(Candidate(rewrite.name, "", plain))


def test_two_sided_windows_count_both_sides() -> None:
    inputs = {**recorded("causal"), "causal": False}
    found = Window().kept_mass(
        match(), Candidate("attention.window", "", {"window": 70, "sink": 0}), inputs,
        torch.tensor([550]),
    )  # fmt: skip
    weights = attend(**inputs)[0, 550]
    torch.testing.assert_close(found[0, :, 0], weights[:, 550 - 69 : 550 + 70].sum(-1))
