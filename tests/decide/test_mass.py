"""Kept mass from sampled queries: which are drawn, how sure it is, and what a plan says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import fxopt
from fxopt.decide.mass import ROWS, Masses, interval, sampled
from fxopt.ir.decision import KeptMass

LENGTH, HEADS, SIZE = 640, 2, 16


@given(st.integers(1, 700), st.integers(0, 60), st.integers(0, 5))
def test_queries_are_drawn_evenly_and_never_from_padding(
    length: int, padding: int, seed: int
) -> None:
    padding = min(padding, length - 1)
    mask = (torch.arange(length) >= padding).long()[None]
    rows = sampled({"q": torch.empty(1, 1, length, 1), "mask": mask}, seed)
    count = min(ROWS, length - padding)
    assert len(rows) == count
    assert rows.min() >= padding
    stretch = (length - padding) / count
    for place, row in enumerate(rows.tolist()):
        assert math.floor(place * stretch) <= row - padding < (place + 1) * stretch
    assert rows.equal(sampled({"q": torch.empty(1, 1, length, 1), "mask": mask}, seed))


def test_decoding_is_sampled_behind_the_prompt() -> None:
    inputs = {"q": torch.empty(1, 1, 600, 1), "mask": torch.ones(1, 600), "prompt": 500}
    assert sampled(inputs, 0, decoding=True).tolist() == list(range(500, 600))
    assert sampled({**inputs, "prompt": 100}, 0, decoding=True).min() < 104
    assert sampled(inputs, 0).min() < 5


def test_masks_of_other_keys_are_none_of_the_queries() -> None:
    inputs = {"q": torch.empty(1, 1, 3, 1), "mask": torch.zeros(1, 9)}
    assert sampled(inputs, 0).tolist() == [0, 1, 2]


def test_the_interval_is_students() -> None:
    values = torch.rand(50, dtype=torch.float64)
    low, mean, high = interval(values)
    expected = stats.t.interval(0.95, 49, values.mean().item(), stats.sem(values.numpy()))
    assert mean == pytest.approx(values.mean().item())
    assert (low, high) == pytest.approx(expected)
    assert interval(torch.tensor([0.25, 1.0]))[::2] == (0.0, 1.0)
    assert interval(torch.ones(1)) == (0.0, 1.0, 1.0)


class Two(nn.Module):
    """An attention whose head 0 looks at its neighbours and whose head 1 at everything."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Linear(SIZE, 1, bias=False)
        turns = torch.arange(LENGTH)[:, None] * 0.02 * torch.tensor([[0.5, 1.0, 1.5, 2.0]])
        near = torch.cat([turns.cos(), turns.sin()], -1) * 6
        self.register_buffer("near", torch.stack([near, torch.zeros_like(near)])[None])

    def forward(self, x: Tensor) -> Tensor:
        v = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        q = self.near + 0 * v
        y = nn.functional.scaled_dot_product_attention(q, self.near + 0 * v, v, is_causal=True)
        return self.heads(y.transpose(1, 2).flatten(2))


@pytest.fixture
def planned() -> Any:
    torch.manual_seed(0)
    data = [torch.randn(1, LENGTH, SIZE) for _ in range(3)]
    model = Two().eval()

    def plan() -> fxopt.Plan:
        return fxopt.plan(
            model, fxopt.Budget(relative_error=0.9), data[0], calibration=data,
            rewrites=["attention"],
        )  # fmt: skip

    return plan


def masses(plan: fxopt.Plan) -> list[KeptMass]:
    """What the window of 256 keeps of each head, chosen or not."""
    found = [
        option.kept_mass
        for decision in plan.decisions
        if decision.family == "attention"
        for option in (decision, *decision.alternatives)
        if option.label == "w256+s16"
    ]
    return [mass for mass in found if mass is not None]


def test_plans_say_what_a_mask_keeps_of_each_head(
    planned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    plan = planned()
    near, everywhere = masses(plan)
    assert near.near
    assert near.mean > 0.99
    # a uniform head sees 272 of t + 1 keys
    uniform = [min(1.0, 272 / (t + 1)) for t in range(LENGTH)]
    assert everywhere.low < sum(uniform) / LENGTH < everywhere.high < near.low
    assert plan.model_copy(deep=True) == plan
    plan.save(tmp_path / "plan.json")
    assert masses(fxopt.Plan.load(tmp_path / "plan.json")) == [near, everywhere]

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(Masses, "__call__", never)
    assert masses(planned()) == [near, everywhere]


def test_a_choice_by_hand_takes_its_kept_mass_along(planned: Any) -> None:
    plan = planned()
    decision = next(d for d in plan.decisions if d.family == "attention")
    before = masses(plan)
    for rewrite in ("keep", "attention.window", "keep"):
        decision.choose(rewrite)
        assert (decision.kept_mass is None) == (rewrite == "keep")
        assert masses(plan) == before
