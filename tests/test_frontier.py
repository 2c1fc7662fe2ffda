"""The frontier: no point beats another, budgets are answered from it, and it can be drawn."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.decide.priors import Priors
from fxopt.ir.errors import FxoptError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(96, 192), nn.Linear(192, 192), nn.Linear(192, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.fixture(scope="module")
def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 64, 96, generator=generator) for _ in range(6)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture(scope="module")
def front(model: nn.Module, data: list[torch.Tensor]) -> Any:
    return fxopt.frontier(model, data[0], calibration=data, quality="relative_error")


def test_no_point_beats_another(front: Any) -> None:
    rows = [(p.latency, p.memory, p.error) for p in front.points]
    assert len(rows) >= 5
    for mine in rows:
        for other in rows:
            better = [a < b * 0.999 for a, b in zip(other, mine, strict=True)]
            as_good = [a <= b * 1.0001 for a, b in zip(other, mine, strict=True)]
            assert not (all(as_good) and any(better))


def test_the_model_as_it_is_and_plans_that_were_measured_are_on_it(
    front: Any, model: nn.Module
) -> None:
    weights = sum(p.nbytes for p in model.parameters())
    exact = [p for p in front.points if p.error == 0]
    assert any(p.memory == weights for p in exact)
    measured = [p for p in front.points if p.measured is not None]
    assert measured
    for p in measured:
        assert p.measured == pytest.approx(p.error, rel=1e-6)
    assert all(p.error <= 1.5 for p in front.points)


def test_budgets_are_answered_without_scoring(
    front: Any, model: nn.Module, data: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Priors, "__call__", lambda *_: pytest.fail("scored again"))
    plans = [
        front.plan(fxopt.Budget(relative_error=0.1, weights=f"{share}%")) for share in (30, 60)
    ]
    sizes = [{row.name: row.predicted for row in plan.totals}["weights"] for plan in plans]
    assert sizes[0] <= 0.3 * sum(p.nbytes for p in model.parameters())
    opt = front.optimize(fxopt.Budget(relative_error=0.1, weights="30%"))
    assert all(row.excess <= 0 for row in opt.report.rows)
    again = fxopt.plan(
        model, fxopt.Budget(relative_error=0.1, weights="60%"), data[0], calibration=data
    )
    seconds = [sum(d.cost.seconds for d in plan.decisions) for plan in (again, plans[1])]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.02)


def test_another_quality_row_needs_another_frontier(front: Any, data: list[torch.Tensor]) -> None:
    with pytest.raises(FxoptError, match=r"scored in relative_error.*quality='loss_increase'"):
        front.plan(fxopt.Budget(loss_increase=0.1))
    with pytest.raises(FxoptError, match="quality: takes kl"):
        fxopt.frontier(Net(), data[0], quality="accuracy")


def test_it_prints_a_line_a_plan_and_draws_itself(front: Any, tmp_path: Path) -> None:
    lines = str(front).splitlines()
    assert len(lines) == 1 + len(front.points)
    assert lines[0].split()[:2] == ["latency", "memory"]
    drawn = ET.parse(front.to_svg(tmp_path / "front.svg")).getroot()
    circles = [e for e in drawn.iter() if e.tag.endswith("circle")]
    assert sum(c.get("class") == "plan" for c in circles) == len(front.points)
    box = [float(v) for v in drawn.get("viewBox", "").split()]
    assert all(0 < float(c.get("cx")) < box[2] and 0 < float(c.get("cy")) < box[3] for c in circles)


def test_each_budget_has_its_own_time(model: nn.Module, data: list[torch.Tensor]) -> None:
    front = fxopt.frontier(
        model, data[0], calibration=data, quality="relative_error", time_limit=5.0
    )
    monkeyed = front._compiler.under(fxopt.Budget(relative_error=0.1))
    assert monkeyed.request.deadline > front._compiler.request.deadline
