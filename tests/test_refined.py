"""A search that chooses again about its best plan: what is measured, kept, shown and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.compiler import Compiler
from fxopt.decide.quality import Reference
from fxopt.decide.refine import Refined

BUDGET = fxopt.Budget(weights="40%")
SAID = "changes of one site were measured about that plan"


class Parallel(nn.Module):
    """Layers of one input whose outputs are added. Three are the same: what they lose adds up
    faster than what the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(6))
        with torch.no_grad():
            for i in range(3):
                self.layers[i].weight.copy_(self.layers[0].weight)
                self.layers[i + 3].weight.mul_(1.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((layer(x) for layer in self.layers), torch.zeros(()))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return Parallel().eval()


@pytest.fixture
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 20, 64, generator=generator) for _ in range(6)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sequences of each measurement of a realised graph, in order."""
    measure, seen = Reference.measure, list[Any]()

    def counted(self: Reference, *args: Any, **options: Any) -> Any:
        seen.append(self.batches)
        return measure(self, *args, **options)

    monkeypatch.setattr(Reference, "measure", counted)
    return seen


def planned(
    model: nn.Module, data: list[torch.Tensor], budget: fxopt.Budget = BUDGET
) -> fxopt.Plan:
    return fxopt.plan(model, budget, data[0], calibration=data, rewrites=["linear.low_rank"])


def errors(plan: fxopt.Plan) -> list[float]:
    return [
        row.measured
        for trial in plan.trials
        for row in trial.rows
        if row.name == "relative_error" and row.measured is not None
    ]


def test_a_better_plan_is_found_and_said(
    model: nn.Module, data: list[torch.Tensor], measured: list[Any]
) -> None:
    made = planned(model, data)
    first, *later = errors(made)
    (taken,) = (i for i, trial in enumerate(made.trials) if trial.taken)
    assert errors(made)[taken] == min(later) < first
    (said,) = (note for note in made.notes if SAID in note)
    alone, before, after = (f"{error:.3g}" for error in (sum_alone(made), first, min(later)))
    assert said == (
        f"relative_error: errors of sites alone add up to {alone}, together they had {before}; "
        f"9 {SAID}, and a choice by them is better, with {after}"
    )
    assert said in " ".join(str(made).split())
    # of six sequences the third and fourth are to choose by
    third = [data[2], data[3]]
    assert all(
        torch.equal(batch["x"], mine)
        for batches in measured
        for batch, mine in zip(batches, third, strict=True)
    )


def sum_alone(plan: fxopt.Plan) -> float:
    """What the first trial was predicted to err: the root of the sum of its sites' squares."""
    (predicted,) = (r.predicted for r in plan.trials[0].rows if r.name == "relative_error")
    assert predicted is not None
    return predicted


def test_a_second_search_measures_nothing_and_decides_alike(
    model: nn.Module, data: list[torch.Tensor], measured: list[Any]
) -> None:
    first = planned(model, data)
    assert measured
    measured.clear()
    again = planned(model, data)
    assert not measured
    assert not first.diff(again)
    assert again.notes == first.notes


def test_the_module_is_that_of_the_better_plan(model: nn.Module, data: list[torch.Tensor]) -> None:
    made = planned(model, data)
    opt = fxopt.optimize(model, BUDGET, data[0], calibration=data, rewrites=["linear.low_rank"])
    assert not made.diff(opt.plan)
    assert [n for n in opt.report.notes if SAID in n] == [n for n in made.notes if SAID in n]


def test_what_found_nothing_or_had_no_time_for_all_is_said(
    model: nn.Module, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "refine", lambda *_: Refined(4.0, 1.0, None, 3, 9))
    (said,) = (note for note in planned(model, data).notes if SAID in note)
    assert "alone add up to 2, together they had 1; 3 of 9 changes" in said
    assert said.endswith("and no choice by them is better")


def test_ctrl_c_leaves_the_best_plan_so_far(
    model: nn.Module, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Compiler, *_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Compiler, "measure_about", interrupted)
    made = planned(model, data)
    assert len(made.trials) == 1
    assert any(note.startswith("Ctrl-C ended the search") for note in made.notes)
    assert not any(SAID in note for note in made.notes)


def test_progress_shows_it(
    model: nn.Module, data: list[torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    fxopt.plan(
        model, BUDGET, data[0], calibration=data, rewrites=["linear.low_rank"], progress=True
    )
    assert "refining: 9 in " in capsys.readouterr().err


def test_a_metric_is_left_alone(model: nn.Module, data: list[torch.Tensor]) -> None:
    """Errors of single sites are in another unit, so that they never add up."""
    wanted = model(data[0]).detach()

    def metric(other: nn.Module) -> float:
        return -100 * (other(data[0]) - wanted).square().mean().item()

    rows: Any = {"metric": metric, "metric_drop": 99.0, "minimize": "error"}
    made = planned(model, data, fxopt.Budget(weights="40%", **rows))
    assert made.rewritten
    assert not any(SAID in note for note in made.notes)
