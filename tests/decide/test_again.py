"""A plan is decided again from its own numbers: locked sites stay, limits hold, and it replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.decide.again import note_totals
from fxopt.ir.errors import PlanError, RowResult
from fxopt.ir.evidence import Distilled

ROWS = {"relative_error": 0.2, "weights": "50%", "minimize": "error"}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(128, 256), nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 37, 128, generator=generator) for _ in range(6)]


@pytest.fixture(scope="module")
def model() -> Gated:
    torch.manual_seed(3)
    return Gated().eval()


@pytest.fixture(scope="module")
def plan(model: Gated, data: list[torch.Tensor]) -> fxopt.Plan:
    return fxopt.plan(
        model, fxopt.Budget(**ROWS), data[0], calibration=data, rewrites=["linear"]
    )  # fmt: skip


def predicted(plan: fxopt.Plan) -> dict[str, float]:
    return {row.name: row.predicted or 0.0 for row in plan.totals}


@pytest.mark.slow
def test_the_same_budget_gives_no_worse_a_plan(plan: fxopt.Plan) -> None:
    again = fxopt.solve(plan)
    assert predicted(again)["weights"] <= 0.5 * plan.baseline["weights"]
    assert predicted(again)["relative_error"] <= predicted(plan)["relative_error"] * 1.001


@pytest.mark.parametrize("share", [30, 45, 70, 90])
def test_another_budget_holds_as_predicted_and_as_realised(
    plan: fxopt.Plan, model: Gated, data: list[torch.Tensor], share: int
) -> None:
    again = fxopt.solve(plan, fxopt.Budget(weights=f"{share}%"))
    opt = fxopt.apply(model, again, example_inputs=data[0], calibration=data)
    rows = {row.name: row for row in fxopt.verify(opt, model, data).rows}
    assert rows["weights"].measured == pytest.approx(predicted(again)["weights"], rel=1e-6)
    assert rows["weights"].excess <= 0


@pytest.mark.parametrize("pattern", ["down", "re:gate|up", "re:.*"])
def test_what_was_locked_by_hand_counts_in_what_is_predicted(
    plan: fxopt.Plan, model: Gated, data: list[torch.Tensor], pattern: str
) -> None:
    edited = plan.model_copy(deep=True)
    edited.lock(pattern, "keep", family="linear")
    again = fxopt.solve(edited, fxopt.Budget(weights="100%"))
    opt = fxopt.apply(model, again, example_inputs=data[0], calibration=data)
    rows = {row.name: row for row in fxopt.verify(opt, model, data).rows}
    assert rows["weights"].measured == pytest.approx(predicted(again)["weights"], rel=1e-6)


def test_looser_limits_never_err_more(plan: fxopt.Plan) -> None:
    shares = [25, 35, 50, 65, 80, 100]
    errors: list[float] = []
    for share in shares:
        again = fxopt.solve(plan, fxopt.Budget(weights=f"{share}%"))
        errors.append(sum(d.error or 0.0 for d in again.decisions if d.rewritten))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_locked_sites_stay_and_groups_and_members_exclude_each_other(plan: fxopt.Plan) -> None:
    for key, rewrite in (("down", "keep"), ("gate", "linear.low_rank"), ("gate+up+down", "keep")):
        edited = plan.model_copy(deep=True)
        labels = [a.label for a in edited.find(key, "linear").alternatives if a.rewrite == rewrite]
        edited.lock(key, rewrite, labels[0] if labels else None, family="linear")
        fixed = edited.find(key, "linear")
        again = fxopt.solve(edited, fxopt.Budget(weights="60%"))
        assert again.find(key, "linear").rewrite == fixed.rewrite
        assert again.find(key, "linear").label == fixed.label
        for group in (d for d in again.rewritten if d.members):
            assert not any(again.find(m, "linear").rewritten for m in group.members)


def test_nothing_that_was_measured_is_claimed_of_the_new_plan(plan: fxopt.Plan) -> None:
    again = fxopt.solve(plan, fxopt.Budget(weights="60%"))
    assert all(row.measured is None for row in again.totals)
    assert not again.trials
    assert "not measured" in again.notes[0]
    assert again.budget == fxopt.Budget(weights="60%")


def test_errors_are_scaled_to_the_whole_however_far_its_sites_were_off(plan: fxopt.Plan) -> None:
    for factor in (0.05, 30.0):
        edited = plan.model_copy(deep=True)
        edited.lock("re:.*", family="linear")
        alone = predicted(plan)["relative_error"]
        whole = factor * alone
        edited.totals = [RowResult("relative_error", min(alone, whole), None, whole, "")]
        note_totals(edited)
        again = fxopt.solve(edited, fxopt.Budget(relative_error=1e3))
        assert predicted(again)["relative_error"] == pytest.approx(whole)


def test_an_error_too_faint_to_tell_of_larger_ones_scales_none(plan: fxopt.Plan) -> None:
    edited = plan.model_copy(deep=True, update={"error_scale": 1.0})
    edited.totals = [RowResult("relative_error", 0.2, None, 0.01, "")]
    note_totals(edited)
    assert edited.error_scale == 1.0


def test_distillation_is_said_of_the_choices_that_it_trained(plan: fxopt.Plan) -> None:
    trained = [Distilled(block="down", before=0.2, after=0.1, steps=9)]
    edited = plan.model_copy(deep=True, update={"distilled": trained})
    other = fxopt.solve(edited, fxopt.Budget(relative_error=1e-9))
    assert not other.distilled
    assert any("after distillation" in note for note in other.notes)
    edited.lock("re:.*")
    same = fxopt.solve(edited, fxopt.Budget(weights="100%"))
    assert same.distilled == trained
    assert not any("distillation" in note for note in same.notes)


def test_totals_are_counted_again(plan: fxopt.Plan) -> None:
    edited = plan.model_copy(deep=True)
    assert edited.said == edited.notes
    edited.lock("re:.*", "keep", family="linear")
    assert edited.said[:-1] == edited.notes
    again = fxopt.solve(edited, fxopt.Budget(weights="100%"))
    assert again.said == again.notes


def test_rows_without_a_limit_are_told_of_as_before(plan: fxopt.Plan) -> None:
    again = fxopt.solve(plan, fxopt.Budget(weights="60%"))
    assert {row.name for row in again.totals} == {row.name for row in plan.totals}
    (error,) = (row for row in again.totals if row.name == "relative_error")
    assert error.limit is None
    assert error.predicted is not None
    assert error.predicted > 0


def test_what_is_verified_is_not_called_unmeasured(
    plan: fxopt.Plan, model: Gated, data: list[torch.Tensor]
) -> None:
    again = fxopt.solve(plan)
    opt = fxopt.apply(model, again, example_inputs=data[0], calibration=data)
    report = fxopt.verify(opt, model, data)
    assert not any("measured" in note for note in report.notes)
    assert not any("calibration" in note for note in report.notes)


def test_verifying_on_random_data_says_so(
    plan: fxopt.Plan, model: Gated, data: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    opt = fxopt.apply(model, plan, example_inputs=data[0], calibration=data)
    caplog.clear()
    report = fxopt.verify(opt, model, example_inputs=data[0])
    assert any("calibration: none given" in note for note in report.notes)
    assert "calibration: none given" in caplog.text


def test_an_impossible_budget_gives_the_nearest_plan_and_says_so(plan: fxopt.Plan) -> None:
    again = fxopt.solve(plan, fxopt.Budget(weights="1%"))
    assert "no choice was found" in again.notes[-1]
    assert "; weights goes no lower than " in again.notes[-1]


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"activations": "50%", "kl": 0.1}, "Budget.activations"),
        ({"latency": {"forward": "0.5x"}}, "Budget.latency.forward"),
        ({"kl": 0.1}, "another quality row"),
    ],
)
def test_what_a_plan_cannot_tell_is_an_error(
    plan: fxopt.Plan, budget: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        fxopt.solve(plan, fxopt.Budget(**budget))
