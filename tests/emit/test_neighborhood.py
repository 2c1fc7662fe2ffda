"""A vision transformer whose heads see windows of the grid, against its own attention masked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.kernels.attention.grid import TILE, order, seen_tiles
from tests.emit.onnx_cases import everywhere

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

HIGH, WIDE = 36, 40
GRID = (1, HIGH, WIDE)


def seen(near: int, dilation: int) -> Tensor:
    """Which tokens see each other, [N, N]."""
    tile = np.argsort(order(GRID, dilation)) // TILE
    return torch.from_numpy(seen_tiles(GRID, near, dilation)[tile][:, tile])


class Case:
    """`opt` has windows in both heads of two layers, a dilated one among them; `masked` is what it
    should compute."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = hf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=[2 * HIGH, 2 * WIDE], patch_size=2, initializer_range=0.2, num_labels=5,
        )  # fmt: skip
        self.model = hf.ViTForImageClassification(config).eval()
        self.images = torch.randn(3, 3, 2 * HIGH, 2 * WIDE)
        example = {"pixel_values": self.images[:1]}
        self.opt, chosen = everywhere("attention.neighborhood", self.model, example)
        labels = [proposal.candidate.label for proposal in chosen]
        assert labels == ["7x7", "15x15", "15x15/2", "7x7"]
        self.masked: Any = copy.deepcopy(self.model)
        self.masked.config._attn_implementation = "grid_reference"
        layers = [module for module in self.masked.modules() if hasattr(module, "q_proj")]
        windows = [((4, 1), (8, 1)), ((8, 2), (4, 1))]
        for layer, heads in zip(layers, windows, strict=True):
            layer.seen = torch.stack([seen(*window) for window in heads])

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        scores = (q @ k.mT * module.scaling).masked_fill(~module.seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def expected(self, images: Tensor) -> Tensor:
        return self.masked(pixel_values=images).logits


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = Case()
    ALL_ATTENTION_FUNCTIONS["grid_reference"] = found.attend
    yield found
    del ALL_ATTENTION_FUNCTIONS["grid_reference"]


@torch.no_grad()
def test_it_is_the_model_under_the_mask(case: Case) -> None:
    expected = case.expected(case.images)
    assert "near=(4, 8)" in case.opt.source
    assert "near=(8, 4), dilation=(2, 1)" in case.opt.source
    torch.testing.assert_close(case.opt(pixel_values=case.images).logits, expected)
    dense = case.model(pixel_values=case.images).logits
    assert (expected - dense).abs().max() > 0.01


@torch.no_grad()
def test_it_is_saved_loaded_and_compiled(case: Case, tmp_path: Path) -> None:
    images = case.images[:1]
    expected = case.opt(pixel_values=images).logits
    case.opt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    assert "near=(8, 4), dilation=(2, 1)" in again.source
    torch.testing.assert_close(again(pixel_values=images).logits, expected)
    compiled = torch.compile(case.opt, fullgraph=True)
    torch.testing.assert_close(compiled(pixel_values=images).logits, expected, rtol=1e-3, atol=1e-4)


def test_it_has_the_gradients_of_the_model_under_the_mask(case: Case) -> None:
    found: list[Tensor] = []
    for module in (case.opt, case.masked):
        weight = module.get_parameter("vit.layers.0.attention.q_proj.weight")
        loss = module(pixel_values=case.images[:1]).logits.square().sum()
        found += torch.autograd.grad(loss, weight)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_onnx_gives_the_same(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnx
    import onnxruntime

    path = tmp_path / "vit.onnx"
    case.opt.export_onnx(path)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Attention") == 2
    session = onnxruntime.InferenceSession(str(path))
    (logits,) = session.run(["logits"], {"pixel_values": case.images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(logits), case.expected(case.images), rtol=1e-3, atol=1e-4
    )
    assert path.stat().st_size < 4 * HIGH * WIDE * HIGH * WIDE  # the mask is made in the file


def test_a_budget_gets_them() -> None:
    """48 x 48 places, at which a quarter of the pairs is computed; measured, and no head idle."""
    config = hf.ViTConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=96, patch_size=2,
    )  # fmt: skip
    data = [{"pixel_values": torch.randn(1, 3, 96, 96)} for _ in range(3)]
    model = hf.ViTForImageClassification(config).eval()
    opt = fxopt.optimize(
        model, fxopt.Budget(relative_error=0.1), data[0], calibration=data,
        rewrites=["attention.neighborhood"],
    )  # fmt: skip
    assert {decision.label for decision in opt.plan.rewritten} <= {"15x15", "15x15/2"}
    assert len(opt.plan.rewritten) == 2
    assert not any("heads with a window" in note for note in opt.report.notes)


def test_a_dilated_window_is_replayed(tmp_path: Path) -> None:
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=96, patch_size=2,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).eval()
    data = [{"pixel_values": torch.randn(1, 3, 96, 96)} for _ in range(3)]
    options: dict[str, Any] = {"calibration": data, "rewrites": ["attention.neighborhood"]}
    plan = fxopt.plan(model, fxopt.Budget(relative_error=0.5), data[0], **options)
    plan.decisions[0].choose("attention.neighborhood", label="15x15/2")
    plan.save(tmp_path / "plan.json")
    again = fxopt.apply(model, fxopt.Plan.load(tmp_path / "plan.json"), example_inputs=data[0])
    assert "dilation=(2, " in again.source


def test_a_resized_dino_is_exported(tmp_path: Path) -> None:
    """Its sizes are symbols in the trace, and so are the tokens of its mask."""
    pytest.importorskip("onnxruntime")
    config = hf.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=2
    )
    images = {"pixel_values": torch.randn(1, 3, 56, 56)}
    opt, chosen = everywhere("attention.neighborhood", hf.Dinov2Model(config).eval(), images)
    assert len(chosen) == 2
    opt.export_onnx(tmp_path / "dino.onnx")
