"""Attention on recorded inputs, with some of its options replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.ops import attend

RECORDED = (
    "q", "k", "v", "mask", "bias", "sinks", "scale", "causal", "window", "softcap", "sink_tokens",
)  # fmt: skip


def attended(inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """What `attend` returns for the arguments in `inputs` (others there, "prompt", are left out)
    with `options` instead of its own: [B, N, H, Dv]."""
    arguments = {name: inputs[name] for name in RECORDED if name in inputs} | options
    with torch.no_grad():
        return attend(**arguments)
