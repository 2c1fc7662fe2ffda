"""An encoder whose heads see every other token, against its own attention masked."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.emit.onnx_cases import everywhere

hf = pytest.importorskip("transformers")

LENGTH = 1100


def seen(window: int, dilation: int) -> Tensor:
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    return (distance % dilation == 0) & (distance < window * dilation)


def bert() -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=1200, initializer_range=0.3, num_labels=5,
    )  # fmt: skip
    return hf.BertForTokenClassification(config).eval()


class Case:
    """`opt` has windows in both heads of two layers, a dilated one among them; `masked` is what it
    should compute. One of two texts is padded."""

    def __init__(self) -> None:
        self.model = bert()
        ids, mask = torch.randint(3, 97, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.int64)
        mask[1, 1000:] = 0
        self.texts = {"input_ids": ids, "attention_mask": mask}
        self.opt, chosen = everywhere("attention.window", self.model, self.texts)
        labels = [proposal.candidate.label for proposal in chosen]
        assert labels == ["w256", "w512", "w256/2", "w256"]
        self.masked: Any = copy.deepcopy(self.model)
        self.masked.config._attn_implementation = "dilated_reference"
        layers = [module for module in self.masked.modules() if hasattr(module, "query")]
        windows = [((256, 1), (512, 1)), ((256, 2), (256, 1))]
        for layer, heads in zip(layers, windows, strict=True):
            layer.seen = torch.stack([seen(*window) for window in heads])

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
        hidden = ~module.seen | (self.texts["attention_mask"] == 0)[:, None, None]
        scores = (q @ k.mT * module.scaling).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    def of(self, module: nn.Module) -> Tensor:
        """The logits of what is no padding."""
        return module(**self.texts).logits[self.texts["attention_mask"] != 0]


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = Case()
    ALL_ATTENTION_FUNCTIONS["dilated_reference"] = found.attend
    yield found
    del ALL_ATTENTION_FUNCTIONS["dilated_reference"]


@torch.no_grad()
def test_it_is_the_model_under_the_mask(case: Case) -> None:
    assert re.search(r"window=\(256, 256\), \S+ \S+\s+dilation=\(2, 1\)", case.opt.source)
    expected = case.of(case.masked)
    torch.testing.assert_close(case.of(case.opt), expected)
    assert (expected - case.of(case.model)).abs().max() > 0.01


@torch.no_grad()
def test_short_texts_see_all(case: Case) -> None:
    """Those that a window would see whole."""
    texts = {name: x[:1, :251] for name, x in case.texts.items()}
    torch.testing.assert_close(case.opt(**texts).logits, case.model(**texts).logits)


@pytest.mark.slow
@torch.no_grad()
def test_it_is_saved_loaded_and_compiled(case: Case, tmp_path: Path) -> None:
    expected = case.of(case.opt)
    case.opt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved")
    assert "dilation=(2, 1)" in again.source
    torch.testing.assert_close(case.of(again), expected)
    compiled: Any = torch.compile(case.opt, fullgraph=True)
    torch.testing.assert_close(case.of(compiled), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_it_has_the_gradients_of_the_model_under_the_mask(case: Case) -> None:
    found: list[Tensor] = []
    for module in (case.opt, case.masked):
        weight = module.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
        found += torch.autograd.grad(case.of(module).square().sum(), weight)
    mine, theirs = found
    assert (mine - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.slow
@torch.no_grad()
def test_onnx_gives_the_same_at_any_length(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime

    path = tmp_path / "bert.onnx"
    case.opt.export_onnx(path)
    session = onnxruntime.InferenceSession(str(path))
    names = {node.name for node in session.get_inputs()}
    for length in (LENGTH, 611, 250):
        texts = {name: x[:, :length] for name, x in case.texts.items()}
        given = {name: x.numpy() for name, x in texts.items() if name in names}
        (logits,) = session.run(["logits"], given)
        kept = texts["attention_mask"] != 0
        torch.testing.assert_close(
            torch.from_numpy(logits)[kept], case.opt(**texts).logits[kept], rtol=1e-3, atol=1e-4
        )


SPREAD = 150.0


class Planted(nn.Module):
    """Two heads of 16 channels: the first looks at every other token nearby, the second at all
    that are as near, at values that differ from token to token."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.arange(LENGTH) - LENGTH / 2
        # Scores fall with the square of the distance, and are the same at all queries but for that.
        wanted = torch.stack([line, torch.ones_like(line), torch.ones_like(line)], 1)
        given = torch.stack([2 * line, -(line**2), 0 * line], 1) / (2 * SPREAD**2)
        sign = (-1.0) ** torch.arange(LENGTH)
        self.q = nn.Parameter(torch.stack([_padded(wanted, 8 * sign), _padded(wanted, 0 * sign)]))
        self.k = nn.Parameter(torch.stack([_padded(given, sign), _padded(given, sign)]))

    def forward(self, x: Tensor) -> Tensor:
        v = x.view(*x.shape[:2], 2, 16).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(0 * v + self.q, 0 * v + self.k, v, scale=1.0)
        return y.transpose(1, 2).flatten(2)


def _padded(x: Tensor, last: Tensor) -> Tensor:
    return nn.functional.pad(torch.cat([x, last[:, None]], 1), (0, 12))


def test_a_head_that_looks_at_every_other_token_gets_it_and_replays_it(tmp_path: Path) -> None:
    data = [torch.randn(1, LENGTH, 32) for _ in range(3)]
    model = Planted().eval()
    plan = fxopt.plan(
        model, fxopt.Budget(relative_error=0.05), data[0], calibration=data,
        rewrites=["attention.window"],
    )  # fmt: skip
    first, second = plan.decisions
    assert first.label == "w256/2"
    assert first.error < 0.05**2
    assert first.kept_mass is not None
    assert first.kept_mass.low > 0.99
    offered = {other.label: other.error for other in second.alternatives}
    assert second.label != "w256/2"
    assert offered["w256/2"] > 0.05**2
    plan.save(tmp_path / "plan.json")
    again = fxopt.apply(model, fxopt.Plan.load(tmp_path / "plan.json"), example_inputs=data[0])
    assert "dilation=(2, 1)" in again.source
