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
from fxopt.kernels.attention.grid import TILE, Dilation, order, seen_tiles
from tests.emit.onnx_cases import everywhere

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

HIGH, WIDE = 36, 40


def seen(grid: tuple[int, ...], near: int, dilation: Dilation) -> Tensor:
    """Which tokens see each other, [N, N]."""
    tile = np.argsort(order(grid, dilation)) // TILE
    return torch.from_numpy(seen_tiles(grid, near, dilation)[tile][:, tile])


class Case:
    """`opt` has `windows` by layers and heads, those whose labels contain `label` by turns;
    `masked` is what it should compute."""

    def __init__(
        self, high: int, wide: int, label: str, windows: dict[str, tuple[int, Dilation]],
        layers: int = 2,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        config = hf.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
            image_size=[2 * high, 2 * wide], patch_size=2, initializer_range=0.2, num_labels=5,
        )  # fmt: skip
        self.model = hf.ViTForImageClassification(config).eval()
        self.images = torch.randn(3, 3, 2 * high, 2 * wide)
        example = {"pixel_values": self.images[:1]}
        self.opt, chosen = everywhere("attention.neighborhood", self.model, example, label)
        labels = [proposal.candidate.label for proposal in chosen]
        assert set(labels) == set(windows)
        self.masked: Any = copy.deepcopy(self.model)
        self.masked.config._attn_implementation = "grid_reference"
        modules = [module for module in self.masked.modules() if hasattr(module, "q_proj")]
        heads = [seen((1, high, wide), *windows[label]) for label in labels]
        for i, module in enumerate(modules):
            module.seen = torch.stack(heads[2 * i : 2 * i + 2])

    @staticmethod
    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        scores = (q @ k.mT * module.scaling).masked_fill(~module.seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def expected(self, images: Tensor) -> Tensor:
        return self.masked(pixel_values=images).logits

    def check_onnx(self, path: Path) -> None:
        pytest.importorskip("onnxruntime")
        import onnx
        import onnxruntime

        self.opt.export_onnx(path)
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert operators.count("Attention") == self.model.config.num_hidden_layers
        session = onnxruntime.InferenceSession(str(path))
        (logits,) = session.run(["logits"], {"pixel_values": self.images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), self.expected(self.images), rtol=1e-3, atol=1e-4
        )


@pytest.fixture(scope="module")
def grid_reference() -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["grid_reference"] = Case.attend
    yield
    del ALL_ATTENTION_FUNCTIONS["grid_reference"]


@pytest.fixture(scope="module")
def case(grid_reference: None) -> Case:
    return Case(HIGH, WIDE, "", {"7x7": (4, 1), "15x15": (8, 1), "15x15/2": (8, 2)})


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


@torch.no_grad()
def test_grids_that_are_long_along_one_axis_are_dilated_along_that(
    grid_reference: None, tmp_path: Path
) -> None:
    """A spectrogram, say; one head beside it is dilated along both."""
    windows: dict[str, tuple[int, Dilation]] = {"6x15/2": (8, 2), "12x15/1x2": (8, (1, 2))}
    case = Case(12, 101, "/", windows, layers=1)
    assert "dilation=(2, 2, 1, 2)" in case.opt.source
    expected = case.expected(case.images)
    torch.testing.assert_close(case.opt(pixel_values=case.images).logits, expected)
    case.opt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    torch.testing.assert_close(again(pixel_values=case.images).logits, expected)
    case.check_onnx(tmp_path / "vit.onnx")


def test_onnx_gives_the_same(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    case.check_onnx(path)
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


@pytest.mark.parametrize(
    ("size", "label", "written"),
    [((96, 96), "15x15/2", "(2, "), ((24, 202), "12x15/1x2", "(1, 2, ")],
)
def test_a_dilated_window_is_replayed(
    size: tuple[int, int], label: str, written: str, tmp_path: Path
) -> None:
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=list(size), patch_size=2,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).eval()
    data = [{"pixel_values": torch.randn(1, 3, *size)} for _ in range(3)]
    options: dict[str, Any] = {"calibration": data, "rewrites": ["attention.neighborhood"]}
    plan = fxopt.plan(model, fxopt.Budget(relative_error=0.5), data[0], **options)
    plan.decisions[0].choose("attention.neighborhood", label=label)
    plan.save(tmp_path / "plan.json")
    again = fxopt.apply(model, fxopt.Plan.load(tmp_path / "plan.json"), example_inputs=data[0])
    assert f"dilation={written}" in again.source


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
