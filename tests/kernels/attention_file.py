"""An attention call as an ONNX file, and what onnxruntime makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.kernels.attention.onnx import attention_onnx

INPUTS = ("q", "k", "v", "mask")


class _Exported(nn.Module):
    def __init__(self, call: dict[str, Any], compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.rest = {name: call[name] for name in list(call)[len(INPUTS) :]}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.compute(q=q, k=k, v=v, mask=mask, **self.rest)


class AttentionFile:
    """The file of `call` as `compute` writes it, for any batch and lengths; skips the test where it
    cannot be made or run."""

    def __init__(
        self, call: dict[str, Any], compute: Callable[..., Tensor] = attention_onnx
    ) -> None:
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        dynamic = torch.export.Dim.DYNAMIC
        sizes = {0: dynamic, 2: dynamic}
        written = torch.onnx.export(
            _Exported(call, compute).eval(), tuple(call[name] for name in INPUTS), dynamo=True,
            opset_version=23, dynamic_shapes=(sizes, sizes, sizes, {0: dynamic, 1: dynamic}),
            verbose=False,
        )  # fmt: skip
        assert written is not None
        self.domains = {node.domain for node in written.model.graph.all_nodes()}
        self.model = written.model_proto.SerializeToString()
        self._session = runtime.InferenceSession(self.model)

    def run(self, call: dict[str, Any]) -> Tensor:
        """The output for the inputs of `call`."""
        inputs = {
            i.name: call[name].contiguous().numpy()
            for i, name in zip(self._session.get_inputs(), INPUTS, strict=True)
        }
        (out,) = self._session.run(None, inputs)
        return torch.from_numpy(out)
