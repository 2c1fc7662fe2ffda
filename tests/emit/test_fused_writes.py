"""Calls that are written as one read in one place: not beyond a write to what they read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxopt.emit.gates import fuse_gates
from fxopt.emit.norms import fuse_norms
from fxopt.emit.rotary import fuse_rotary

SHAPE = (2, 3, 5, 16)


class Written(nn.Module):
    """One formula, within which one of its operands is written to, or not."""

    def __init__(self, kind: str, write: bool) -> None:
        super().__init__()
        self.kind, self.write = kind, write

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x, sin = x + 1, sin + 1
        return getattr(self, self.kind)(x, cos, sin)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = torch.cat([-x[..., 8:], x[..., :8]], -1)
        if self.write:
            x[:1].mul_(2)
        return x * cos + turned * sin

    def rotary_by_cos(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        plain = x * cos
        if self.write:
            x[:1].mul_(2)
        return plain + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    def gate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        active, up = F.silu(x), x - 2
        if self.write:
            x[:1].mul_(2)
        return active * up

    def norm(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.write:
            x[:1].mul_(2)
        return x * root


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("kind", "fuse"),
    [
        ("rotary", fuse_rotary), ("rotary_by_cos", fuse_rotary), ("gate", fuse_gates),
        ("norm", fuse_norms),
    ],
)  # fmt: skip
def test_a_write_between_is_seen(kind: str, fuse: Callable[[fx.Graph], None], write: bool) -> None:
    given = torch.randn(SHAPE), torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 16)
    model = Written(kind, write)
    traced = torch.export.export(model, given, strict=False).module()
    assert isinstance(traced, fx.GraphModule)
    before = len(traced.graph.nodes)
    fuse(traced.graph)
    traced.recompile()
    assert (len(traced.graph.nodes) < before) is not write
    torch.testing.assert_close(traced(*given), model(*given), rtol=1e-6, atol=1e-6)
