"""Scales of saved tensors: a group of 128 values against one scale for a head of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels.pack_activation import pack_activation, unpack_activation
from fxopt.passes.activation.quantized_saved import GROUP

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_lm"


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Queries, keys, values and results of the trained model's attention [B, H, T, head_dim]."""
    transformers = pytest.importorskip("transformers")
    found: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "out")}
    attention = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        out = attention(q, k, v, *rest, **more)
        for name, value in zip(found, (q, k, v, out), strict=True):
            found[name].append(value)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, attn_implementation="sdpa", dtype=torch.float32
    )
    text = (FOLDER / "heldout.txt").read_bytes()[:256]
    with torch.no_grad():
        model(torch.tensor(list(text)).view(2, 128))
    return found


def of_a_head(x: Tensor, bits: int) -> Tensor:
    """With Mesa's scales: one for all tokens of a head."""
    step = x.abs().amax((0, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def of_groups(x: Tensor, bits: int) -> Tensor:
    return unpack_activation(*pack_activation(x, bits, GROUP), x.shape, x.stride(), bits, GROUP)


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_are_finer_than_heads_and_err_less(
    attended: dict[str, list[Tensor]], bits: int
) -> None:
    for values in attended.values():
        assert values
        assert values[0].shape[2] * values[0].shape[3] > GROUP
        mine, mesa = (
            sum(float((rounded(x, bits) - x).norm() / x.norm()) for x in values)
            for rounded in (of_groups, of_a_head)
        )
        assert mine < 0.9 * mesa
