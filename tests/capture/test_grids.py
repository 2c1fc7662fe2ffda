"""Which tokens of an attention are the places of an image or a video."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn

from fxopt.capture import Captured, capture
from fxopt.ir.site import AttentionInfo

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 4,
}  # fmt: skip
SQUARE: dict[str, Any] = {**SIZES, "image_size": 20}
WIDE: dict[str, Any] = {**SIZES, "image_size": [20, 28]}


class Plain(nn.Module):
    """A model of one's own: a stem, and q, k and v from one product."""

    def __init__(
        self,
        change: Callable[[Tensor], Tensor] = lambda x: x,
        across: bool = False,
        one_size: bool = False,
    ) -> None:
        super().__init__()
        self.across, self.one_size = across, one_size
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.patch = nn.Conv2d(16, 32, 2, 2)
        self.token, self.place = nn.Parameter(torch.randn(3, 32)), nn.Parameter(torch.randn(38, 32))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        assert not self.one_size or x.shape[2:] == (20, 28)
        x = self.patch(F.gelu(self.norm(self.stem(x)))).permute(0, 2, 3, 1)
        x = x.reshape(x.shape[0], -1, 32)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        for _ in range(2):
            x = self.change(x)
            qkv = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 16)
            heads, tokens = (1, 3) if self.across else (3, 1)
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, heads, tokens, 4).unbind(0))
            x = x + self.out((y if self.across else y.transpose(1, 2)).flatten(2))
        return x.mean(1)


def pixels(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, *shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, ...]]] = {
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**WIDE)), pixels(3, 20, 28), (1, 5, 7)),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**WIDE)), pixels(3, 20, 28), (2, 5, 7)),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SQUARE)), pixels(3, 20, 20), (1, 5, 5)),
    "registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SQUARE)),
        pixels(3, 20, 20), (5, 5, 5),
    ),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SQUARE)), pixels(3, 20, 20),
             (1, 5, 5)),
    "videomae": (
        lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**SQUARE, num_frames=6)),
        pixels(6, 3, 20, 20), (0, 3, 5, 5),
    ),
    "siglip": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SQUARE)), pixels(3, 20, 20), (0, 5, 5)
    ),
    "plain": (Plain, pixels(3, 20, 28), (3, 5, 7)),
}  # fmt: skip


def infos(captured: Captured) -> list[AttentionInfo]:
    found = [s.info for s in captured.sites if s.family == "attention"]
    return [info for info in found if isinstance(info, AttentionInfo)]


def captured_with(model: nn.Module, x: Tensor) -> Captured:
    return capture(model.eval(), (x,) if isinstance(model, Plain) else {"pixel_values": x})


class _FirstQueries(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.meta.get("op") == "attention":
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.queries.append(args[0])
        return result

    def of(self, x: Tensor) -> Tensor:
        self.queries: list[Tensor] = []
        self.run(x)
        return self.queries[0]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_grid_is_where_changed_patches_change_tokens(name: str) -> None:
    build, draw, grid = CASES[name]
    x, model = draw(), build()
    captured = captured_with(model, x)
    assert [info.grid for info in infos(captured)] == [grid] * 4
    prefix, *sizes = grid
    queries = _FirstQueries(captured.graph)
    before = queries.of(x)
    assert before.shape[2] == prefix + math.prod(sizes)
    for number in torch.randperm(math.prod(sizes))[:4].tolist():
        *_, row, column = torch.unravel_index(torch.tensor(number), sizes)
        changed = x.clone()
        # The stem of `Plain` looks one pixel beyond the patch, in other ones.
        inside = changed[..., 4 * row + 1 : 4 * row + 3, 4 * column + 1 : 4 * column + 3]
        frames = inside[:, number // 25 * 2] if len(sizes) == 3 else inside
        frames += 1.0
        moved = (queries.of(changed) - before).abs().amax((0, 1, 3)).nonzero().flatten().tolist()
        assert moved == [prefix + number]


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "sizes that vary apart": (
        lambda: hf.Dinov2Model(hf.Dinov2Config(**SQUARE)), pixels(3, 20, 28),
        "vary apart: their number does not tell their grid",
    ),
    "tokens behind the grid": (
        lambda: hf.YolosModel(hf.YolosConfig(**WIDE)), pixels(3, 20, 28),
        "behind cat in embeddings it is not known where the .* places stand",
    ),
    "attention over the heads of a place": (
        lambda: Plain(across=True, one_size=True), pixels(3, 20, 28),
        "it attends in another dimension than that of the .* places",
    ),
    "shuffled tokens": (
        lambda: Plain(lambda x: x.flip(1)), pixels(3, 20, 28), "behind flip in the root",
    ),
    "some tokens": (
        lambda: Plain(lambda x: x[:, 5:]), pixels(3, 20, 28), "behind slice in the root",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_said(name: str) -> None:
    build, draw, reason = REFUSED[name]
    found = infos(captured_with(build(), draw()))
    assert found
    for info in found:
        assert info.grid == ()
        assert re.search(reason, info.no_grid), info.no_grid


@torch.no_grad()
def test_attention_over_heads_that_vary_is_no_site() -> None:
    x, model = torch.randn(2, 3, 20, 28), Plain(across=True)
    captured = captured_with(model, x)
    assert infos(captured) == []
    torch.testing.assert_close(captured.graph(x)[0], model(x))


def test_text_has_none() -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "patch_size"}
    model = hf.BertModel(hf.BertConfig(**sizes, vocab_size=50)).eval()
    found = infos(capture(model, {"input_ids": torch.randint(3, 50, (2, 9))}))
    assert {info.no_grid for info in found} == {
        "no convolution makes its tokens, so that they have no known grid"
    }
