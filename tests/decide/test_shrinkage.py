"""Second moments from few rows, and what is chosen on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.decide.shrinkage import intensity, shrunk, spread


def moments(rows: int, size: int, decay: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their mean of x xT, and what it is an estimate of: energies that fall by `decay`."""
    generator = torch.Generator().manual_seed(seed)
    energies = decay ** torch.arange(size, dtype=torch.float64)
    x = energies.sqrt() * torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return x, x.T @ x / rows, energies.diag()


@pytest.mark.parametrize("decay", [1.0, 0.97, 0.9])
@pytest.mark.parametrize("rows", [12, 60, 600])
def test_the_estimate_is_nearer_than_what_was_seen(rows: int, decay: float) -> None:
    before = after = 0.0
    for seed in range(5):
        _, seen, true = moments(rows, 96, decay, seed)
        made = shrunk(seen, intensity(seen, rows))
        before += (seen - true).square().sum().item()
        after += (made - true).square().sum().item()
    assert after < before


@given(st.integers(2, 40), st.integers(1, 80), st.floats(0.5, 1.0))
@settings(deadline=None, max_examples=40)
def test_shares_are_shares_and_energy_is_kept(size: int, rows: int, decay: float) -> None:
    _, seen, _ = moments(rows, size, decay)
    share = intensity(seen, rows)
    made = shrunk(seen, share)
    assert 0 < share <= 1
    assert made.trace().item() == pytest.approx(seen.trace().item())
    # nothing is taken for a direction without energy
    assert torch.linalg.eigvalsh(made).min() > 0


def test_many_rows_are_left_as_they_are() -> None:
    _, seen, _ = moments(20_000, 64, 0.9)
    assert intensity(seen, 20_000) < 2e-3


def test_zeros_stay_zeros() -> None:
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    assert shrunk(nothing, intensity(nothing, 8)).count_nonzero() == 0


def test_rows_get_the_moments_of_the_estimate() -> None:
    x, seen, _ = moments(40, 24, 0.8)
    made = shrunk(seen, intensity(seen, 40))
    many = x.repeat(500, 1).float()
    rows = spread(many, seen, 40, torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(rows.T @ rows / len(rows), made, atol=0.02, rtol=0.05)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 64),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("error", [0.05, 0.5])
def test_what_fits_few_rows_is_not_taken_for_exact(error: float) -> None:
    """With 32 rows to fit and 256 features, factors of rank 96 reproduce all that was seen."""
    torch.manual_seed(0)
    model = Net().eval()
    data = [torch.randn(16, 64) for _ in range(6)]
    budget = fxopt.Budget(weights="60%", relative_error=error)
    opt = fxopt.optimize(model, budget, data[0], calibration=data)
    assert all(row.excess <= 0 for row in opt.report.rows if row.limit is not None)
    factored = [d for d in opt.plan.rewritten if d.rewrite != "linear.quantized"]
    assert all(decision.error > 1e-3 for decision in factored)
