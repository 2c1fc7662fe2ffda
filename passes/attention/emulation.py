"""Attention on recorded inputs, with some of its options replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Registers what attends as decoding does.
import fxopt.kernels.kv_attention.op  # noqa: F401  # pyright: ignore[reportUnusedImport]
from fxopt.ir.ops import attend, attend_as_decoded

RECORDED = (
    "q", "k", "v", "mask", "bias", "sinks", "scale", "causal", "window", "softcap", "sink_tokens",
    "top", "delta", "hip", "mass", "skip",
)  # fmt: skip


def attended_as_decoded(inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """`attended` where the tokens from inputs["prompt"] on were decoded one at a time."""
    if not inputs.get("prompt"):
        return attended(inputs, **options)
    arguments = {name: inputs[name] for name in RECORDED if name in inputs} | options
    with torch.no_grad():
        return attend_as_decoded(**arguments, prompt=inputs["prompt"])


def attended(inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """What `attend` returns for the arguments in `inputs` (others there, "prompt", are left out)
    with `options` instead of its own: [B, N, H, Dv]."""
    arguments = {name: inputs[name] for name in RECORDED if name in inputs} | options
    with torch.no_grad():
        return attend(**arguments)
