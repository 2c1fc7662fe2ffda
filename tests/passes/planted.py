"""A model in which one head retrieves and another looks everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.kernels.block_topk.reference import TILE

LENGTH, NEEDLES = 4096, (700, 1801, 2111)


class Planted(nn.Module):
    """Two heads of 16 channels: all queries of the first want the same few keys, wherever they
    are; the second looks everywhere, at values that differ from place to place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 96, bias=False)
        weight = torch.zeros(96, 64)
        weight[0, 0], weight[32, 1] = 9.0, 9.0
        weight[16:32, 2:18], weight[48:64, 2:18] = 0.1 * torch.randn(2, 16, 16)
        weight[64:80, 18:34], weight[80:96, 34:50] = torch.eye(16), torch.eye(16)
        self.qkv.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 2, 16)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


def planted_inputs(needles: Sequence[int]) -> Tensor:
    x = torch.randn(1, LENGTH, 64)
    x[..., 0], x[..., 1] = 1.0, 0.0
    x[:, list(needles), 1] = 1.0
    # The mean of all tiles is small, that of a few of them is not.
    tiles = torch.randn(LENGTH // TILE, 16).repeat_interleave(TILE, 0)
    x[..., 34:50] = 3.0 * tiles + 0.1 * x[..., 34:50]
    return x
