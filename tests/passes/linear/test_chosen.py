"""Each structure, planted in a model, is what `fxopt.optimize` chooses there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.kernels.monarch_linear import dense as monarch_dense

WIDTH = 192


def factors(out: int, width: int, rank: int) -> Tensor:
    return torch.randn(out, rank) @ torch.randn(rank, width) / rank**0.5


def grid(out: int, width: int) -> Tensor:
    """Weights that four bits hold exactly: 15 times a step in each group of 64."""
    codes = torch.randint(0, 16, (out, width // 64, 64)).float()
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    return ((codes - 8) / 8).flatten(1)


def monarch() -> Tensor:
    return monarch_dense(torch.randn(4, 4 * 16, WIDTH // 4), torch.randn(4, WIDTH // 4, 4 * 16)) / 7


def pivoted() -> Tensor:
    return factors(WIDTH, WIDTH, 96)  # two factors of it hold as much as the weight


def low_rank() -> Tensor:
    return factors(WIDTH, WIDTH, 48)


def beside() -> Tensor:
    return grid(WIDTH, WIDTH) + 300 * factors(WIDTH, WIDTH, 16)


PLANTED = [
    (low_rank, "linear.low_rank", "rank48", "55%"),
    (pivoted, "linear.low_rank_pivoted", "rank96", "80%"),
    (monarch, "linear.monarch", "b4k16", "70%"),
    (lambda: grid(WIDTH, WIDTH), "linear.quantized", "int4-g64", "20%"),
    (low_rank, "linear.low_rank_quantized", "rank48-int8", "16%"),
    (beside, "linear.quantized_low_rank", "int4-g64+rank16", "35%"),
]
# Found in several rounds of fitting.
FITTED = {"linear.monarch", "linear.low_rank_quantized", "linear.quantized_low_rank"}


def optimized(model: nn.Module, weights: str, data: list[Tensor]) -> fxopt.OptimizedModule:
    return fxopt.optimize(
        model, fxopt.Budget(weights=weights), data[0], calibration=data, rewrites=["linear"]
    )


@pytest.mark.parametrize(
    ("plant", "rewrite", "label", "weights"),
    [
        pytest.param(*case, id=case[1], marks=[pytest.mark.slow] if case[1] in FITTED else [])
        for case in PLANTED
    ],
)
def test_planted_structure_is_chosen(
    plant: Callable[[], Tensor], rewrite: str, label: str, weights: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).eval()
    model[0].weight.data = plant()
    data = [torch.randn(1, 300, WIDTH) for _ in range(3)]
    opt = optimized(model, weights, data)
    assert [(d.rewrite, d.label) for d in opt.plan.rewritten] == [(rewrite, label)]
    y, expected = opt(data[0]), model(data[0])
    assert (y - expected).norm() < 0.01 * expected.norm()
    assert opt.export_onnx(tmp_path / "model.onnx").difference < 1e-4 * expected.abs().max()


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(96, channels)
        self.up = nn.Linear(96, channels)
        self.down = nn.Linear(channels, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_dead_channels_are_pruned(tmp_path: Path) -> None:
    model, data = Mlp(256).eval(), [torch.randn(1, 300, 96) for _ in range(3)]
    model.down.weight.data[:, torch.randperm(256)[:128]] = 0
    opt = fxopt.optimize(
        model,
        fxopt.Budget(weights="55%"),
        data[0],
        calibration=data,
        rewrites=["linear.channel_pruned", "linear.low_rank", "linear.low_rank_shared"],
    )
    (decision,) = opt.plan.rewritten
    assert (decision.key, decision.label) == ("gate+up+down", "keep128")
    kept = {d.key: d.reason for d in opt.plan.decisions if not d.rewritten}
    assert kept["gate"] == "rewritten with gate+up+down: linear.channel_pruned keep128"
    torch.testing.assert_close(opt(data[0]), model(data[0]), rtol=1e-3, atol=1e-4)
    assert opt.export_onnx(tmp_path / "model.onnx").difference < 1e-4
    opt.save(tmp_path / "saved")
    torch.testing.assert_close(fxopt.load(tmp_path / "saved")(data[0]), opt(data[0]))


def test_layers_of_one_subspace_share_a_factor() -> None:
    model, data = Mlp(256).eval(), [torch.randn(1, 300, 96) for _ in range(3)]
    basis = torch.randn(40, 96)
    model.gate.weight.data = torch.randn(256, 40) @ basis / 50
    model.up.weight.data = torch.randn(256, 40) @ basis / 50
    names = ["linear.low_rank", "linear.low_rank_shared", "linear.channel_pruned"]
    budget = fxopt.Budget(weights="76%")
    opt = fxopt.optimize(model, budget, data[0], calibration=data, rewrites=names)
    assert [(d.key, d.label) for d in opt.plan.rewritten] == [("gate+up", "rank40")]
    torch.testing.assert_close(opt(data[0]), model(data[0]), rtol=1e-3, atol=1e-4)


def test_members_apart_where_that_is_better() -> None:
    model, data = Mlp(256).eval(), [torch.randn(1, 300, 96) for _ in range(3)]
    model.gate.weight.data = factors(256, 96, 16)
    model.up.weight.data = factors(256, 96, 16)
    names = ["linear.low_rank", "linear.low_rank_shared", "linear.channel_pruned"]
    budget = fxopt.Budget(weights="60%")
    opt = fxopt.optimize(model, budget, data[0], calibration=data, rewrites=names)
    assert {d.key for d in opt.plan.rewritten} == {"gate", "up"}


def test_keeping_a_member_keeps_its_groups() -> None:
    model, data = Mlp(256).eval(), [torch.randn(1, 300, 96) for _ in range(3)]
    made = fxopt.plan(
        model,
        fxopt.Budget(weights="90%"),
        data[0],
        calibration=data,
        rewrites=["linear.channel_pruned", "linear.low_rank_shared", "linear.low_rank"],
        keep=["up"],
    )
    assert {d.key for d in made.decisions} == {"gate", "up", "down"}
    assert {d.key for d in made.rewritten} <= {"gate", "down"}
