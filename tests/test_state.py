"""What a search leaves behind: nothing. What it measures begins with the same buffers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt


class Drifting(nn.Module):
    """Each forward moves a buffer in place, and puts a new one where another was."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(96, 128), nn.Linear(128, 96)
        self.register_buffer("mean", torch.zeros(96))
        self.register_buffer("last", torch.zeros(96))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean((0, 1)), alpha=0.5)
        self.last = x.detach()[0, 0].clone()
        return self.head(torch.relu(self.body(x - self.mean)))


BUDGET = fxopt.Budget(relative_error=0.1, weights="60%")


@pytest.fixture
def data() -> list[Tensor]:
    return [torch.randn(1, 20, 96) + i for i in range(6)]


@pytest.fixture
def model() -> Drifting:
    return Drifting().eval()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("clock")
def test_buffers_and_random_numbers_are_as_before(
    model: Drifting, data: list[Tensor], fails: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))  # so that costs are measured
    with torch.no_grad():
        model(data[0])
    before, held = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(fxopt.BudgetError):
            fxopt.optimize(
                model, fxopt.Budget(relative_error=1e-9, weights="5%"), data[0], calibration=data
            )
    else:
        fxopt.optimize(model, BUDGET, data[0], calibration=data)
    assert any(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(model.get_buffer(name) is tensor for name, tensor in held.items())


def test_error_is_of_runs_that_begin_alike(model: Drifting, data: list[Tensor]) -> None:
    opt = fxopt.optimize(model, BUDGET, data[0], calibration=data)
    held = {row.name: row.measured for row in opt.report.rows}
    errors = []
    for x in data[-2:]:
        twins = copy.deepcopy(model), copy.deepcopy(opt)
        with torch.no_grad():
            y, z = (twin(x) for twin in twins)
        errors.append(((y - z).norm() / y.norm()) ** 2)
    assert held["relative_error"] == pytest.approx((sum(errors).item() / 2) ** 0.5, rel=1e-3)


def test_a_plan_replays_and_verifies_whatever_ran_since(
    model: Drifting, data: list[Tensor]
) -> None:
    opt = fxopt.optimize(model, BUDGET, data[0], calibration=data)
    with torch.no_grad():
        model(data[3])
        opt(data[4])
    again = fxopt.apply(model, opt.plan, example_inputs=data[0])
    assert again.plan == opt.plan
    assert all(row.excess <= 0 for row in fxopt.verify(opt, model, data).rows)


def test_what_is_made_in_inference_mode_trains(data: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96))
    with torch.inference_mode():
        opt = fxopt.optimize(model, BUDGET, data[0], calibration=data)
    opt(data[0]).sum().backward()
    assert any(p.grad is not None for p in opt.parameters())
